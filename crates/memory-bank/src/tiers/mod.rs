//! Blocks read through tiers: RAM, a folder on a local disk, then the sources of a bank, fastest
//! first: a mapped bank, shards, an object store.
//!
//! [`Tiered`] is the [`BlockStore`](crate::BlockStore) over all of them. Whatever leaves a source is
//! encoded once, and every answer is decoded from that: a block has the same bits from every tier.

mod disk;
mod encoded;
mod ledger;
mod options;
mod ram;
mod routing;
mod slab;
mod source;
mod stats;
mod tiered;

pub use encoded::{BlockDtype, Encoded};
pub use options::{DiskOptions, TierOptions};
pub use source::TierSource;
pub use stats::{LevelStats, TierLevelStats, TierState, TierStats, TieredStats};
pub use tiered::{BankVersion, Tiered};
