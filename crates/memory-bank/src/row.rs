use std::sync::Arc;

use cluster_tree::ClusterId;

use crate::{Placement, Step};

/// One block that has been updated, with its optimizer state. `values`, `m` and `v` have the
/// block's length, and a clone shares them: an update writes beside what others still hold.
#[derive(Clone, PartialEq, Debug)]
pub struct Row {
    /// The weights.
    pub values: Arc<Vec<f32>>,
    /// First moments of the gradient.
    pub m: Arc<Vec<f32>>,
    /// Second moments of the gradient.
    pub v: Arc<Vec<f32>>,
    /// Updates of this block so far.
    pub steps: u64,
    /// The step of the last of them; of a row that was loaded, at most the step of its checkpoint.
    pub last: Step,
}

/// The updated blocks of a shard as they were after a step, or those of them that were updated
/// since an earlier one.
#[derive(Clone, PartialEq, Debug)]
pub struct Snapshot {
    /// The last step applied.
    pub step: Step,
    /// The part of the bank that the shard owns.
    pub placement: Placement,
    /// In the order of ids.
    pub rows: Vec<(ClusterId, Row)>,
}
