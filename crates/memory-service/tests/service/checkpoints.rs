//! Banks saved by their shards, and brought back by others.

use std::sync::Arc;

use memory_bank::{BankStore, BlockStore, Placement, Step, StoreOptions};
use memory_service::{RemoteBank, StoreOfBank};
use object_store::memory::InMemory;
use object_store::path::Path;

use crate::support::{
    Served, all_ids, bits, gradients, identity, options, reference, remote, serve_options, spec,
};

pub(crate) async fn store(objects: &Arc<InMemory>) -> StoreOfBank {
    let objects = Arc::clone(objects);
    let store =
        BankStore::open(objects, &Path::from("banks"), "bank", StoreOptions::default()).await.unwrap();
    let identity = memory_bank::Identity { spec: spec(), seed: 7, hashes: identity().hashes };
    StoreOfBank { store, identity, keep: 2, base: None }
}

async fn shards(n_shards: usize, objects: &Arc<InMemory>) -> Vec<Served> {
    let mut served = Vec::new();
    for shard in 0..n_shards {
        let mut serving = serve_options();
        serving.store = Some(store(objects).await);
        served.push(Served::start(options(1, Placement { shard, n_shards }), serving).await);
    }
    served
}

async fn push(bank: &RemoteBank, steps: std::ops::RangeInclusive<u64>) {
    for step in steps {
        bank.push(Step(step), 0, gradients(step, 0)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bank_goes_on_after_a_save_on_any_number_of_shards() {
    let expected = bits(&reference(9, 1));
    for (before, after) in [(1, 3), (3, 1), (2, 2)] {
        let objects = Arc::new(InMemory::new());
        let served = shards(before, &objects).await;
        let bank = RemoteBank::connect(remote(&served)).await.unwrap();
        push(&bank, 1..=4).await;
        bank.save(Step(4)).await.unwrap();
        push(&bank, 5..=6).await;
        // The second save writes only what was updated since, and is not finished before the next step.
        let save = bank.begin_save(Step(6)).await.unwrap();
        push(&bank, 7..=7).await;
        save.finish().await.unwrap();
        served.into_iter().for_each(Served::kill);

        let served = shards(after, &objects).await;
        let bank = RemoteBank::connect(remote(&served)).await.unwrap();
        assert_eq!(bank.restore(None).await.unwrap(), Step(6));
        assert_eq!(bank.applied().await.unwrap(), vec![Step(6); after]);
        let found = bank.fetch(Step(6), &all_ids()).await.unwrap();
        assert!(bits(&found) == bits(&reference(6, 1)), "{before} to {after} shards");
        // Back further: what came after is given up, and done again to the same bits.
        assert_eq!(bank.restore(Some(Step(4))).await.unwrap(), Step(4));
        push(&bank, 5..=9).await;
        bank.save(Step(9)).await.unwrap();
        let found = bank.fetch(Step(9), &all_ids()).await.unwrap();
        assert!(bits(&found) == expected, "{before} to {after} shards");
        let steps = store(&objects).await.store.steps().await.unwrap();
        assert_eq!(steps, [Step(4), Step(9)]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_save_that_nobody_finishes_makes_no_checkpoint() {
    let objects = Arc::new(InMemory::new());
    let served = shards(2, &objects).await;
    let bank = RemoteBank::connect(remote(&served)).await.unwrap();
    push(&bank, 1..=1).await;
    bank.save(Step(1)).await.unwrap();
    push(&bank, 2..=2).await;
    drop(bank.begin_save(Step(2)).await.unwrap());
    push(&bank, 3..=3).await;
    bank.save(Step(3)).await.unwrap();
    let store = store(&objects).await.store;
    assert_eq!(store.steps().await.unwrap(), [Step(1), Step(3)]);
    // What the third save left out is in the first, not in the one that is no checkpoint.
    assert_eq!(bank.restore(Some(Step(3))).await.unwrap(), Step(3));
    assert!(bits(&bank.fetch(Step(3), &all_ids()).await.unwrap()) == bits(&reference(3, 1)));
    let error = bank.restore(Some(Step(2))).await.unwrap_err().to_string();
    // All are told at once; the first one to answer is named.
    let is_named = served.iter().any(|served| error.contains(&served.address));
    assert!(is_named && error.contains("00000002"), "{error}");
    let error = bank.save(Step(1)).await.unwrap_err().to_string();
    assert!(error.contains("save of step 1, but the bank is at step 3"), "{error}");
}
