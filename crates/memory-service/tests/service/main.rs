//! Shards served in this process, and banks made of them.

mod refusals;
mod remote;
mod support;
