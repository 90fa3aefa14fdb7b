use std::sync::Arc;

use cluster_tree::ClusterTree;

use crate::leaves::Leaves;
use crate::{Query, Result, Route, Router};

/// A control: any leaf that holds points, drawn evenly by a hash of the embedding and a seed.
pub struct Random {
    leaves: Leaves,
    seed: u64,
}

impl Random {
    /// A draw of `seed`.
    pub fn new(tree: Arc<ClusterTree>, seed: u64) -> Self {
        Self { leaves: Leaves::new(tree), seed }
    }
}

impl Router for Random {
    fn dim(&self) -> usize {
        self.leaves.dim()
    }

    fn route(&self, Query { embedding, .. }: Query<'_>) -> Result<Vec<Route>> {
        self.leaves.check(embedding)?;
        let hash =
            embedding.iter().fold(mix(self.seed), |hash, value| mix(hash ^ u64::from(value.to_bits())));
        let indices = self.leaves.indices();
        // The high half of a product with the number of leaves is even over them.
        let drawn = (u128::from(hash) * indices.len() as u128) >> 64;
        Ok(vec![self.leaves.route(indices[drawn as usize], embedding)?])
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014): every bit of the state reaches every bit of the result.
fn mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
