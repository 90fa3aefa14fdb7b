//! A bank of several shards and workers under faults, many times over. Everything is drawn from a seed:
//! how many shards and workers there are, how they are delayed, what is lost, who is cut off, crashes and
//! comes back, and when.
//!
//! * `stack` runs the real server and the real client over turmoil's network and clock, with checkpoints.
//! * `values` feeds [`memory_bank::Shard`] values by messages that are lost, repeated and out of order.
//!
//! In both, whatever happens: the bank ends with the bits of one shard fed in order (so no push is lost or
//! applied twice), and every block fetched has the bits that it had after one step of those allowed (so
//! none is torn, and none is older than its fence).
//!
//! `cargo test --release -p memory-service --test simulation` runs 200 seeds of both. More, and one again:
//!
//! ```text
//! ANCHORAGE_SIM_SEEDS=10000 cargo test --release -p memory-service --test simulation
//! ANCHORAGE_SIM_FIRST=17 ANCHORAGE_SIM_SEEDS=1 cargo test --release -p memory-service --test simulation
//! ```

mod faults;
mod launcher;
mod network;
mod processes;
mod reference;
mod seeds;
mod setting;
mod stack;
mod store;
mod values;
