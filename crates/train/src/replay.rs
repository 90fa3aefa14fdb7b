//! What a run would fetch under other policies: the batches that the sampler makes, the validations and the
//! looks before saves, replayed without a model.

use std::collections::{BTreeMap, HashMap};
use std::ops::RangeInclusive;

use anchor::unique_ids;
use cluster_tree::ClusterId;
use corpus::{Batch, Corpus};
use memory_bank::{BlockSpec, Kept, Step};

use crate::loader::Batches;
use crate::share::Share;
use crate::trainer::{due, of_subtree};
use crate::{Result, TrainConfig, validation};

/// What a worker keeps of the blocks that it validates with; those that it trains on are fetched whole, since
/// each of them is updated in the same step.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Cache {
    /// Nothing.
    None,
    /// At most so many bytes, as [`Kept`] does.
    Kept(u64),
    /// At most so many bytes, of which those used longest ago give way.
    Lru(u64),
}

/// A way to fetch less.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Policy {
    /// Of every worker.
    pub cache: Cache,
    /// Levels of which every worker has a copy: nothing of them is fetched.
    pub replicated: Vec<usize>,
}

/// Blocks of a level that all workers together asked for.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct ReplayedLevel {
    /// In all.
    pub asked: u64,
    /// Of those, as many had a worker's copy or were kept and had not changed.
    pub hits: u64,
}

/// What all workers together fetched.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Replayed {
    /// By level.
    pub levels: Vec<ReplayedLevel>,
    /// Bytes of blocks that came from shards.
    pub fetched_bytes: u64,
    /// Bytes of blocks that were asked for and had not changed.
    pub unchanged_bytes: u64,
}

/// Replays steps under every policy, with blocks of f32. Which batches are read is as in a run, so that the
/// counts are those that its workers have.
///
/// # Errors
/// Those of the corpus.
pub fn replay(
    corpus: &Corpus,
    config: &TrainConfig,
    spec: &BlockSpec,
    world_size: usize,
    (steps, policies): (RangeInclusive<u64>, &[Policy]),
) -> Result<Vec<Replayed>> {
    let held_out = held_out(corpus, config, spec, world_size)?;
    let mut replays: Vec<Replay> =
        policies.iter().map(|policy| Replay::new(policy, spec, world_size)).collect();
    // The step that updated a block last.
    let mut updated: HashMap<ClusterId, u64> = HashMap::new();
    let mut batches = Batches::new(corpus, config);
    for step in steps {
        let batch = batches.of(step)?;
        let shares = (0..world_size).map(|rank| Share::new(&batch, config, Some(spec), (rank, world_size)));
        for (rank, share) in shares.enumerate() {
            let ids = share.ids(&batch);
            replays.iter_mut().for_each(|replay| replay.train(&ids));
            if rank == 0 {
                updated.extend(share.touched().map(|(id, _)| (id, step)));
            }
        }
        let last = step == config.steps;
        if last || due(step, config.save_every) {
            let ids = looked_at(&batch, config, spec);
            replays.iter_mut().for_each(|replay| replay.train(&ids));
        }
        if last || due(step, config.validate_every) {
            for (rank, ids) in
                held_out.iter().enumerate().flat_map(|(rank, of)| of.iter().map(move |ids| (rank, ids)))
            {
                replays.iter_mut().for_each(|replay| replay.read((rank, Step(step)), ids, &updated));
            }
        }
    }
    Ok(replays.into_iter().map(|replay| replay.found).collect())
}

/// The blocks that each worker reads in a validation, batch by batch.
fn held_out(
    corpus: &Corpus,
    config: &TrainConfig,
    spec: &BlockSpec,
    world_size: usize,
) -> Result<Vec<Vec<Vec<ClusterId>>>> {
    let of_worker = |rank: usize| -> Result<Vec<Vec<ClusterId>>> {
        let paths = validation::paths(corpus, config, (rank, world_size))?;
        Ok(paths.iter().map(|paths| unique_ids(paths, spec)).collect())
    };
    match corpus.n_validation() {
        0 => Ok(vec![]),
        _ => (0..world_size).map(of_worker).collect(),
    }
}

/// The blocks that the first worker fetches before a save, to see whether the loss is finite.
fn looked_at(batch: &Batch, config: &TrainConfig, spec: &BlockSpec) -> Vec<ClusterId> {
    let mut parts = batch.split(config.micro_batch).map(|part| of_subtree(part, config.subtree));
    let part = parts.find(|part| part.n_sequences() > 0);
    part.map_or_else(Vec::new, |part| unique_ids(&part.paths, spec))
}

/// A policy at work.
struct Replay {
    /// By level.
    block_bytes: Vec<u64>,
    replicated: Vec<bool>,
    /// Of each worker.
    caches: Vec<Keeping>,
    found: Replayed,
}

impl Replay {
    fn new(policy: &Policy, spec: &BlockSpec, world_size: usize) -> Self {
        let levels = 0..spec.n_levels();
        Self {
            block_bytes: levels.clone().map(|level| 4 * spec.block_len(level) as u64).collect(),
            replicated: levels.map(|level| policy.replicated.contains(&level)).collect(),
            caches: (0..world_size).map(|_| Keeping::new(policy.cache)).collect(),
            found: Replayed {
                levels: vec![ReplayedLevel::default(); spec.n_levels()],
                ..Replayed::default()
            },
        }
    }

    fn train(&mut self, ids: &[ClusterId]) {
        ids.iter().for_each(|&id| self.ask(id, false));
    }

    /// What a worker reads at once is looked up before any of it is kept.
    fn read(&mut self, (rank, step): (usize, Step), ids: &[ClusterId], updated: &HashMap<ClusterId, u64>) {
        let version = |id: ClusterId| updated.get(&id).copied().unwrap_or_default();
        let here: Vec<ClusterId> =
            ids.iter().copied().filter(|id| !self.replicated[usize::from(id.level)]).collect();
        let cache = &mut self.caches[rank];
        let hits: Vec<bool> = here.iter().map(|&id| cache.get(step, id) == Some(version(id))).collect();
        for (&id, _) in here.iter().zip(&hits).filter(|(_, is_hit)| !**is_hit) {
            cache.put(id, self.block_bytes[usize::from(id.level)], version(id));
        }
        let copies = ids.iter().copied().filter(|id| self.replicated[usize::from(id.level)]);
        let asked: Vec<(ClusterId, bool)> =
            here.iter().copied().zip(hits).chain(copies.map(|id| (id, false))).collect();
        asked.into_iter().for_each(|(id, is_hit)| self.ask(id, is_hit));
    }

    fn ask(&mut self, id: ClusterId, is_unchanged: bool) {
        let level = usize::from(id.level);
        let is_copy = self.replicated[level];
        let found = &mut self.found.levels[level];
        found.asked += 1;
        found.hits += u64::from(is_copy || is_unchanged);
        match (is_copy, is_unchanged) {
            (true, _) => {}
            (false, true) => self.found.unchanged_bytes += self.block_bytes[level],
            (false, false) => self.found.fetched_bytes += self.block_bytes[level],
        }
    }
}

/// The blocks that a worker keeps, each with the step that updated it last.
enum Keeping {
    Nothing,
    Kept(Kept<u64>),
    Lru {
        limit: u64,
        bytes: u64,
        uses: u64,
        entries: HashMap<ClusterId, (u64, u64, u64)>,
        by_use: BTreeMap<u64, ClusterId>,
    },
}

impl Keeping {
    fn new(cache: Cache) -> Self {
        match cache {
            Cache::None => Self::Nothing,
            Cache::Kept(limit) => Self::Kept(Kept::new(limit)),
            Cache::Lru(limit) => {
                Self::Lru { limit, bytes: 0, uses: 0, entries: HashMap::new(), by_use: BTreeMap::new() }
            }
        }
    }

    fn get(&mut self, step: Step, id: ClusterId) -> Option<u64> {
        match self {
            Self::Nothing => None,
            Self::Kept(kept) => kept.get(step, id).copied(),
            Self::Lru { uses, entries, by_use, .. } => {
                let (version, _, used) = entries.get_mut(&id)?;
                by_use.remove(used);
                (*uses, *used) = (*uses + 1, *uses + 1);
                by_use.insert(*used, id);
                Some(*version)
            }
        }
    }

    fn put(&mut self, id: ClusterId, n_bytes: u64, version: u64) {
        match self {
            Self::Nothing => {}
            Self::Kept(kept) => kept.put(id, n_bytes, version),
            Self::Lru { limit, bytes, uses, entries, by_use } => {
                if let Some((_, n_bytes, used)) = entries.remove(&id) {
                    by_use.remove(&used);
                    *bytes -= n_bytes;
                }
                if n_bytes > *limit {
                    return;
                }
                while *bytes + n_bytes > *limit
                    && let Some((_, oldest)) = by_use.pop_first()
                {
                    *bytes -= entries.remove(&oldest).map_or(0, |(_, n_bytes, _)| n_bytes);
                }
                *uses += 1;
                *bytes += n_bytes;
                by_use.insert(*uses, id);
                entries.insert(id, (version, n_bytes, *uses));
            }
        }
    }
}
