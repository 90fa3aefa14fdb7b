//! The steps of `plan --simulate` under policies that fetch less: a cache of each worker, copies of levels.

use anyhow::Result;
use corpus::Corpus;
use memory_bank::BlockSpec;
use serde::Serialize;
use train::{Cache, Policy, Replayed, ReplayedLevel};

use super::{GIB, PlanArgs};
use crate::config::Config;

/// All steps that were simulated, under one policy.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct ReplayedPlan {
    /// "none", "kept" (what `memory.cache_mib` does) or "lru".
    cache: &'static str,
    /// Of each worker.
    cache_mib: u64,
    replicated: Vec<usize>,
    levels: Vec<LevelReplayed>,
    /// Of all workers.
    fetched_bytes: u64,
    unchanged_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
struct LevelReplayed {
    level: usize,
    /// Blocks asked for.
    asked: u64,
    /// Of them, those that were a copy or had not changed.
    hits: u64,
    /// The share of them.
    hit_rate: f64,
}

/// The run's own policy first, then each cache by itself, then copies of the levels from the coarsest on.
fn policies(args: &PlanArgs, config: &Config, spec: &BlockSpec) -> Vec<(Policy, &'static str, u64)> {
    let own = config.memory.cache_mib;
    let mut caches = vec![("none", 0)];
    for &mib in args.cache_mib.iter().filter(|&&mib| mib > 0) {
        caches.extend([("kept", mib), ("lru", mib)]);
    }
    let policy = |(name, mib): (&'static str, u64), replicated: Vec<usize>| {
        let bytes = mib.saturating_mul(1 << 20);
        let cache = match (name, mib) {
            (_, 0) => Cache::None,
            ("lru", _) => Cache::Lru(bytes),
            _ => Cache::Kept(bytes),
        };
        (Policy { cache, replicated }, name, mib)
    };
    let own_cache = if own == 0 { ("none", 0) } else { ("kept", own) };
    let mut policies = vec![policy(own_cache, config.memory.replicated.clone())];
    policies.extend(caches.into_iter().map(|cache| policy(cache, vec![])));
    let with_memory: Vec<usize> = spec.levels().collect();
    policies.extend((1..=with_memory.len()).map(|n| policy(own_cache, with_memory[..n].to_vec())));
    let mut distinct = Vec::new();
    for found in policies {
        if !distinct.contains(&found) {
            distinct.push(found);
        }
    }
    distinct
}

/// Replays the first `steps` steps.
pub(super) fn replayed(
    args: &PlanArgs,
    config: &Config,
    (spec, corpus): (&BlockSpec, &Corpus),
    steps: u64,
) -> Result<Vec<ReplayedPlan>> {
    let named = policies(args, config, spec);
    let policies: Vec<Policy> = named.iter().map(|(policy, ..)| policy.clone()).collect();
    let found = train::replay(corpus, &config.train, spec, args.workers, (1..=steps, &policies))?;
    let plan = |((policy, cache, cache_mib), found): ((Policy, &'static str, u64), Replayed)| {
        let level = |(level, ReplayedLevel { asked, hits }): (usize, ReplayedLevel)| LevelReplayed {
            level,
            asked,
            hits,
            hit_rate: hits as f64 / (asked as f64).max(1.0),
        };
        let levels = found.levels.into_iter().enumerate().filter(|(level, _)| spec.width[*level] > 0);
        ReplayedPlan {
            cache,
            cache_mib,
            replicated: policy.replicated,
            levels: levels.map(level).collect(),
            fetched_bytes: found.fetched_bytes,
            unchanged_bytes: found.unchanged_bytes,
        }
    };
    Ok(named.into_iter().zip(found).map(plan).collect())
}

/// As a table, the run's own policy first.
pub(super) fn print(replayed: &[ReplayedPlan], steps: u64) {
    let Some(first) = replayed.first() else { return };
    println!(
        "fetched in {steps} steps with their validations and saves, by all workers; of each level the share"
    );
    println!("of the blocks asked for that were not fetched:");
    let heads: String = first.levels.iter().map(|level| format!("  level {:>2}", level.level)).collect();
    println!("  {:<12}{:<14}{heads}{:>12}{:>12}", "cache", "replicated", "GiB fetched", "unchanged");
    for plan in replayed {
        let cache = match plan.cache_mib {
            0 => "none".to_owned(),
            mib => format!("{} {mib} MiB", plan.cache),
        };
        let replicated = match &plan.replicated[..] {
            [] => "none".to_owned(),
            levels => format!("{levels:?}"),
        };
        let rates: String =
            plan.levels.iter().map(|level| format!("{:>8.1} %", level.hit_rate * 100.0)).collect();
        let gib = |bytes: u64| bytes as f64 / GIB;
        println!(
            "  {cache:<12} {replicated:<13}{rates}{:>12.3}{:>12.3}",
            gib(plan.fetched_bytes),
            gib(plan.unchanged_bytes)
        );
    }
}
