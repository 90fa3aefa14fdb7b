use std::sync::Arc;

use cluster_tree::ClusterTree;

use crate::{Query, Result, Route, Router};

/// Beam descent: at each level the nearest clusters below those kept so far.
pub struct Beam {
    tree: Arc<ClusterTree>,
    width: usize,
}

impl Beam {
    /// A descent that keeps `width` candidates a level, and names as many leaves; 1 is greedy descent.
    ///
    /// # Errors
    /// On a width of 0.
    pub fn new(tree: Arc<ClusterTree>, width: usize) -> Result<Self> {
        match width {
            0 => Err(cluster_tree::Error::ZeroWidth.into()),
            _ => Ok(Self { tree, width }),
        }
    }
}

impl Router for Beam {
    fn dim(&self) -> usize {
        self.tree.dim()
    }

    fn route(&self, query: Query<'_>) -> Result<Vec<Route>> {
        Ok(self.tree.beam(query.embedding, self.width)?)
    }
}
