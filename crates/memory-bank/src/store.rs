use std::fmt;
use std::future::Future;

use cluster_tree::ClusterId;
use serde::{Deserialize, Serialize};

use crate::{BlockSpec, Result};

/// A number of optimizer steps applied; `Step(0)` is the initial state.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Step(pub u64);

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One block: its weights, or the gradient of them.
#[derive(Clone, PartialEq, Debug)]
pub struct Block {
    /// The cluster that the block belongs to.
    pub id: ClusterId,
    /// `[L, 3, r, d]`: for each layer M1, M2 and M3, M3 stored as its transpose, so that
    /// `y = h · M3` with `h: [T, r]`.
    pub values: Vec<f32>,
}

/// What training and generation see of a bank, wherever its blocks are.
///
/// A step is applied once every rank has pushed it, the gradients summed in rank order, so the
/// blocks after a step do not depend on the order in which pushes arrive.
pub trait BlockStore: Send + Sync + 'static {
    /// The sizes of the blocks.
    fn spec(&self) -> &BlockSpec;

    /// The weights of these blocks, in the order of `ids`, once step `after` has been applied.
    /// Fails on a block that the spec does not have.
    fn fetch(&self, after: Step, ids: &[ClusterId]) -> impl Future<Output = Result<Vec<Block>>> + Send;

    /// Hands over one rank's gradients of `step`, which counts from 1. Every rank pushes every step;
    /// an empty push counts. A push repeated after a retry is applied once. Fails, and applies
    /// nothing, on a gradient that does not fit its block and on a step that is not the next one.
    fn push(&self, step: Step, rank: usize, grads: Vec<Block>) -> impl Future<Output = Result<()>> + Send;

    /// Writes the bank as it is after `step`. Fails when the bank is at another step.
    fn save(&self, step: Step) -> impl Future<Output = Result<()>> + Send;
}
