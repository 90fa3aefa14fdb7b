//! Text → embedding → cluster path, which names the memory blocks to fetch.
//!
//! [`Retriever`] embeds texts and asks a [`Router`] for the leaves of each. Any router fits any tree:
//!
//! ```text
//! Beam        descends the tree with a few candidates a level; a width of 1 is greedy descent
//! Prototypes  the leaf of the most similar of its k-means prototypes, a few a leaf
//! Hnsw        a graph over the centroids of the leaves
//! Exact       every leaf compared: the judge of the others
//! Random      any leaf, the same for the same embedding: a control
//! Oracle      the leaf that a text is known to belong to: a control
//! ```
//!
//! A leaf without points is never routed to. Shapes: D embedding dimension, N texts.

mod beam;
mod error;
mod exact;
mod hnsw;
mod leaves;
mod oracle;
mod prototypes;
mod random;
mod retriever;
mod router;

pub use beam::Beam;
pub use error::{Error, Result};
pub use exact::Exact;
pub use hnsw::{Hnsw, HnswOptions};
pub use oracle::Oracle;
pub use prototypes::{PrototypeOptions, Prototypes};
pub use random::Random;
pub use retriever::Retriever;
pub use router::{Query, Route, Router};
