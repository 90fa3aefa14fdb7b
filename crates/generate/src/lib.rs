//! Sampling and scoring with retrieved memory, batched over sequences with different blocks.

mod choose;
pub mod engine;
mod error;
mod model;
mod sample;
mod score;

pub use error::{Error, Result};
pub use model::Model;
pub use sample::{Completion, Options, Prompt, generate};
pub use score::{Continuation, score};
