//! What a model knows: loss on held-out documents and closed-book questions, with each kind of memory.

mod error;
mod held_out;
mod mode;
mod questions;
pub mod report;
mod statistics;

pub use error::{Error, Result};
pub use held_out::{HeldOut, TokenSum, held_out, input};
pub use mode::{MemoryMode, random_other};
pub use questions::{Answer, AskOptions, N_BUCKETS, Question, TRAIN, ask, read_questions};
pub use statistics::{Rate, bootstrap_mean};
