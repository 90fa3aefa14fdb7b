//! Vectors to a cluster tree: balanced hierarchical k-means (paper, section 2 and its appendix).
//!
//! [`build`] trains a tree top-down, [`assign`] sends vectors to its leaves. Both give the same bits
//! on any number of threads: work is cut into chunks that depend on the data alone, and their
//! results are added in order.
//!
//! Shapes: N points, D embedding dimension, K clusters of one node.

mod assign;
mod balance;
mod build;
mod error;
mod kernel;
mod node;
mod points;
mod seeding;

pub use assign::assign;
pub use build::{Options, Progress, build};
pub use error::{Error, Result};
