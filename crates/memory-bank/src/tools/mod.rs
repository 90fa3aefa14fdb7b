//! What an administrator does with saved banks, as functions: each works on a
//! [`Checkpoint`](crate::Checkpoint), wherever it lies, and holds only a few blocks in memory.

mod diff;
mod export;
mod inspect;
mod merge;
mod verify;

pub use diff::{LevelDiff, diff};
pub use export::{Exported, Precision, export};
pub use inspect::{Inspection, LevelInspection, inspect, inspect_checkpoint};
pub use merge::{MergeOptions, Merged, OnConflict, merge, reshard};
pub use verify::{Verification, verify, verify_checkpoint};
