//! Saves and removals that break at every one of their operations.

use std::sync::Arc;

use memory_bank::{BankStore, Step, StoreOptions, verify_checkpoint};
use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use object_store::path::Path;

use crate::faulty::{FAULTS, Fault, Faulty};
use crate::shards::{Shards, expected, in_memory, open, small_parts};
use crate::support::run;

async fn open_faulty(inner: &Arc<dyn ObjectStore>, fault: Fault) -> (Arc<Faulty>, BankStore) {
    let faulty = Arc::new(Faulty::new(Arc::clone(inner), fault));
    let store: Arc<dyn ObjectStore> = Arc::clone(&faulty) as _;
    (faulty, open(&store, small_parts()).await)
}

/// Fails unless the newest save is whole: every file, every block.
async fn newest(store: &BankStore) -> Step {
    let newest = store.latest().await.unwrap().expect("a save");
    verify_checkpoint(&newest).await.unwrap();
    assert_eq!(Shards::restored(&newest, 3).await.state(), expected(newest.step().0));
    newest.step()
}

/// Saves step 2, then step 5 with a fault at operation `k`. Returns whether there was one.
async fn broken_save(inner: Arc<dyn ObjectStore>, fault: Fault, k: i64) -> bool {
    let healthy = open(&inner, small_parts()).await;
    let mut shards = Shards::new(2);
    shards.train(2);
    shards.save(&healthy).await.unwrap();
    shards.train(5);

    let (faulty, store) = open_faulty(&inner, fault).await;
    faulty.arm(k);
    let saved = shards.save(&store).await;
    let found = newest(&healthy).await;
    assert!(found == Step(5) || (found == Step(2) && saved.is_err()), "{fault:?} at {k}: {found}");
    verify_checkpoint(&healthy.checkpoint(Step(2)).await.unwrap()).await.unwrap();

    shards.save(&healthy).await.unwrap_or_else(|error| panic!("{fault:?} at {k}: {error}"));
    assert_eq!(newest(&healthy).await, Step(5));
    // What the broken save left goes once there is a newer one.
    shards.train(6);
    shards.save(&healthy).await.unwrap();
    healthy.keep(1).await.unwrap();
    assert_eq!(newest(&healthy).await, Step(6));
    faulty.has_struck()
}

#[test]
fn a_save_broken_at_any_operation_leaves_the_old_or_the_new_one_whole() {
    run(async {
        for fault in FAULTS {
            let mut k = 0;
            while broken_save(in_memory(), fault, k).await {
                k += 1;
            }
            // Two shards of two files of several parts, the manifest, and the looks before it.
            assert!(k > 20, "{fault:?}: only {k} operations");
        }
    });
}

#[test]
fn a_local_save_broken_at_any_operation_leaves_the_old_or_the_new_one_whole() {
    run(async {
        for fault in [Fault::Kill, Fault::LoseAnswer, Fault::Tear] {
            let mut k = 0;
            loop {
                let root = tempfile::tempdir().unwrap();
                let store = LocalFileSystem::new_with_prefix(root.path()).unwrap();
                if !broken_save(Arc::new(store), fault, k).await {
                    break;
                }
                k += 3;
            }
        }
    });
}

#[test]
fn keeping_some_saves_never_breaks_one_of_them_even_when_killed() {
    run(async {
        for fault in [Fault::Kill, Fault::LoseAnswer] {
            for k in 0.. {
                let inner = in_memory();
                let healthy = open(&inner, small_parts()).await;
                let mut shards = Shards::new(2);
                for step in 1..=6 {
                    shards.train(step);
                    shards.save(&healthy).await.unwrap();
                }
                // A save that was killed before its manifest, and one that is at work.
                let aside = Shards::new(2);
                aside.train(4);
                let orphans = aside.write(&healthy).await.unwrap();
                shards.train(7);
                let at_work = shards.write(&healthy).await.unwrap();

                let (faulty, store) = open_faulty(&inner, fault).await;
                faulty.arm(k);
                let kept = store.keep(2).await;
                assert_eq!(kept.is_ok(), !faulty.has_struck());
                for step in [5, 6] {
                    let checkpoint = healthy.checkpoint(Step(step)).await.unwrap();
                    verify_checkpoint(&checkpoint).await.unwrap();
                    assert_eq!(Shards::restored(&checkpoint, 1).await.state(), expected(step));
                }
                healthy.keep(2).await.unwrap();
                assert_eq!(healthy.steps().await.unwrap(), [Step(5), Step(6)]);
                let head = |path: &str| {
                    let (inner, path) = (Arc::clone(&inner), Path::from(format!("banks/facts/{path}")));
                    async move { object_store::ObjectStoreExt::head(&inner, &path).await }
                };
                for orphan in orphans.iter().flat_map(|record| &record.segments) {
                    assert!(head(&orphan.values.path).await.is_err(), "{}", orphan.values.path);
                }
                healthy.commit(Step(7), &at_work).await.unwrap();
                assert_eq!(newest(&healthy).await, Step(7));
                if !faulty.has_struck() {
                    assert!(k > 10, "only {k} operations");
                    break;
                }
            }
        }
    });
}

/// A killed upload leaves a staged file that the store does not list.
#[test]
fn leftovers_of_killed_local_uploads_are_swept() {
    let root = tempfile::tempdir().unwrap();
    run(async {
        let url = root.path().to_str().unwrap();
        let store = BankStore::open_url(url, &[], "facts", StoreOptions::default()).await.unwrap();
        let mut shards = Shards::new(1);
        for step in 1..=3 {
            shards.train(step);
            shards.save(&store).await.unwrap();
            let folder = root.path().join(format!("facts/{step:08}"));
            std::fs::write(folder.join("shard.values.safetensors#1"), "half").unwrap();
        }
        std::fs::create_dir(root.path().join("facts/00000000")).unwrap();
        let pruned = store.keep(1).await.unwrap();
        assert_eq!(pruned.steps, [Step(1), Step(2)]);
        assert!(!root.path().join("facts/00000000").exists());
        assert!(!root.path().join("facts/00000002/shard.values.safetensors#1").exists());
        // An upload of the newest step may be at work.
        assert!(root.path().join("facts/00000003/shard.values.safetensors#1").exists());
        assert_eq!(newest(&store).await, Step(3));
    });
}
