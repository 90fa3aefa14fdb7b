//! A bank of several shards, saved to an object store.

use std::collections::BTreeMap;
use std::sync::Arc;

use cluster_tree::ClusterId;
use memory_bank::{
    Array, BankStore, Block, Checkpoint, Gradients, Identity, Live, Placement, Shard, ShardOptions,
    ShardRecord, Step, StoreOptions,
};
use object_store::ObjectStore;
use object_store::memory::InMemory;
use object_store::path::Path;

use crate::support::{adamw, gradients, spec};

pub(crate) fn identity() -> Identity {
    let hashes = [("tree", "a1"), ("tokenizer", "b2")].map(|(key, hash)| (key.to_owned(), hash.to_owned()));
    Identity { spec: spec(), seed: 7, hashes: BTreeMap::from(hashes) }
}

pub(crate) fn shard_options(shard: usize, n_shards: usize) -> ShardOptions {
    let placement = Placement { shard, n_shards };
    ShardOptions { seed: 7, adamw: adamw(), world_size: 1, staleness: 0, placement }
}

/// Parts so small that files of a few thousand bytes have several.
pub(crate) fn small_parts() -> StoreOptions {
    StoreOptions { part_bytes: 1024, parts_in_flight: 3, ..StoreOptions::default() }
}

pub(crate) fn in_memory() -> Arc<dyn ObjectStore> {
    Arc::new(InMemory::new())
}

pub(crate) async fn open(store: &Arc<dyn ObjectStore>, options: StoreOptions) -> BankStore {
    BankStore::open(Arc::clone(store), &Path::from("banks"), "facts", options).await.unwrap()
}

/// All shards of a bank, with the records of their last committed saves.
pub(crate) struct Shards {
    pub(crate) live: Vec<Live>,
    pub(crate) records: Vec<Option<ShardRecord>>,
}

impl Shards {
    pub(crate) fn new(n_shards: usize) -> Self {
        let live = |shard| Live::new(Shard::new(spec(), shard_options(shard, n_shards)).unwrap());
        Self { live: (0..n_shards).map(live).collect(), records: vec![None; n_shards] }
    }

    pub(crate) async fn restored(checkpoint: &Checkpoint, n_shards: usize) -> Self {
        let (mut live, mut records) = (Vec::new(), Vec::new());
        for shard in 0..n_shards {
            let options = shard_options(shard, n_shards);
            live.push(Live::new(checkpoint.load(&identity(), options).await.unwrap()));
            records.push(checkpoint.record(options.placement));
        }
        Self { live, records }
    }

    /// Trains from the step after the last to `to`, by the gradients of [`gradients`].
    pub(crate) fn train(&self, to: u64) {
        self.train_by(to, |step| gradients(step, 0));
    }

    pub(crate) fn train_by(&self, to: u64, gradients: impl Fn(u64) -> Vec<Block>) {
        for (shard, live) in self.live.iter().enumerate() {
            let placement = Placement { shard, n_shards: self.live.len() };
            for step in live.applied().0 + 1..=to {
                let own = gradients(step).into_iter().filter(|block| placement.owns(block.id)).collect();
                live.push(Step(step), 0, Gradients::new(&spec(), own).unwrap()).unwrap();
            }
        }
    }

    /// What each shard has written of the step that it is at.
    pub(crate) async fn write(&self, store: &BankStore) -> memory_bank::Result<Vec<ShardRecord>> {
        let mut written = Vec::new();
        for (live, base) in self.live.iter().zip(&self.records) {
            let snapshot = live.snapshot(live.applied(), Step(0)).unwrap();
            written.push(store.write(&identity(), snapshot, base.as_ref()).await?);
        }
        Ok(written)
    }

    pub(crate) async fn save(&mut self, store: &BankStore) -> memory_bank::Result<Checkpoint> {
        let written = self.write(store).await?;
        let checkpoint = store.commit(self.live[0].applied(), &written).await?;
        self.records = written.into_iter().map(Some).collect();
        Ok(checkpoint)
    }

    /// Weights, moments and numbers of updates of every updated block, in bits.
    pub(crate) fn state(&self) -> BTreeMap<ClusterId, (u64, [Vec<u32>; 3])> {
        let snapshots = self.live.iter().map(|live| live.snapshot(live.applied(), Step(0)).unwrap());
        let rows = snapshots.flat_map(|snapshot| snapshot.rows);
        let bits = |array: &Array| array.read().unwrap().iter().map(|value| value.to_bits()).collect();
        rows.map(|(id, row)| (id, (row.steps, [&row.values, &row.m, &row.v].map(bits)))).collect()
    }
}

/// The state of a bank that was never saved, at a step.
pub(crate) fn expected(step: u64) -> BTreeMap<ClusterId, (u64, [Vec<u32>; 3])> {
    let shards = Shards::new(1);
    shards.train(step);
    shards.state()
}
