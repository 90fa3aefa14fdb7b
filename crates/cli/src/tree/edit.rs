//! `anchorage tree split` and `merge`, and how an edited tree is written.

use std::fs;

use anyhow::{Context, Result, bail};
use cluster_tree::{ClusterId, ClusterTree};
use kmeans::Matrix;

use super::{Opened, Target, percent};
use crate::run::write_whole;

/// Steps of the k-means that halves a leaf, at most.
const ITERATIONS: usize = 50;

/// Centroids, `[D]`, and numbers of points of the halves of a leaf.
struct Halves {
    centroids: [Vec<f32>; 2],
    n: [u64; 2],
}

pub(super) fn split(opened: &Opened, leaf: &str, target: &Target) -> Result<()> {
    let leaf = opened.leaf(leaf)?;
    let tree = split_leaf(opened, &opened.tree, leaf, &opened.leaves()?)?;
    finish(opened, &tree, target)
}

/// Splits the leaves over a share of their parent, the largest share first.
pub(super) fn split_over(opened: &Opened, share: f64, target: &Target) -> Result<()> {
    if !(share > 0.0 && share < 1.0) {
        bail!("--over {share}: expected a share above 0 and below 1");
    }
    let level = (opened.tree.n_levels() - 1) as u8;
    let share_of = |index: u32| opened.tree.share(ClusterId { level, index });
    let mut over: Vec<(f64, u32)> = vec![];
    for leaf in 0..opened.tree.n_leaves() as u32 {
        let found = share_of(leaf)?;
        if found > share {
            over.push((found, leaf));
        }
    }
    if over.is_empty() {
        println!("no leaf holds more than {} of its parent", percent(share));
        return Ok(());
    }
    over.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let leaves = opened.leaves()?;
    let (mut tree, mut first_failure) = (opened.tree.clone(), None);
    for (_, leaf) in over {
        match split_leaf(opened, &tree, leaf, &leaves) {
            Ok(next) => tree = next,
            Err(error) => {
                println!("not split: {error}");
                first_failure.get_or_insert(error);
            }
        }
    }
    match first_failure {
        Some(error) if tree.hash() == opened.tree.hash() => Err(error),
        _ => finish(opened, &tree, target),
    }
}

/// `tree` with a leaf halved by the windows that are routed to it, `leaves` being the leaf of every window.
fn split_leaf(opened: &Opened, tree: &ClusterTree, leaf: u32, leaves: &[u32]) -> Result<ClusterTree> {
    let path = tree.path_of_leaf(leaf)?;
    let share = tree.share(path.leaf())?;
    let members: Vec<usize> = (0..leaves.len()).filter(|&window| leaves[window] == leaf).collect();
    let rows: Vec<f32> = members.iter().flat_map(|&window| opened.row(window)).copied().collect();
    let Some(halves) = halve(&rows, tree.dim(), opened.config.tree.spherical)? else {
        bail!(
            "leaf {path}: its {} windows cannot be told apart, expected at least 2 that differ",
            members.len()
        );
    };
    let [first, second] = &halves.centroids;
    let (split, slot) = tree.split_leaf(leaf, [(first, halves.n[0]), (second, halves.n[1])])?;
    let counts = split.counts(split.n_levels() - 1);
    println!(
        "split {path}, {} points, {} of its parent: {path} keeps {}, {} takes {}",
        tree.counts(tree.n_levels() - 1)[leaf as usize],
        percent(share),
        counts[leaf as usize],
        split.path_of_leaf(slot)?,
        counts[slot as usize]
    );
    Ok(split)
}

/// K-means with two centroids over `rows`, `[N, D]`; none when they do not come apart. It starts from
/// the two sides of the median along the line through the points that lie farthest apart: a start that
/// a few strange points do not decide.
fn halve(rows: &[f32], dim: usize, spherical: bool) -> Result<Option<Halves>> {
    let points: Vec<&[f32]> = rows.chunks_exact(dim).collect();
    if points.len() < 2 {
        return Ok(None);
    }
    let farthest_from = |from: &[f32]| {
        let distance = |point: &&&[f32]| nearest::squared_distance(point, from);
        points.iter().max_by(|a, b| distance(a).total_cmp(&distance(b))).copied().unwrap_or(points[0])
    };
    let one = farthest_from(&mean(&points, dim));
    let other = farthest_from(one);
    let along =
        |point: &&[f32]| nearest::squared_distance(point, one) - nearest::squared_distance(point, other);
    let mut sorted = points.clone();
    sorted.sort_by(|a, b| along(a).total_cmp(&along(b)));
    let (left, right) = sorted.split_at(sorted.len() / 2);
    let start = [mean(left, dim), mean(right, dim)].concat();
    let centroids = kmeans::lloyd(&Matrix::new(rows, dim)?, &start, ITERATIONS)?;
    let (first, second) = centroids.split_at(dim);
    let in_second =
        |point: &&&[f32]| nearest::squared_distance(point, second) < nearest::squared_distance(point, first);
    let n_second = points.iter().filter(in_second).count() as u64;
    let n = [points.len() as u64 - n_second, n_second];
    if n.contains(&0) {
        return Ok(None);
    }
    let mut centroids = [first.to_vec(), second.to_vec()];
    if spherical {
        centroids.iter_mut().for_each(|centroid| to_unit(centroid));
    }
    Ok(Some(Halves { centroids, n }))
}

fn mean(points: &[&[f32]], dim: usize) -> Vec<f32> {
    let sum = |axis: usize| points.iter().map(|point| f64::from(point[axis])).sum::<f64>();
    (0..dim).map(|axis| (sum(axis) / points.len() as f64) as f32).collect()
}

fn to_unit(centroid: &mut [f32]) {
    let norm = centroid.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    if norm > 0.0 {
        centroid.iter_mut().for_each(|value| *value = (f64::from(*value) / norm) as f32);
    }
}

pub(super) fn merge(opened: &Opened, texts: [&str; 2], target: &Target) -> Result<()> {
    let [a, b] = [opened.leaf(texts[0])?, opened.leaf(texts[1])?];
    let tree = opened.tree.merge_leaves(a, b, opened.config.tree.spherical)?;
    let points = tree.counts(tree.n_levels() - 1)[a.min(b) as usize];
    let (kept, freed) = (tree.path_of_leaf(a.min(b))?, tree.path_of_leaf(a.max(b))?);
    println!("merge {} and {}: {kept} holds {points} points, {freed} is empty", texts[0], texts[1]);
    finish(opened, &tree, target)
}

/// Writes an edited tree as `target` says, or tells that nothing was written.
pub(super) fn finish(opened: &Opened, tree: &ClusterTree, target: &Target) -> Result<()> {
    let (path, old) = (opened.prepared.tree(), opened.tree.hash());
    let refused = format!(
        "a memory bank trained with the old tree ({}) belongs to that one and is refused with the new one ({})",
        &old[..8],
        &tree.hash()[..8]
    );
    if let Some(out) = &target.out {
        tree.save(out)?;
        eprintln!("wrote {}; {refused}", out.display());
        return Ok(());
    }
    let kept = opened.prepared.dir.join(format!("tree.before-{}.safetensors", &old[..8]));
    if !target.write {
        eprintln!(
            "nothing written: --write replaces {} and keeps the old one as {}, --out FILE writes elsewhere",
            path.display(),
            kept.display()
        );
        return Ok(());
    }
    let _held = corpus::lock(&opened.prepared.dir)?;
    if ClusterTree::load(&path)?.hash() != old {
        bail!("{}: changed while it was being edited, nothing was written", path.display());
    }
    let bytes = fs::read(&path).with_context(|| format!("{}", path.display()))?;
    write_whole(&kept, &bytes)?;
    // The packed sequences are those of the old tree: from here on they count as not made.
    corpus::begin_stage(&opened.prepared.dir, "pack")?;
    tree.save(&path)?;
    eprintln!("wrote {}, kept the old one as {}", path.display(), kept.display());
    eprintln!("the next `anchorage prepare` packs the corpus again; {refused}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_clouds_come_apart_whatever_lies_far_away() {
        let cloud = |x: f32, n: usize| (0..n).flat_map(move |i| [x + i as f32 * 1e-3, (i % 7) as f32 * 1e-2]);
        let mut rows: Vec<f32> = cloud(1.0, 40).chain(cloud(3.0, 60)).collect();
        let halves = halve(&rows, 2, false).unwrap().unwrap();
        assert_eq!(halves.n, [40, 60]);
        assert!((halves.centroids[0][0] - 1.02).abs() < 0.01 && (halves.centroids[1][0] - 3.03).abs() < 0.01);
        let unit = halve(&rows, 2, true).unwrap().unwrap();
        assert!(unit.centroids.iter().all(|c| (c[0].hypot(c[1]) - 1.0).abs() < 1e-6));
        rows.extend([3.2, 0.0]);
        assert_eq!(halve(&rows, 2, false).unwrap().unwrap().n, [40, 61]);
    }

    #[test]
    fn points_that_are_one_point_do_not_come_apart() {
        assert!(halve(&[0.6, 0.8].repeat(5), 2, false).unwrap().is_none());
        assert!(halve(&[0.6, 0.8], 2, false).unwrap().is_none());
        assert!(halve(&[], 2, false).unwrap().is_none());
    }
}
