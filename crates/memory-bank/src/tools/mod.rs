//! What an administrator does with saved banks, as functions: each works on a
//! [`Checkpoint`](crate::Checkpoint), wherever it lies, and holds only a few blocks in memory.

mod inspect;
mod verify;

pub use inspect::{Inspection, LevelInspection, inspect, inspect_checkpoint};
pub use verify::{Verification, verify, verify_checkpoint};
