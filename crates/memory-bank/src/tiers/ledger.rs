use std::time::Duration;

use cluster_tree::ClusterId;

use crate::tiers::encoded::ErrorSums;
use crate::tiers::routing::{Pace, Routing};
use crate::tiers::{LevelStats, TierLevelStats, TierState, TierStats, TieredStats};
use crate::{BlockSpec, Error};

/// What tiers have done, and which of them are used: a value that is told of each request. Tiers are
/// numbered from the one below RAM.
pub(crate) struct Ledger {
    pub(crate) routing: Routing,
    ram: Account,
    ram_pace: Pace,
    tiers: Vec<Account>,
    /// The tiers from here on are sources.
    n_caches: usize,
    spec: BlockSpec,
    /// By level, those without memory too; errors are in their sums.
    levels: Vec<LevelStats>,
    errors: Vec<ErrorSums>,
}

/// The numbers of one tier.
#[derive(Clone)]
struct Account {
    name: String,
    n_requests: u64,
    n_failures: u64,
    last_error: Option<String>,
    dropped: Option<String>,
    /// By level, those without memory too.
    levels: Vec<TierLevelStats>,
}

/// How long a request took, and when it ended.
#[derive(Copy, Clone)]
pub(crate) struct Timing {
    pub(crate) now: Duration,
    pub(crate) took: Duration,
}

impl Ledger {
    /// The tiers below RAM by their names; the first `n_caches` of them are no sources.
    pub(crate) fn new(spec: BlockSpec, names: Vec<String>, n_caches: usize) -> Self {
        let n_levels = spec.n_levels();
        Self {
            routing: Routing::new(names.len()),
            ram: Account::new("ram".to_owned(), n_levels),
            ram_pace: Pace::default(),
            tiers: names.into_iter().map(|name| Account::new(name, n_levels)).collect(),
            n_caches,
            spec,
            levels: (0..n_levels).map(|level| LevelStats { level, ..LevelStats::default() }).collect(),
            errors: vec![ErrorSums::default(); n_levels],
        }
    }

    /// A fetch of these blocks.
    pub(crate) fn asked(&mut self, ids: &[ClusterId]) {
        ids.iter().for_each(|id| self.levels[usize::from(id.level)].n_asked += 1);
    }

    /// RAM was asked for blocks, and had some of them.
    pub(crate) fn ram_answered(&mut self, timing: Timing, asked: impl Iterator<Item = (ClusterId, bool)>) {
        let bytes = self.ram.count(&self.spec, asked, Some(&mut self.levels));
        self.ram_pace.observe(timing.now, timing.took, bytes);
    }

    /// A tier was asked for blocks, and had some of them.
    pub(crate) fn answered(
        &mut self,
        tier: usize,
        timing: Timing,
        asked: impl Iterator<Item = (ClusterId, bool)>,
    ) {
        let cached = (tier < self.n_caches).then_some(&mut self.levels);
        let bytes = self.tiers[tier].count(&self.spec, asked, cached);
        // How fast a cache finds that it has nothing tells nothing.
        if bytes > 0 {
            self.routing.observe(tier, timing.now, timing.took, bytes);
        }
    }

    /// A tier could not answer.
    pub(crate) fn failed(&mut self, tier: usize, error: &Error) {
        let account = &mut self.tiers[tier];
        account.n_failures += 1;
        account.last_error = Some(error.to_string());
    }

    /// Another tier had these blocks after this one had failed. They took that long by it, so one that
    /// goes on failing is slower than the next.
    pub(crate) fn answered_for(&mut self, tier: usize, timing: Timing, ids: &[ClusterId]) {
        let bytes = ids.iter().map(|&id| bytes(&self.spec, id)).sum();
        self.routing.observe(tier, timing.now, timing.took, bytes);
    }

    /// A tier cannot be used any more.
    pub(crate) fn dropped(&mut self, tier: usize, error: &Error) {
        self.tiers[tier].dropped = Some(error.to_string());
        self.routing.drop_tier(tier);
    }

    pub(crate) fn damaged(&mut self, tier: usize, ids: &[ClusterId]) {
        ids.iter().for_each(|&id| self.tiers[tier].level(id).n_damaged += 1);
    }

    pub(crate) fn ram_evicted(&mut self, ids: &[ClusterId]) {
        ids.iter().for_each(|&id| self.ram.level(id).n_evictions += 1);
    }

    pub(crate) fn evicted(&mut self, tier: usize, ids: &[ClusterId]) {
        ids.iter().for_each(|&id| self.tiers[tier].level(id).n_evictions += 1);
    }

    /// A block of a source was encoded, and this is lost of it.
    pub(crate) fn encoded(&mut self, id: ClusterId, error: ErrorSums) {
        let level = usize::from(id.level);
        self.levels[level].n_encoded += 1;
        self.errors[level].add(error);
    }

    /// Of the tiers below RAM.
    pub(crate) fn states(&self) -> Vec<TierState> {
        (0..self.tiers.len()).map(|tier| self.state(tier)).collect()
    }

    fn state(&self, tier: usize) -> TierState {
        match &self.tiers[tier].dropped {
            Some(reason) => TierState::Dropped { reason: reason.clone() },
            None if self.routing.pace(tier).bypassed => TierState::Bypassed,
            None => TierState::Used,
        }
    }

    /// `ram_bytes` that are held, if there is such a tier, and the bytes that each tier below holds.
    pub(crate) fn stats(&self, ram_bytes: Option<u64>, held_bytes: &[u64]) -> TieredStats {
        let ram = ram_bytes.map(|bytes| self.ram.stats(&self.spec, TierState::Used, &self.ram_pace, bytes));
        let tiers = self.tiers.iter().zip(held_bytes).enumerate().map(|(tier, (account, &bytes))| {
            account.stats(&self.spec, self.state(tier), self.routing.pace(tier), bytes)
        });
        let level = |level: usize| LevelStats {
            max_abs_error: self.errors[level].max_abs,
            relative_rms_error: self.errors[level].relative_rms(),
            ..self.levels[level]
        };
        TieredStats {
            tiers: ram.into_iter().chain(tiers).collect(),
            levels: self.spec.levels().map(level).collect(),
        }
    }
}

impl Account {
    fn new(name: String, n_levels: usize) -> Self {
        let levels = (0..n_levels).map(|level| TierLevelStats { level, ..TierLevelStats::default() });
        let levels = levels.collect();
        Self { name, n_requests: 0, n_failures: 0, last_error: None, dropped: None, levels }
    }

    fn level(&mut self, id: ClusterId) -> &mut TierLevelStats {
        &mut self.levels[usize::from(id.level)]
    }

    /// Counts a request, in `cached` too if the tier is a cache; returns the bytes of what it had.
    fn count(
        &mut self,
        spec: &BlockSpec,
        asked: impl Iterator<Item = (ClusterId, bool)>,
        mut cached: Option<&mut Vec<LevelStats>>,
    ) -> u64 {
        self.n_requests += 1;
        let mut total = 0;
        for (id, hit) in asked {
            let level = self.level(id);
            if !hit {
                level.n_misses += 1;
                continue;
            }
            level.n_hits += 1;
            level.bytes += bytes(spec, id);
            total += bytes(spec, id);
            if let Some(levels) = &mut cached {
                levels[usize::from(id.level)].n_cached += 1;
            }
        }
        total
    }

    fn stats(&self, spec: &BlockSpec, state: TierState, pace: &Pace, held_bytes: u64) -> TierStats {
        TierStats {
            name: self.name.clone(),
            state,
            n_requests: self.n_requests,
            n_failures: self.n_failures,
            last_error: self.last_error.clone(),
            latency_seconds: pace.seconds,
            seconds_per_byte: pace.seconds_per_byte(),
            held_bytes,
            levels: spec.levels().map(|level| self.levels[level]).collect(),
        }
    }
}

/// Of a block as f32.
fn bytes(spec: &BlockSpec, id: ClusterId) -> u64 {
    4 * spec.block_len(usize::from(id.level)) as u64
}
