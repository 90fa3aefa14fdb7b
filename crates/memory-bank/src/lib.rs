//! The memory bank: blocks of parameters, one per cluster of a tree, with the optimizer beside them.
//!
//! [`BlockSpec`] says how large every block is; [`Shard`] owns blocks and updates them, as a plain
//! value; [`LocalBank`] puts a shard behind the [`BlockStore`] trait that training and generation
//! see, and writes and reads its files. This crate knows no tensors of a framework and no network.
//!
//! Shapes: L layers of the anchor, d its `d_model`, r the memory width of a level, k a branching.

mod adamw;
mod blocking;
mod checkpoint;
mod error;
mod gradients;
mod init;
mod inspect;
mod live;
mod local;
mod manifest;
mod placement;
mod row;
mod schedule;
mod shard;
mod spec;
mod store;
mod tensor_file;
mod tiers;

pub use adamw::{AdamW, squared_norm};
pub use blocking::Blocking;
pub use error::{Error, Result};
pub use gradients::{Gradients, MAX_GRADIENT, Values};
pub use init::init_block;
pub use inspect::{Inspection, LevelInspection, inspect};
pub use live::{Live, Pushed};
pub use local::{BankOptions, LocalBank};
pub use manifest::{FORMAT, FileRecord, Manifest, Verify, verify};
pub use placement::{MAX_SHARDS, Placement, owner};
pub use row::{Row, Snapshot};
pub use schedule::Schedule;
pub use shard::{MAX_STALENESS, Shard, ShardOptions, Update};
pub use spec::{BlockSpec, MemoryKind};
pub use store::{Block, BlockStore, Step};
pub use tiers::{
    BankVersion, BlockDtype, DiskOptions, Encoded, LevelStats, TierLevelStats, TierOptions, TierSource,
    TierState, TierStats, Tiered, TieredStats,
};
