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
