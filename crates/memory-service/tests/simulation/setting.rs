//! What a run is about: drawn from its seed, and the same for the reference.

use std::collections::BTreeMap;

use cluster_tree::ClusterId;
use memory_bank::{AdamW, Block, BlockSpec, Placement, Schedule, ShardOptions};
use memory_service::Identity;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub(crate) const BANK: &str = "bank";

#[derive(Clone, Debug)]
pub(crate) struct Setting {
    pub(crate) seed: u64,
    pub(crate) n_shards: usize,
    pub(crate) world_size: usize,
    pub(crate) staleness: u64,
    pub(crate) n_steps: u64,
    pub(crate) save_every: u64,
    pub(crate) spec: BlockSpec,
}

impl Setting {
    pub(crate) fn draw(seed: u64) -> Self {
        let mut dice = dice(seed, "setting");
        // In some runs a block of the first level takes three messages.
        let (n_layers, d_model, width) =
            if dice.random_bool(0.2) { (4, 64, vec![96, 0, 2]) } else { (2, 5, vec![3, 0, 2]) };
        Self {
            seed,
            n_shards: dice.random_range(1..=3),
            world_size: dice.random_range(1..=3),
            staleness: dice.random_range(0..=2),
            n_steps: dice.random_range(8..=30),
            save_every: dice.random_range(1..=4),
            spec: BlockSpec::ffn(n_layers, d_model, width, vec![2, 3, 2]),
        }
    }

    pub(crate) fn shard_options(&self, placement: Placement) -> ShardOptions {
        let schedule = Schedule { peak: 0.02, floor: 0.002, warmup_steps: 3, total_steps: 10 };
        let (beta1, beta2, clip) = (0.9, 0.95, Some(1.0));
        let adamw = AdamW { schedule, beta1, beta2, eps: 1e-8, weight_decay: 0.1, clip };
        let Self { world_size, staleness, .. } = *self;
        ShardOptions { seed: 7, adamw, world_size, staleness, placement }
    }

    fn hashes() -> BTreeMap<String, String> {
        BTreeMap::from([("tree".to_owned(), "a1".to_owned()), ("anchor".to_owned(), "b2".to_owned())])
    }

    /// As clients and servers name the bank.
    pub(crate) fn identity(&self) -> Identity {
        Identity::new(BANK, &self.spec, Self::hashes())
    }

    /// As its files name it.
    pub(crate) fn files_identity(&self) -> memory_bank::Identity {
        memory_bank::Identity { spec: self.spec.clone(), seed: 7, hashes: Self::hashes() }
    }

    /// Every block, the generic ones too.
    pub(crate) fn all_ids(&self) -> Vec<ClusterId> {
        let id = |level, index| ClusterId { level, index };
        let clusters = (0..2).map(|index| id(0, index)).chain((0..12).map(|index| id(2, index)));
        clusters.chain([id(0, ClusterId::GENERIC), id(2, ClusterId::GENERIC)]).collect()
    }

    /// The blocks that a rank's batch of a step is about: at times none at all.
    pub(crate) fn touched(&self, step: u64, rank: usize) -> Vec<ClusterId> {
        let mut dice = dice(self.seed ^ step << 32 ^ (rank as u64) << 48, "touched");
        let share = [0.0, 0.1, 0.3, 0.3, 0.3, 0.9][dice.random_range(0..6)];
        self.all_ids().into_iter().filter(|_| dice.random_bool(share)).collect()
    }

    /// What a rank makes of the blocks it has fetched. Where training is synchronous the gradients depend
    /// on the weights, so that one wrong bit is never forgotten; with staleness, which weights are
    /// fetched depends on who comes first, so there they do not.
    pub(crate) fn gradients(&self, step: u64, rank: usize, fetched: &[Block]) -> Vec<Block> {
        let share = if self.staleness == 0 { 0.25 } else { 0.0 };
        let gradient = |block: &Block| {
            let place = u64::from(block.id.index) ^ u64::from(block.id.level) << 32;
            let start = mix(self.seed ^ mix(step << 8 ^ rank as u64) ^ mix(place));
            let noise = |i: usize| (mix(start ^ i as u64) >> 40) as f32 / (1 << 23) as f32 - 1.0;
            let values = block.values.iter().enumerate().map(|(i, weight)| noise(i) + share * weight);
            Block { id: block.id, values: values.collect() }
        };
        fetched.iter().map(gradient).collect()
    }
}

/// Random numbers of their own for each purpose.
pub(crate) fn dice(seed: u64, purpose: &str) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let name = purpose.as_bytes();
    key[16..16 + name.len()].copy_from_slice(name);
    ChaCha8Rng::from_seed(key)
}

/// The finaliser of SplitMix64.
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
