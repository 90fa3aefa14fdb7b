//! What a step moves between workers and shards: counted in the batches that the sampler makes, or expected
//! of a tree's clusters.

use std::collections::BTreeMap;

use cluster_tree::ClusterPath;
use corpus::Corpus;
use memory_bank::BlockSpec;

use crate::loader::Batches;
use crate::share::Share;
use crate::{Result, TrainConfig};

/// Blocks of one level, in one step of all workers.
#[derive(Copy, Clone, PartialEq, Debug, Default)]
pub struct LevelTraffic {
    /// Different blocks, over all workers.
    pub unique: f64,
    /// Different blocks of each worker, summed over the workers: what is fetched.
    pub by_worker: f64,
}

/// The traffic of a step by level, as the batches of `steps` steps have it on average.
///
/// # Errors
/// Those of the corpus.
pub fn simulated(
    corpus: &Corpus,
    config: &TrainConfig,
    spec: &BlockSpec,
    world_size: usize,
    steps: std::ops::RangeInclusive<u64>,
) -> Result<Vec<LevelTraffic>> {
    let mut sum = vec![LevelTraffic::default(); spec.n_levels()];
    let n_steps = steps.clone().count() as f64;
    let mut batches = Batches::new(corpus, config);
    for step in steps {
        let share = Share::new(&batches.of(step)?, config, Some(spec), (0, world_size));
        for (id, n_workers) in share.touched() {
            let level = &mut sum[usize::from(id.level)];
            level.unique += 1.0 / n_steps;
            level.by_worker += n_workers as f64 / n_steps;
        }
    }
    Ok(sum)
}

/// The share of training sequences in each cluster of each level, of the first `most`.
///
/// # Errors
/// Those of the corpus.
pub fn cluster_shares(corpus: &Corpus, config: &TrainConfig, most: u64) -> Result<Vec<Vec<f64>>> {
    let n = corpus.n_sequences().min(most);
    let mut counts: Vec<BTreeMap<u32, u64>> = vec![];
    for index in 0..n {
        let path: ClusterPath = corpus.sequence(config.seed, index)?.path;
        counts.resize_with(path.n_levels(), Default::default);
        for (level, id) in path.ids().enumerate() {
            *counts[level].entry(id.index).or_default() += 1;
        }
    }
    let shares =
        |level: BTreeMap<u32, u64>| level.into_values().map(|count| count as f64 / n as f64).collect();
    Ok(counts.into_iter().map(shares).collect())
}

/// The shares of a tree whose clusters are all as large as their siblings.
pub fn even_shares(spec: &BlockSpec) -> Vec<Vec<f64>> {
    (0..spec.n_levels()).map(|level| vec![1.0 / spec.n_blocks(level) as f64; spec.n_blocks(level)]).collect()
}

/// The traffic that a step of `batch_size` sequences is expected to have, drawn independently from clusters
/// of these shares, `generic_share` of them with the generic path. Of a cluster with share p, a block is
/// among those of n sequences with probability 1 - (1 - p)^n. Workers take ranges of the sequences ordered
/// by path, so a block is fetched once more for every border between two workers that falls into it: of
/// n - 1 borders between neighbours, n - unique do.
pub fn expected(
    config: &TrainConfig,
    spec: &BlockSpec,
    shares: &[Vec<f64>],
    world_size: usize,
) -> Vec<LevelTraffic> {
    let n = config.batch_size as f64;
    let among = |share: f64| 1.0 - (1.0 - share).powf(n);
    let level = |(level, shares): (usize, &Vec<f64>)| {
        if spec.width[level] == 0 {
            return LevelTraffic::default();
        }
        let of_path = |share: &f64| among(share * (1.0 - config.generic_share));
        let unique = shares.iter().map(of_path).sum::<f64>() + among(config.generic_share);
        let borders = (world_size - 1) as f64 * (n - unique) / (n - 1.0).max(1.0);
        LevelTraffic { unique, by_worker: unique + borders }
    };
    shares.iter().enumerate().map(level).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The figures of arXiv 2510.02375 §5 at a batch of 1,024: all of level 1, nearly all of level 2, a fifth
    /// of level 3.
    #[test]
    fn a_step_touches_the_coarse_levels_whole_and_the_deep_ones_in_part() {
        let spec = BlockSpec::ffn(35, 512, vec![256, 64, 16, 0], vec![16; 4]);
        let config = TrainConfig { batch_size: 1024, generic_share: 0.0, ..TrainConfig::default() };
        let levels = expected(&config, &spec, &even_shares(&spec), 1);
        let round: Vec<u64> = levels.iter().map(|level| level.unique.round() as u64).collect();
        assert_eq!(round, [16, 251, 906, 0]);
        // Eight workers fetch each coarse block hardly more often than once a worker that needs it.
        let levels = expected(&config, &spec, &even_shares(&spec), 8);
        assert!((levels[0].by_worker - (16.0 + 7.0 * 1008.0 / 1023.0)).abs() < 1e-6);
    }
}
