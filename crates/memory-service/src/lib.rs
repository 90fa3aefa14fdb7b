//! The memory bank over gRPC.

mod security;
