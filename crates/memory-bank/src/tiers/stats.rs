/// What tiers have done so far.
#[derive(Clone, PartialEq, Debug)]
pub struct TieredStats {
    /// RAM and disk, if there are such tiers, and the sources, in the order in which they are asked.
    pub tiers: Vec<TierStats>,
    /// The levels with memory, coarse to fine.
    pub levels: Vec<LevelStats>,
}

/// One tier.
#[derive(Clone, PartialEq, Debug)]
pub struct TierStats {
    /// `ram`, `disk`, or the name of the source.
    pub name: String,
    /// Whether it is used.
    pub state: TierState,
    /// Requests that it has answered.
    pub n_requests: u64,
    /// Requests that it has failed to answer; another tier did, unless the fetch failed.
    pub n_failures: u64,
    /// The last of these failures.
    pub last_error: Option<String>,
    /// What a request takes, averaged with exponentially falling weights.
    pub latency_seconds: f64,
    /// The same for each byte of the blocks as f32.
    pub seconds_per_byte: f64,
    /// Bytes of the blocks that RAM or disk hold; 0 of a source.
    pub held_bytes: u64,
    /// The levels with memory, coarse to fine.
    pub levels: Vec<TierLevelStats>,
}

/// Whether a tier is used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TierState {
    /// It is asked in its turn.
    Used,
    /// It was slower than the next one, and is asked when all others fail, and by few fetches later
    /// on to see whether it still is.
    Bypassed,
    /// It is no longer asked.
    Dropped {
        /// The error that ended it.
        reason: String,
    },
}

/// One level of a tier.
#[derive(Copy, Clone, PartialEq, Eq, Default, Debug)]
pub struct TierLevelStats {
    /// The level.
    pub level: usize,
    /// Blocks that the tier was asked for and had.
    pub n_hits: u64,
    /// Blocks that it was asked for and did not have.
    pub n_misses: u64,
    /// Bytes, as f32, of the blocks that it had.
    pub bytes: u64,
    /// Blocks that made room for others.
    pub n_evictions: u64,
    /// Blocks on disk that were not what was written. They were read from the next tier.
    pub n_damaged: u64,
}

/// One level over all tiers.
#[derive(Copy, Clone, PartialEq, Default, Debug)]
pub struct LevelStats {
    /// The level.
    pub level: usize,
    /// Blocks asked for, one twice in a fetch counted once.
    pub n_asked: u64,
    /// Those of them that RAM or disk had.
    pub n_cached: u64,
    /// Blocks that came from a source, and were encoded.
    pub n_encoded: u64,
    /// The largest error of a number by encoding.
    pub max_abs_error: f64,
    /// The norm of all errors by encoding over that of what was encoded.
    pub relative_rms_error: f64,
}

impl TierLevelStats {
    /// The share of blocks asked for that the tier had; none before it was asked.
    pub fn hit_rate(&self) -> Option<f64> {
        rate(self.n_hits, self.n_hits + self.n_misses)
    }
}

impl LevelStats {
    /// The share of blocks asked for that RAM or disk had; none before any was.
    pub fn hit_rate(&self) -> Option<f64> {
        rate(self.n_cached, self.n_asked)
    }
}

fn rate(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}
