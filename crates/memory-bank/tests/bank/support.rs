use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;

use cluster_tree::ClusterId;
use memory_bank::{AdamW, BankOptions, Block, BlockSpec, BlockStore, LocalBank, Schedule, Step};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Three levels, the middle one without memory: 2, 6 and 12 clusters.
pub(crate) fn spec() -> BlockSpec {
    BlockSpec::ffn(2, 5, vec![3, 0, 2], vec![2, 3, 2])
}

pub(crate) fn adamw() -> AdamW {
    let schedule = Schedule { peak: 0.02, floor: 0.002, warmup_steps: 3, total_steps: 10 };
    AdamW { schedule, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: None }
}

pub(crate) fn options(world_size: usize, root: &Path) -> BankOptions {
    let hashes =
        BTreeMap::from([("tree".to_owned(), "a1".to_owned()), ("tokenizer".to_owned(), "b2".to_owned())]);
    BankOptions {
        seed: 7,
        adamw: adamw(),
        world_size,
        staleness: 0,
        checkpoint_root: root.to_owned(),
        hashes,
        offload: None,
    }
}

/// A bank that is never saved.
pub(crate) fn bank(world_size: usize) -> LocalBank {
    LocalBank::create(spec(), options(world_size, Path::new("/nonexistent"))).unwrap()
}

pub(crate) fn id(level: u8, index: u32) -> ClusterId {
    ClusterId { level, index }
}

/// Every block of [`spec`], the generic ones too.
pub(crate) fn all_ids() -> Vec<ClusterId> {
    let clusters = (0..2).map(|index| id(0, index)).chain((0..12).map(|index| id(2, index)));
    clusters.chain([id(0, ClusterId::GENERIC), id(2, ClusterId::GENERIC)]).collect()
}

/// A gradient of standard size for a block.
pub(crate) fn gradient(id: ClusterId, seed: u64) -> Block {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ u64::from(id.index) << 20 ^ u64::from(id.level) << 60);
    let len = spec().block_len(usize::from(id.level));
    Block { id, values: (0..len).map(|_| rng.random_range(-1.0f32..1.0)).collect() }
}

/// What a rank pushes in a step: some blocks of each level, now and then the generic ones, and
/// nothing at all in step 3.
pub(crate) fn gradients(step: u64, rank: usize) -> Vec<Block> {
    if step == 3 {
        return Vec::new();
    }
    let seed = step * 100 + rank as u64;
    let touched = |id: &ClusterId| (u64::from(id.index) + step + rank as u64).is_multiple_of(3);
    all_ids().into_iter().filter(touched).map(|id| gradient(id, seed)).collect()
}

/// Runs a future on a runtime of its own.
pub(crate) fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap().block_on(future)
}

pub(crate) async fn blocks(bank: &LocalBank) -> Vec<Block> {
    bank.fetch(bank.applied(), &all_ids()).await.unwrap()
}

/// The bits of every weight: equality of floats would take 0 and −0 for the same.
pub(crate) fn bits(blocks: &[Block]) -> Vec<(ClusterId, Vec<u32>)> {
    blocks
        .iter()
        .map(|block| (block.id, block.values.iter().map(|value| value.to_bits()).collect()))
        .collect()
}

/// Trains a bank of one rank from the step after `from` to `to`.
pub(crate) async fn train(bank: &LocalBank, from: u64, to: u64) {
    for step in from + 1..=to {
        bank.push(Step(step), 0, gradients(step, 0)).await.unwrap();
    }
}
