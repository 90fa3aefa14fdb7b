//! Training anchor and memory: fetch memory in, step, push gradients out, save, resume.
//!
//! The trainer sees the bank through `BlockStore` and data through `Corpus::sequence`, which is a pure
//! function: all that resumes is [`TrainState`] and the files beside it in a checkpoint.

mod attempt;
mod buckets;
mod checkpoint;
mod config;
mod error;
mod loader;
mod metrics;
mod optimizer;
mod parts;
mod pipe;
mod replay;
mod share;
mod tensorboard;
mod traffic;
mod trainer;
mod validation;

pub use attempt::Attempt;
pub use checkpoint::{Checkpoints, TrainState};
pub use config::{Assign, Generic, Phase, Subtree, TrainConfig};
pub use error::{Error, Result};
pub use metrics::{Metrics, StepMetrics, StepTime, read_metrics};
pub use optimizer::Optimizer;
pub use parts::{Ended, Parts, Workers};
pub use pipe::MemoryPipe;
pub use replay::{Cache, Policy, Replayed, ReplayedLevel, replay};
pub use traffic::{LevelTraffic, cluster_shares, even_shares, expected, simulated};
pub use trainer::Trainer;
