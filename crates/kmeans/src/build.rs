use cluster_tree::{ClusterTree, Level};
use rayon::prelude::*;

use crate::node::{NodeId, labels, train};
use crate::points::Points;
use crate::{Error, Result};

/// Nodes trained between two calls of the progress function.
const GROUP: usize = 64;

/// How a tree is built. The default is the paper's tree, 16 clusters at each of 4 levels, with
/// every point taken in every step.
#[derive(Clone, PartialEq, Debug)]
pub struct Options {
    /// Clusters of each node, by level, coarse first; each at least 2.
    pub branching: Vec<usize>,
    /// Seed: with the level and the index of a node, it decides all that is random there.
    pub seed: u64,
    /// Steps of k-means in a node, at least 1. A node whose centroids stand still stops before.
    pub iterations: usize,
    /// Points of the node that a step takes, fresh ones each step; none is all, every step. At least
    /// the largest branching. The paper has 6,400.
    pub points_per_iteration: Option<usize>,
    /// Share of a step's points above which a cluster is split, from 1/K to 1; none is 1.5/K (the
    /// paper's 0.094 at K = 16).
    pub max_share: Option<f64>,
    /// Whether centroids are scaled to unit norm, so that the nearest by L2 is the nearest by angle.
    pub spherical: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            branching: vec![16; 4],
            seed: 0,
            iterations: 20,
            points_per_iteration: None,
            max_share: None,
            spherical: false,
        }
    }
}

impl Options {
    /// Fails on an option out of range.
    pub fn check(&self) -> Result<()> {
        let error = |option, expected: String, found: String| Err(Error::Option { option, expected, found });
        let Options { branching, iterations, points_per_iteration, max_share, .. } = self;
        let n_clusters = branching.iter().try_fold(1u64, |n, &k| n.checked_mul(k as u64));
        let fits = n_clusters.is_some_and(|n| n < u64::from(u32::MAX));
        if branching.is_empty() || branching.iter().any(|&k| k < 2) || !fits {
            let expected = "numbers from 2 up with a product below 4294967295".to_owned();
            return error("branching", expected, format!("{branching:?}"));
        }
        if *iterations == 0 {
            return error("iterations", "at least 1".to_owned(), "0".to_owned());
        }
        let (min, max) = branching.iter().fold((usize::MAX, 0), |(min, max), &k| (k.min(min), k.max(max)));
        if let Some(n) = points_per_iteration.filter(|&n| n < max) {
            return error("points_per_iteration", format!("at least the branching {max}"), n.to_string());
        }
        let least = 1.0 / min as f64;
        if let Some(share) = max_share.filter(|share| !(least..=1.0).contains(share)) {
            return error("max_share", format!("{least} to 1 for the branching {min}"), share.to_string());
        }
        Ok(())
    }
}

/// How far a build is.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Progress {
    /// Level whose centroids are trained.
    pub level: usize,
    /// Nodes of the level above that are done.
    pub nodes_done: usize,
    /// Nodes of the level above.
    pub nodes: usize,
}

/// A node while its level is trained: its points, and where its results go.
struct Node<'a> {
    id: NodeId,
    members: &'a mut [u32],
    centroids: &'a mut [f32], // [K, D]
    counts: &'a mut [u64],    // [K]
}

/// Trains a cluster tree on `embeddings`, `[N, D]` row-major, which are read where they lie and
/// never copied as a whole: beyond the tree, a build takes about 32 bytes a point and 64 MiB a
/// thread. Every node is a k-means over the points that reach it (paper, section 2), balanced step
/// by step; then each of its points goes on to the nearest centroid.
///
/// The tree's counts are the points that reached each cluster that way, so that those of the
/// children of a node add up to its own. A cluster that none reached has count 0 and a centroid of
/// zeros. The balance is one of training: a share at the end can be above `max_share`, as for a
/// point that the data holds many times.
///
/// Fails on a dimension of 0, on values that are not rows of it, on no points or more than
/// 2^32 − 1, on a value that is not finite (the error names the row), and on an option out of range.
pub fn build(
    embeddings: &[f32],
    dim: usize,
    options: &Options,
    progress: &mut dyn FnMut(Progress),
) -> Result<ClusterTree> {
    options.check()?;
    let points = Points::new(embeddings, dim)?;
    let mut order: Vec<u32> = (0..points.len() as u32).collect();
    let mut levels: Vec<Level> = Vec::with_capacity(options.branching.len());
    let mut sizes = vec![points.len() as u64]; // of the nodes of the level above: the root
    for (level, &branching) in options.branching.iter().enumerate() {
        let n_clusters = sizes.len() * branching;
        let (mut centroids, mut counts) = (vec![0f32; n_clusters * dim], vec![0u64; n_clusters]);
        let outputs = centroids.chunks_exact_mut(branching * dim).zip(counts.chunks_exact_mut(branching));
        let mut rest = order.as_mut_slice();
        let mut nodes = Vec::with_capacity(sizes.len());
        for (index, (&size, (centroids, counts))) in sizes.iter().zip(outputs).enumerate() {
            let (members, tail) = rest.split_at_mut(size as usize);
            rest = tail;
            nodes.push(Node { id: NodeId { level, index }, members, centroids, counts });
        }
        train_level(&points, &mut nodes, options, progress);
        sizes.clone_from(&counts);
        levels.push(Level { branching, centroids, counts });
    }
    Ok(ClusterTree::new(dim, levels)?)
}

/// Trains the nodes of a level, in groups so that the caller hears of them.
fn train_level(
    points: &Points,
    nodes: &mut [Node<'_>],
    options: &Options,
    progress: &mut dyn FnMut(Progress),
) {
    let n_nodes = nodes.len();
    let mut nodes_done = 0;
    for group in nodes.chunks_mut(GROUP) {
        progress(Progress { level: group[0].id.level, nodes_done, nodes: n_nodes });
        group.par_iter_mut().filter(|node| !node.members.is_empty()).for_each(|node| {
            train_node(points, node, options);
        });
        nodes_done += group.len();
    }
    if let Some(node) = nodes.last() {
        progress(Progress { level: node.id.level, nodes_done, nodes: n_nodes });
    }
}

/// Trains a node, and sorts its points by cluster, in ascending order within each.
fn train_node(points: &Points, node: &mut Node<'_>, options: &Options) {
    let k = node.counts.len();
    let centroids = train(points, node.members, k, options, node.id);
    let labels = labels(points, node.members, &centroids);
    labels.iter().for_each(|&label| node.counts[label as usize] += 1);
    let mut next: Vec<usize> = node
        .counts
        .iter()
        .scan(0, |start, &count| Some(std::mem::replace(start, *start + count as usize)))
        .collect();
    let members = node.members.to_vec();
    for (member, label) in members.into_iter().zip(labels) {
        node.members[next[label as usize]] = member;
        next[label as usize] += 1;
    }
    let dim = points.dim();
    let trained = centroids.values().chunks_exact(dim).zip(node.centroids.chunks_exact_mut(dim));
    for ((from, to), &count) in trained.zip(&*node.counts) {
        if count > 0 {
            to.copy_from_slice(from);
        }
    }
}
