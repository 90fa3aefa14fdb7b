//! What proto/memory.proto and proto/retrieval.proto compile to.

#![allow(missing_docs, unreachable_pub, reason = "generated; documented in proto/memory.proto")]
#![allow(clippy::all, clippy::pedantic, reason = "generated")]

tonic::include_proto!("memory.v1");

/// The compiled file, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/memory.bin"));

/// Memory by text.
pub mod retrieval {
    tonic::include_proto!("retrieval.v1");

    /// The compiled file, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/retrieval.bin"));
}
