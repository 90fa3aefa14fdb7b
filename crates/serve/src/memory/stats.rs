use memory_bank::TieredStats;

/// What was fetched so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MemoryStats {
    /// The packed blocks.
    pub packed: PackedStats,
    /// By name: the banks that are loaded.
    pub banks: Vec<BankStats>,
    /// Blocks fetched before anyone asked for them.
    pub prefetched: u64,
    /// Blocks that were not, since too many waited already or there was no room to keep them.
    pub prefetch_dropped: u64,
    /// Prefetches that failed; a request would see the same error.
    pub prefetch_failed: u64,
}

/// The packed blocks of all banks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PackedStats {
    /// Bytes held, pinned ones too.
    pub bytes: u64,
    /// Most bytes.
    pub limit_bytes: u64,
    /// Blocks held.
    pub n_blocks: u64,
    /// By level, coarse to fine.
    pub levels: Vec<PackedLevelStats>,
}

/// The packed blocks of one level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackedLevelStats {
    /// The level.
    pub level: usize,
    /// Blocks asked for that were packed already.
    pub n_hits: u64,
    /// Those that were not.
    pub n_misses: u64,
    /// Blocks that were packed: fewer than were missed when several asked at once.
    pub n_packed: u64,
    /// Blocks that made room for others.
    pub n_evictions: u64,
}

/// A loaded bank.
#[derive(Clone, Debug, PartialEq)]
pub struct BankStats {
    /// Its name.
    pub name: String,
    /// What its tiers answered, by tier and level.
    pub tiers: TieredStats,
}
