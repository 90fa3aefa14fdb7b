use std::sync::Arc;

use cluster_tree::{ClusterId, ClusterTree};
use nearest::squared_distance;

use crate::{Result, Route};

/// The leaves of a tree that hold points.
pub(crate) struct Leaves {
    tree: Arc<ClusterTree>,
    /// Their indices in the deepest level, rising.
    indices: Vec<u32>,
}

impl Leaves {
    pub(crate) fn new(tree: Arc<ClusterTree>) -> Self {
        let counts = tree.counts(tree.n_levels() - 1);
        let indices = (0u32..).zip(counts).filter(|(_, count)| **count > 0).map(|(index, _)| index).collect();
        Self { tree, indices }
    }

    pub(crate) fn dim(&self) -> usize {
        self.tree.dim()
    }

    /// Their indices in the deepest level, rising.
    pub(crate) fn indices(&self) -> &[u32] {
        &self.indices
    }

    /// Fails on an embedding that is not `[D]` finite numbers of a squared norm of at most 1e30.
    pub(crate) fn check(&self, embedding: &[f32]) -> Result<()> {
        let (expected, found) = (self.dim(), embedding.len());
        if expected != found {
            return Err(cluster_tree::Error::Dimension { expected, found }.into());
        }
        let norm_squared: f32 = embedding.iter().map(|value| value * value).sum();
        match norm_squared <= nearest::MAX_SQUARED_NORM {
            true => Ok(()),
            false => Err(cluster_tree::Error::NonFiniteEmbedding { norm_squared }.into()),
        }
    }

    /// The route to the leaf of an index in the deepest level.
    pub(crate) fn route(&self, index: u32, embedding: &[f32]) -> Result<Route> {
        Ok((self.tree.path_of_leaf(index)?, squared_distance(embedding, self.centroid(index)?)))
    }

    /// The centroid of the leaf of an index in the deepest level, `[D]`.
    pub(crate) fn centroid(&self, index: u32) -> Result<&[f32]> {
        Ok(self.tree.centroid(ClusterId { level: (self.tree.n_levels() - 1) as u8, index })?)
    }
}

/// The `n` nearest of (leaf, distance) pairs, nearest first, ties to the lower index.
pub(crate) fn nearest(mut leaves: Vec<(u32, f32)>, n: usize) -> Vec<(u32, f32)> {
    let nearer = |a: &(u32, f32), b: &(u32, f32)| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0));
    if n < leaves.len() {
        leaves.select_nth_unstable_by(n, nearer);
        leaves.truncate(n);
    }
    leaves.sort_unstable_by(nearer);
    leaves
}
