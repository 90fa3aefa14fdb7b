use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use anchor::PathMemory;
use cluster_tree::{ClusterId, ClusterPath};
use memory_bank::{BankVersion, BlockSpec, Encoded, Tiered, TieredStats};

use super::counts::Fetches;
use super::packed::Packed;
use super::{BankInfo, Result};

/// A bank that is loaded. Who holds it may use it, also when another has taken its name.
pub struct Bank {
    info: BankInfo,
    spec: Arc<BlockSpec>,
    version: BankVersion,
    tiers: Tiered,
    has_caches: bool,
    updates: Option<HashMap<ClusterId, u64>>,
    packed: Arc<Packed>,
    fetches: Arc<Fetches>,
}

/// What a [`Bank`] is made of.
pub(super) struct BankParts {
    pub(super) info: BankInfo,
    pub(super) spec: Arc<BlockSpec>,
    pub(super) version: BankVersion,
    pub(super) tiers: Tiered,
    /// Whether the tiers keep what they have read, in RAM or on a disk.
    pub(super) has_caches: bool,
    pub(super) updates: Option<HashMap<ClusterId, u64>>,
    pub(super) packed: Arc<Packed>,
    pub(super) fetches: Arc<Fetches>,
}

/// How the blocks of a path were fetched.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fetched {
    /// What it took.
    pub ms: f64,
    /// By level with memory, coarse to fine.
    pub levels: Vec<LevelFetch>,
}

/// One block of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LevelFetch {
    /// Its level.
    pub level: usize,
    /// Whether it was packed already.
    pub cached: bool,
    /// Bytes of its numbers.
    pub bytes: u64,
}

impl Bank {
    pub(super) fn new(parts: BankParts) -> Self {
        let BankParts { info, spec, version, tiers, has_caches, updates, packed, fetches } = parts;
        Self { info, spec, version, tiers, has_caches, updates, packed, fetches }
    }

    /// What it is.
    pub fn info(&self) -> &BankInfo {
        &self.info
    }

    /// The sizes of its blocks.
    pub fn spec(&self) -> &BlockSpec {
        &self.spec
    }

    /// Its step, seed and hashes.
    pub fn version(&self) -> &BankVersion {
        &self.version
    }

    /// Steps that updated a block; none when the bank does not tell, or has no such block.
    pub fn updates(&self, id: ClusterId) -> Option<u64> {
        self.spec.check(id).ok()?;
        Some(self.updates.as_ref()?.get(&id).copied().unwrap_or(0))
    }

    /// What its tiers have answered so far.
    pub fn tier_stats(&self) -> TieredStats {
        self.tiers.stats()
    }

    /// The blocks of a path, packed, and how they were fetched. None of levels without memory. What was packed
    /// already is shared, not copied. The path counts as fetched.
    ///
    /// # Errors
    /// On a path that the bank does not have, and when all tiers fail.
    pub async fn path_memory(self: &Arc<Self>, path: &ClusterPath) -> Result<(PathMemory, Fetched)> {
        let begin = Instant::now();
        let ids = self.ids(path)?;
        let got = self.packed.fetch(self, &ids).await?;
        self.fetches.add(path.ids());
        let level = |got: &super::packed::Got| LevelFetch {
            level: usize::from(got.block.id().level),
            cached: got.cached,
            bytes: got.block.bytes(),
        };
        let levels = got.iter().map(level).collect();
        let memory = PathMemory::new(got.into_iter().map(|got| got.block).collect());
        Ok((memory, Fetched { ms: begin.elapsed().as_secs_f64() * 1e3, levels }))
    }

    /// Blocks as the tiers hold them, in the order of `ids`. They count as fetched.
    ///
    /// # Errors
    /// On a block that the bank does not have, and when all tiers fail.
    pub async fn blocks(&self, ids: &[ClusterId]) -> Result<Vec<Arc<Encoded>>> {
        let blocks = self.fetch(ids).await?;
        self.fetches.add(ids.iter().copied());
        Ok(blocks)
    }

    /// The blocks of a path, coarse to fine: of the levels with memory.
    ///
    /// # Errors
    /// On a path that the bank does not have.
    pub fn ids(&self, path: &ClusterPath) -> Result<Vec<ClusterId>> {
        let has_memory = |id: &ClusterId| self.spec.width.get(usize::from(id.level)) != Some(&0);
        let ids: Vec<ClusterId> = path.ids().filter(has_memory).collect();
        ids.iter().try_for_each(|&id| self.spec.check(id))?;
        Ok(ids)
    }

    /// Brings a block nearer that nobody has asked for, if there is room; whether there was.
    pub(super) async fn fetch_ahead(self: &Arc<Self>, id: ClusterId) -> Result<bool> {
        let bytes = self.info.dtype.block_bytes(&self.spec, usize::from(id.level));
        if self.packed.has_room(bytes) {
            self.packed.fetch_ahead(self, id).await?;
        } else if self.has_caches {
            self.fetch(&[id]).await?;
        } else {
            return Ok(false);
        }
        Ok(true)
    }

    /// As [`Bank::blocks`], not counted.
    pub(super) async fn fetch(&self, ids: &[ClusterId]) -> Result<Vec<Arc<Encoded>>> {
        Ok(self.tiers.fetch_shared(self.version.step, ids).await?)
    }

    /// Fetches and packs the blocks of pinned levels.
    pub(super) async fn warm(self: &Arc<Self>) -> Result<()> {
        const AT_ONCE: usize = 16;
        let spec = &self.spec;
        let pinned = self.packed.pinned_levels().iter().filter(|&&level| spec.width.get(level) > Some(&0));
        for &level in pinned {
            let indices = (0..spec.n_blocks(level) as u32).chain([ClusterId::GENERIC]);
            let ids: Vec<ClusterId> = indices.map(|index| ClusterId { level: level as u8, index }).collect();
            for ids in ids.chunks(AT_ONCE) {
                self.packed.fetch(self, ids).await?;
            }
        }
        Ok(())
    }

    pub(super) fn load(&self) -> u64 {
        self.info.load
    }

    pub(super) fn shared_spec(&self) -> &Arc<BlockSpec> {
        &self.spec
    }

    pub(super) fn packed(&self) -> &Packed {
        &self.packed
    }
}

impl Drop for Bank {
    fn drop(&mut self) {
        self.packed.forget(self.load());
    }
}
