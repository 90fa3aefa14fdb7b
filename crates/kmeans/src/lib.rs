//! Vectors to a cluster tree: balanced hierarchical k-means (paper, section 2 and its appendix).
//!
//! [`build`] trains a tree top-down, of points in memory or of a file larger than it; [`assign`] sends vectors to the
//! leaves of a tree; [`lloyd`] is plain k-means. All give the same bits on any number of threads and on any
//! processor: points go to the nearest centroid exactly (crate `nearest`), and sums are exact, so that no order of
//! work shows in them.
//!
//! Shapes: N points, D embedding dimension, K clusters of one node.

mod assign;
mod assignment;
mod balance;
mod build;
mod centroids;
mod error;
mod journal;
mod node;
mod options;
mod progress;
mod rows;
mod seeding;
mod sums;

pub use assign::assign;
pub use build::{Built, Job, JournalFile, build};
pub use error::{Error, Result};
pub use journal::remove_journal;
pub use node::lloyd;
pub use options::Options;
pub use progress::Progress;
pub use rows::{Matrix, RowFile, Rows};
