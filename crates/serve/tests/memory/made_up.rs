//! A made-up tree of 2 × 3 leaves in the plane, and banks of it on disk.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cluster_tree::{ClusterId, ClusterTree, Level};
use memory_bank::{
    AdamW, BankOptions, Block, BlockSpec, BlockStore, Identity, LocalBank, Schedule, Step, TierOptions,
};
use serve::memory::BankSource;

/// Leaves 0 to 2 below cluster 0 at (1, −0.1 … 0.1), 3 to 5 below cluster 1 at (−1, −0.1 … 0.1); leaf 5 is empty.
pub(crate) fn tree() -> Arc<ClusterTree> {
    let top = Level { branching: 2, centroids: vec![1.0, 0.0, -1.0, 0.0], counts: vec![30, 20] };
    let row = |x: f32| [-0.1, 0.0, 0.1].into_iter().flat_map(move |y| [x, y]);
    let centroids = row(1.0).chain(row(-1.0)).collect();
    let leaves = Level { branching: 3, centroids, counts: vec![10, 10, 10, 10, 10, 0] };
    Arc::new(ClusterTree::new(2, vec![top, leaves]).unwrap())
}

pub(crate) fn spec() -> BlockSpec {
    BlockSpec::ffn(2, 8, vec![4, 2], vec![2, 3])
}

pub(crate) fn identity() -> Identity {
    let hashes =
        BTreeMap::from([("tree".to_owned(), tree().hash()), ("tokenizer".to_owned(), "t".to_owned())]);
    Identity { spec: spec(), seed: 7, hashes }
}

/// A bank that has taken so many steps, each of which updates these blocks; returns its `memory` folder.
pub(crate) async fn save(root: &Path, identity: &Identity, n_steps: u64, blocks: &[ClusterId]) -> PathBuf {
    let schedule = Schedule { peak: 0.02, floor: 0.002, warmup_steps: 1, total_steps: 10 };
    let options = BankOptions {
        seed: identity.seed,
        adamw: AdamW { schedule, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, clip: None },
        world_size: 1,
        staleness: 0,
        checkpoint_root: root.to_owned(),
        hashes: identity.hashes.clone(),
        offload: None,
    };
    let bank = LocalBank::create(identity.spec.clone(), options).unwrap();
    for step in 1..=n_steps {
        let gradient = |&id: &ClusterId| {
            let len = identity.spec.block_len(usize::from(id.level));
            Block { id, values: (0..len).map(|i| (i as f32 + step as f32).sin()).collect() }
        };
        bank.push(Step(step), 0, blocks.iter().map(gradient).collect()).await.unwrap();
    }
    bank.save(Step(n_steps)).await.unwrap();
    root.join(format!("{n_steps:08}/memory"))
}

pub(crate) fn id(level: u8, index: u32) -> ClusterId {
    ClusterId { level, index }
}

pub(crate) fn folder(path: &Path) -> BankSource {
    BankSource { folder: Some(path.to_owned()), step: None, tiers: TierOptions::default() }
}
