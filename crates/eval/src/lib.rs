//! What a model knows: loss on held-out documents and closed-book questions, with each kind of memory.

mod agreement;
mod error;
mod held_out;
mod mode;
mod questions;
pub mod report;
mod statistics;
mod terms;
pub mod tree_page;

pub use agreement::Agreement;
pub use error::{Error, Result};
pub use held_out::{HeldOut, Sample, TokenSum, held_out, held_out_batches, input};
pub use mode::{MemoryMode, random_other};
pub use questions::{Answer, AskOptions, N_BUCKETS, Question, TRAIN, ask, read_questions};
pub use statistics::{Rate, bootstrap_mean};
pub use terms::{ClassWords, LevelTerms, Term, Vocabulary, WordCounter};
