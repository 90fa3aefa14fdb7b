//! The memory bank: blocks of parameters, one per cluster of a tree, with the optimizer beside them.
//!
//! [`BlockSpec`] says what every block is and how large; [`Shard`] owns blocks and updates them, as a plain
//! value, and [`Offload`] has its rows on disk beyond a part of memory; [`LocalBank`] puts a shard
//! behind the [`BlockStore`] trait that training and generation see, and writes and reads its files.
//! [`BankStore`] keeps the saves of a bank of many shards in an object store, and a [`Checkpoint`] is
//! one of them, read into any number of shards, or served by [`StoreBank`] and [`MappedBank`]. This
//! crate knows no tensors of a framework, and no network but that of object stores.
//!
//! Shapes: L layers of the anchor, d its `d_model`, r the memory width of a level, k a branching.

mod adamw;
mod bank_store;
mod blocking;
mod checkpoint;
mod error;
mod files;
mod folder;
#[doc(hidden)]
pub mod fuzzing;
mod gradients;
mod init;
mod keep;
mod kept;
mod kind;
mod layers;
mod live;
mod local;
mod manifest;
mod mapped;
mod offload;
mod placement;
mod probe;
mod replicated;
mod row;
mod schedule;
mod scratch;
mod segment;
mod shard;
mod spec;
mod store;
mod store_bank;
mod tensor_file;
mod tiers;
mod tools;
mod write;

pub use adamw::{AdamW, squared_norm};
pub use bank_store::{Access, BankStore, StoreOptions};
pub use blocking::{Blocking, Pending};
pub use checkpoint::Checkpoint;
pub use error::{Error, Result};
pub use gradients::{Gradients, MAX_GRADIENT, Values};
pub use init::init_block;
pub use keep::Pruned;
pub use kept::Kept;
pub use kind::{LORA_ALPHA, LayerWidths, LoraMatrix, LoraOn, MemoryKind, MemoryPart};
pub use layers::MemoryLayers;
pub use live::{Live, Pushed, Versioned};
pub use local::{BankOptions, LocalBank};
pub use manifest::{FORMAT, FileRecord, Identity, Manifest, Segment, ShardRecord, Verify};
pub use mapped::MappedBank;
pub use offload::{Offload, OffloadOptions};
pub use placement::{MAX_SHARDS, Placement, owner};
pub use replicated::Replicated;
pub use row::{Array, Row, Snapshot};
pub use schedule::Schedule;
pub use shard::{MAX_STALENESS, Shard, ShardOptions, Update};
pub use spec::{BlockPart, BlockSpec};
pub use store::{Block, BlockStore, Step, Traffic};
pub use store_bank::StoreBank;
pub use tiers::{
    BankVersion, BlockDtype, DiskOptions, Encoded, LevelStats, TierLevelStats, TierOptions, TierSource,
    TierState, TierStats, Tiered, TieredStats,
};
pub use tools::{
    Exported, Inspection, LevelDiff, LevelInspection, MergeOptions, Merged, OnConflict, Precision,
    Verification, diff, export, inspect, inspect_checkpoint, merge, reshard, verify, verify_checkpoint,
};
