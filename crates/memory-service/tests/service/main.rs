//! Shards served in this process, and banks made of them.

mod checkpoints;
mod half_open;
mod lives;
mod operators;
mod reading;
mod refusals;
mod remote;
mod secure;
mod support;
