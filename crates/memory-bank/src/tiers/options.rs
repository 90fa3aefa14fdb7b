use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::schedule::setting;
use crate::{BlockDtype, BlockSpec, Result};

const MIB: u64 = 1 << 20;

/// Where blocks are read from: the config's `placement` object. Sources are opened by whoever reads
/// the config, and asked in the order of these fields.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TierOptions {
    /// Most RAM for blocks, in MiB; 0 is no tier in RAM. Counted are the bytes of blocks as they are
    /// held, not the index of them, which takes some 100 bytes a block.
    pub ram_mib: u64,
    /// Levels whose blocks stay in RAM once they are there. All of their bytes are set aside from
    /// the start.
    pub pinned_levels: Vec<usize>,
    /// A cache on a local disk.
    pub disk: Option<DiskOptions>,
    /// How RAM and disk hold blocks; also what a block that came from a source is rounded to.
    pub dtype: BlockDtype,
    /// Addresses of the shards that hold the bank.
    pub shards: Vec<String>,
    /// URL of the bank's checkpoint in an object store.
    pub store: Option<String>,
}

/// A cache of blocks in a folder, which outlives the process.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskOptions {
    /// The folder, of one bank and one process.
    pub dir: PathBuf,
    /// Most bytes of its blocks, in MiB.
    pub mib: u64,
}

impl TierOptions {
    /// Fails on options that a bank of these sizes cannot have: a pinned level without memory or
    /// pinned twice, pinned levels larger than RAM, a disk too small for any block, an empty address.
    pub fn validate(&self, spec: &BlockSpec) -> Result<()> {
        let levels: Vec<usize> = spec.levels().collect();
        for (i, level) in self.pinned_levels.iter().enumerate() {
            if !levels.contains(level) {
                return Err(setting("pinned_levels", &format!("some of the levels {levels:?}"), level));
            }
            if self.pinned_levels[..i].contains(level) {
                return Err(setting("pinned_levels", "each level once", format!("{:?}", self.pinned_levels)));
            }
        }
        let pinned = self.pinned_bytes(spec);
        if pinned > self.ram_bytes() {
            let (mib, pinned) = (pinned.div_ceil(MIB), &self.pinned_levels);
            return Err(setting(
                "ram_mib",
                &format!("at least {mib} for pinned_levels {pinned:?}"),
                self.ram_mib,
            ));
        }
        if let Some(disk) = &self.disk {
            let smallest = levels.iter().map(|&level| self.dtype.block_bytes(spec, level)).min().unwrap_or(0);
            if disk.bytes() < smallest + crate::tiers::slab::ENTRY_BYTES {
                let expected = format!("at least {} for one block", (smallest + 1).div_ceil(MIB));
                return Err(setting("disk.mib", &expected, disk.mib));
            }
            if disk.dir.as_os_str().is_empty() {
                return Err(setting("disk.dir", "a folder", "empty"));
            }
        }
        if self.shards.iter().any(String::is_empty) {
            return Err(setting("shards", "addresses", format!("{:?}", self.shards)));
        }
        if self.store.as_deref() == Some("") {
            return Err(setting("store", "a URL", "empty"));
        }
        Ok(())
    }

    pub(crate) fn ram_bytes(&self) -> u64 {
        self.ram_mib.saturating_mul(MIB)
    }

    /// Bytes of all blocks of the pinned levels, the generic ones too.
    pub(crate) fn pinned_bytes(&self, spec: &BlockSpec) -> u64 {
        let bytes = |&level: &usize| (spec.n_blocks(level) as u64 + 1) * self.dtype.block_bytes(spec, level);
        self.pinned_levels.iter().map(bytes).sum()
    }
}

impl DiskOptions {
    pub(crate) fn bytes(&self) -> u64 {
        self.mib.saturating_mul(MIB)
    }
}
