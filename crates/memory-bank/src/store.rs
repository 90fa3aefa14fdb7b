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

/// Bytes of blocks that a store has moved so far.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Traffic {
    /// Weights fetched.
    pub fetched_bytes: u64,
    /// Gradients pushed.
    pub pushed_bytes: u64,
    /// Weights that were asked for and not sent, since what was kept of them had not changed.
    pub unchanged_bytes: u64,
}

impl Traffic {
    /// What was moved after an earlier look.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            fetched_bytes: self.fetched_bytes.saturating_sub(before.fetched_bytes),
            pushed_bytes: self.pushed_bytes.saturating_sub(before.pushed_bytes),
            unchanged_bytes: self.unchanged_bytes.saturating_sub(before.unchanged_bytes),
        }
    }
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

    /// As [`BlockStore::fetch`], of blocks that are read and not trained on in this step: they may be asked
    /// for again before they change, so a store may keep them and fetch only what is no longer the same.
    fn read(&self, after: Step, ids: &[ClusterId]) -> impl Future<Output = Result<Vec<Block>>> + Send {
        self.fetch(after, ids)
    }

    /// What it has moved so far; `None` of a bank in the same process.
    fn traffic(&self) -> Option<Traffic> {
        None
    }

    /// Hands over one rank's gradients of `step`, which counts from 1. Every rank pushes every step;
    /// an empty push counts. A push repeated after a retry is applied once. Fails, and applies
    /// nothing, on a gradient that does not fit its block and on a step that is not the next one.
    fn push(&self, step: Step, rank: usize, grads: Vec<Block>) -> impl Future<Output = Result<()>> + Send;

    /// Writes the bank as it is after `step`. Fails when the bank is at another step.
    fn save(&self, step: Step) -> impl Future<Output = Result<()>> + Send;
}
