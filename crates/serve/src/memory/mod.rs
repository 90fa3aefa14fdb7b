//! Which memory a text fetches, from banks that are loaded, swapped and unloaded while others are served.
//!
//! ```text
//! text ─ embed, route ─ path ─ [`Blocked`] ─ blocks: packed in one LRU, else through the tiers of a [`Bank`]
//! ```
//!
//! [`Retrieval`] is all of it behind one handle. Embedding, routing and packing run on the threads for blocking
//! work, so that those of the requests stay free.

mod bank;
mod banks;
mod blocked;
mod counts;
mod error;
mod explain;
mod grpc;
mod packed;
mod prefetch;
mod retrieval;
mod select;
mod sources;
mod stats;

pub use bank::{Bank, Fetched, LevelFetch};
pub use banks::{BankInfo, Banks};
pub use blocked::Blocked;
pub use error::{Error, Result};
pub use explain::{ClusterSummary, Example, Explained, TermWeight};
pub use retrieval::{MemoryOptions, Retrieval, RetrievalParts, Route};
pub use select::{Ask, Memory, Selected};
pub use sources::{BankSource, Reach, open_tiers};
pub use stats::{BankStats, MemoryStats, PackedLevelStats, PackedStats};

/// Runs work that computes, reads or copies much, so that the threads of requests stay free.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Error::Task(error.to_string()))?
}
