//! The cluster tree as a value: ids, paths, and the descent of an embedding to its leaf.
//!
//! A tree has `n_levels` levels, level 0 the coarsest. Cluster `i` of a level has the children
//! `i*k .. (i+1)*k` of the next one, `k` the branching there, so an index is global within its
//! level and parents need no table. The tree never sees text or tensors: it maps a vector to a path.
//!
//! Shapes: D embedding dimension, N clusters of a level.

mod descent;
mod edit;
mod error;
mod file;
mod path;
mod tree;

pub use error::{Error, Result};
pub use file::FORMAT;
pub use path::{ClusterId, ClusterPath};
pub use tree::{ClusterTree, Level};
