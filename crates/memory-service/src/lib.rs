//! The memory bank over gRPC, and memory by text.

mod bulk;
mod client;
mod codec;
#[doc(hidden)]
pub mod fuzzing;
mod identity;
mod parts;
pub mod proto;
mod retrieval;
pub mod security;
mod server;
mod wire;

pub use client::{RemoteBank, RemoteOptions, RemoteStats, Retry, Save, ShardStat};
pub use codec::{FetchPiece, Payload, PushPiece};
pub use identity::Identity;
pub use retrieval::{
    Ask, RETRIEVAL_READY, Refusal, RetrievalLimits, RetrievalOptions, RetrievalSource, Retrieved, What,
    serve_retrieval,
};
pub use server::{
    Compression, Limits, READY, ServeError, ServeOptions, Source, StoreOfBank, serve, serve_connections,
};
pub use wire::Dtype;

/// Metadata of a refusal that tells when to come back, in milliseconds: the name that gRPC's own retries
/// mind.
pub(crate) const RETRY_METADATA: &str = "grpc-retry-pushback-ms";

/// Milliseconds that a refusal asks to wait.
pub(crate) fn pushback(status: &tonic::Status) -> Option<u64> {
    status.metadata().get(RETRY_METADATA)?.to_str().ok()?.parse().ok()
}
