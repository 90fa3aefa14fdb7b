//! The way down: which children are nearest.

use nearest::{Codes, Interval, Panels, squared_distance};

use crate::tree::{ClusterTree, Level};

/// The centroids of a tree, coded for the search of nearest children. Centroids are seen from that of their parent,
/// so that codes tell siblings apart.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Descent {
    /// What the children of the root are seen from: their mean.
    root: Vec<f32>,
    /// Per level a group of candidates for each cluster above it; empty clusters are absent.
    levels: Vec<Panels>,
}

/// A cluster met in a descent, and its squared distance.
#[derive(Copy, Clone)]
pub(crate) struct Candidate {
    pub(crate) distance: f32,
    pub(crate) index: u32,
}

impl Descent {
    pub(crate) fn new(dim: usize, levels: &[Level]) -> Self {
        let root = mean(dim, &levels[0]);
        let mut panels = Vec::with_capacity(levels.len());
        for (level, Level { branching, centroids, counts }) in levels.iter().enumerate() {
            let mut groups = Panels::absent(counts.len() / branching, *branching, dim);
            for (index, centroid) in centroids.chunks_exact(dim).enumerate().filter(|&(i, _)| counts[i] > 0) {
                let parent = index / branching;
                let origin = match level.checked_sub(1) {
                    Some(above) => &levels[above].centroids[parent * dim..][..dim],
                    None => &root,
                };
                groups.set(parent, index % branching, centroid, origin);
            }
            panels.push(groups);
        }
        Self { root, levels: panels }
    }

    fn origin<'a>(&'a self, tree: &'a ClusterTree, level: usize, parent: u32) -> &'a [f32] {
        match level.checked_sub(1) {
            Some(above) => tree.centroid_at(above, parent),
            None => &self.root,
        }
    }

    /// The leaf that greedy descent ends with.
    pub(crate) fn greedy(&self, tree: &ClusterTree, embedding: &[f32]) -> u32 {
        let mut codes = Codes::with_capacity(1, embedding.len());
        let mut parent = 0u32;
        for (level, panels) in self.levels.iter().enumerate() {
            codes.clear();
            codes.push(embedding, self.origin(tree, level, parent));
            let first = parent * panels.k() as u32;
            let child = |child: usize| tree.centroid_at(level, first + child as u32);
            let mut nearest = 0;
            panels.nearest(parent as usize, &codes, |_| embedding, child, |_, found| nearest = found as u32);
            parent = first + nearest;
        }
        parent
    }

    /// The leaf that greedy descent ends with, of each of `n` rows: those that meet in a cluster go on together.
    pub(crate) fn greedy_all<'a>(
        &self,
        tree: &'a ClusterTree,
        n: usize,
        row: impl Fn(usize) -> &'a [f32],
    ) -> Vec<u32> {
        let mut codes = Codes::with_capacity(n, tree.dim());
        let (mut order, mut clusters): (Vec<u32>, _) = ((0..n as u32).collect(), vec![0u32; n]);
        for (level, panels) in self.levels.iter().enumerate() {
            order.sort_unstable_by_key(|&index| clusters[index as usize]);
            let mut next = vec![0u32; n];
            for group in order.chunk_by(|&a, &b| clusters[a as usize] == clusters[b as usize]) {
                let parent = clusters[group[0] as usize];
                let origin = self.origin(tree, level, parent);
                codes.clear();
                group.iter().for_each(|&index| codes.push(row(index as usize), origin));
                let first = parent * panels.k() as u32;
                let child = |child: usize| tree.centroid_at(level, first + child as u32);
                panels.nearest(
                    parent as usize,
                    &codes,
                    |i| row(group[i] as usize),
                    child,
                    |i, found| {
                        next[group[i] as usize] = first + found as u32;
                    },
                );
            }
            clusters = next;
        }
        clusters
    }

    /// The nearest leaves that a beam of `width` ends with, nearest first, ties to the lower index.
    pub(crate) fn beam(&self, tree: &ClusterTree, embedding: &[f32], width: usize) -> Vec<Candidate> {
        let mut codes = Codes::with_capacity(1, embedding.len());
        let mut beam = vec![Candidate { distance: 0.0, index: 0 }]; // the root
        let (mut children, mut bounds) = (vec![], vec![]);
        for (level, panels) in self.levels.iter().enumerate() {
            children.clear();
            for parent in &beam {
                codes.clear();
                codes.push(embedding, self.origin(tree, level, parent.index));
                let (first, group) = (children.len(), parent.index as usize);
                panels.intervals(group, &codes, 0, &mut children);
                children[first..]
                    .iter_mut()
                    .for_each(|child: &mut Interval| child.index += group * panels.k());
            }
            // The `width` nearest are no farther than this.
            let mut farthest = f32::INFINITY;
            if children.len() > width {
                bounds.clear();
                bounds.extend(children.iter().map(|child| child.most));
                farthest = *bounds.select_nth_unstable_by(width - 1, f32::total_cmp).1;
            }
            beam.clear();
            beam.extend(children.iter().filter(|child| child.least <= farthest).map(|child| {
                let index = child.index as u32;
                Candidate { distance: squared_distance(embedding, tree.centroid_at(level, index)), index }
            }));
            beam.sort_unstable_by(|a, b| a.distance.total_cmp(&b.distance).then(a.index.cmp(&b.index)));
            beam.truncate(width);
        }
        beam
    }
}

/// The mean of the clusters that hold points; zeros if none does.
fn mean(dim: usize, level: &Level) -> Vec<f32> {
    let mut mean = vec![0f32; dim];
    let used = level.centroids.chunks_exact(dim).zip(&level.counts).filter(|&(_, &count)| count > 0);
    let n = used.clone().count() as f32;
    for (centroid, _) in used {
        mean.iter_mut().zip(centroid).for_each(|(sum, x)| *sum += x / n);
    }
    mean
}
