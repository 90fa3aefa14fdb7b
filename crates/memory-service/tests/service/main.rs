//! Shards served in this process, and banks made of them.

mod remote;
mod support;
