//! Generation for many callers at once: one thread owns the keys and values, every step takes one token of each
//! sequence that runs and pieces of the prompts that join (continuous batching).
//!
//! A completion depends on its request and on the memory its reroutes are answered with, to the bit, and never on
//! what else runs. Callers are async; they meet the thread in a bounded queue and in channels.

mod distribution;
mod handle;
mod options;
mod queue;
mod request;
mod scheduler;
mod sequence;
mod text;

pub use handle::{Engine, Generation, Refused};
pub use options::{EngineOptions, EngineStats};
pub use request::{Event, Finish, MAX_STOPS, MAX_TOP, Reason, Request, Reroute, Sampling, Token, TokenScore};
