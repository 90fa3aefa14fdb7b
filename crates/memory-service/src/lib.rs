//! The memory bank over gRPC.

pub mod security;
