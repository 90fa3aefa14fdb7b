use std::sync::Arc;

use cluster_tree::ClusterTree;
use nearest::squared_distance;

use crate::leaves::{Leaves, nearest};
use crate::{Error, Query, Result, Route, Router};

/// The nearest leaves of all: every leaf is compared. Slow on a large tree, and never wrong.
pub struct Exact {
    leaves: Leaves,
    n: usize,
}

impl Exact {
    /// A scan that names the `n` nearest leaves.
    ///
    /// # Errors
    /// When `n` is 0.
    pub fn new(tree: Arc<ClusterTree>, n: usize) -> Result<Self> {
        if n == 0 {
            return Err(Error::Setting { name: "leaves of an exact scan", expected: "at least 1", found: 0 });
        }
        Ok(Self { leaves: Leaves::new(tree), n })
    }
}

impl Exact {
    /// The nearest leaf of those that `allows` their index in the deepest level; none when it allows none.
    ///
    /// # Errors
    /// On an embedding of another dimension, or not finite.
    pub fn nearest_of(&self, embedding: &[f32], allows: impl Fn(u32) -> bool) -> Result<Option<Route>> {
        self.leaves.check(embedding)?;
        let mut best: Option<(u32, f32)> = None;
        for &leaf in self.leaves.indices() {
            let distance = squared_distance(embedding, self.leaves.centroid(leaf)?);
            if best.is_none_or(|(_, least)| distance < least) && allows(leaf) {
                best = Some((leaf, distance));
            }
        }
        best.map(|(leaf, _)| self.leaves.route(leaf, embedding)).transpose()
    }
}

impl Router for Exact {
    fn dim(&self) -> usize {
        self.leaves.dim()
    }

    fn route(&self, Query { embedding, .. }: Query<'_>) -> Result<Vec<Route>> {
        self.leaves.check(embedding)?;
        let distance = |&leaf: &u32| Ok((leaf, squared_distance(embedding, self.leaves.centroid(leaf)?)));
        let distances = self.leaves.indices().iter().map(distance).collect::<Result<Vec<_>>>()?;
        nearest(distances, self.n).into_iter().map(|(leaf, _)| self.leaves.route(leaf, embedding)).collect()
    }
}
