//! Saves of many shards: restored on other numbers of them, built on each other, raced for.

use std::sync::Arc;

use cluster_tree::ClusterId;
use memory_bank::{
    Access, Array, BankStore, Block, BlockStore, Error, MappedBank, Placement, ShardRecord, Step, StoreBank,
    StoreOptions, init_block, verify_checkpoint,
};

use crate::shards::{Shards, expected, identity, in_memory, open, shard_options, small_parts};
use crate::support::{all_ids, bits, gradient, id, run, spec};

#[test]
fn any_number_of_shards_is_restored_on_any_other_to_the_bit() {
    run(async {
        let last = expected(8);
        for from in [1, 2, 3, 5] {
            let store = open(&in_memory(), small_parts()).await;
            let mut shards = Shards::new(from);
            // The second save is built on the first.
            for step in [2, 4] {
                shards.train(step);
                shards.save(&store).await.unwrap();
            }
            for to in [1, 2, 3, 5] {
                let checkpoint = store.latest().await.unwrap().unwrap();
                let mut restored = Shards::restored(&checkpoint, to).await;
                assert_eq!(restored.state(), expected(4), "{from} to {to}");
                restored.train(8);
                assert_eq!(restored.state(), last, "{from} to {to}");
                // And saved again, in another bank.
                let again = open(&in_memory(), small_parts()).await;
                let saved = restored.save(&again).await.unwrap();
                verify_checkpoint(&saved).await.unwrap();
                assert_eq!(Shards::restored(&saved, from).await.state(), last);
            }
        }
    });
}

#[test]
fn a_save_that_builds_on_others_is_a_full_one_to_the_bit() {
    run(async {
        let (chained, full) =
            (open(&in_memory(), small_parts()).await, open(&in_memory(), small_parts()).await);
        let (mut shards, mut anew) = (Shards::new(2), Shards::new(2));
        for step in 1..=6 {
            shards.train(step);
            anew.train(step);
            anew.records = vec![None; 2];
            let (a, b) = (shards.save(&chained).await.unwrap(), anew.save(&full).await.unwrap());
            verify_checkpoint(&a).await.unwrap();
            assert_eq!(Shards::restored(&a, 3).await.state(), Shards::restored(&b, 3).await.state());
            assert_eq!(a.manifest().touched, b.manifest().touched);
            assert!(b.manifest().segments.iter().all(|segment| segment.step == Step(step)));
            if step == 2 {
                // Step 2 touches other blocks than step 1, and only those are written.
                let rows = |step| -> u64 {
                    let segments = a.manifest().segments.iter().filter(|segment| segment.step == Step(step));
                    segments.flat_map(|segment| &segment.rows).sum()
                };
                let touched: u64 = a.manifest().touched.iter().sum();
                assert!(rows(1) > 0 && rows(2) > 0 && rows(1) + rows(2) == touched);
            }
            if step == 3 {
                // Nobody pushes anything in step 3, and nothing is written.
                assert!(a.manifest().segments.iter().all(|segment| segment.step < Step(3)));
            }
        }
    });
}

#[test]
fn a_chain_ends_when_it_is_long_or_mostly_dead() {
    run(async {
        let options = StoreOptions { max_chain: 3, ..small_parts() };
        let store = open(&in_memory(), options).await;
        let mut shards = Shards::new(1);
        let mut chains = Vec::new();
        for step in 1..=7 {
            // One block, another each time: nothing dies.
            shards.train_by(step, |step| vec![gradient(id(2, step as u32), step)]);
            chains.push(shards.save(&store).await.unwrap().manifest().segments.len());
        }
        assert_eq!(chains, [1, 2, 3, 1, 2, 3, 1]);

        let store = open(&in_memory(), StoreOptions { max_chain: 100, ..small_parts() }).await;
        let mut shards = Shards::new(1);
        let mut chains = Vec::new();
        for step in 1..=7 {
            // The same block each time: from the third save on, more is dead than alive.
            shards.train_by(step, |step| vec![gradient(id(2, 1), step)]);
            chains.push(shards.save(&store).await.unwrap().manifest().segments.len());
        }
        assert_eq!(chains, [1, 2, 1, 2, 1, 2, 1]);
    });
}

#[test]
fn large_saves_are_divided() {
    run(async {
        // Four blocks of level 2 have 960 bytes; one of level 0 has 360.
        let options = StoreOptions { max_segment_bytes: 960, ..small_parts() };
        let store = open(&in_memory(), options).await;
        let mut shards = Shards::new(1);
        shards.train(2);
        let saved = shards.save(&store).await.unwrap();
        assert!(saved.manifest().segments.len() >= 3);
        verify_checkpoint(&saved).await.unwrap();
        assert_eq!(Shards::restored(&saved, 2).await.state(), expected(2));
    });
}

/// A base that is not the shard's own saves nothing wrong: all is written.
#[test]
fn a_foreign_base_is_not_built_on() {
    run(async {
        let store = open(&in_memory(), small_parts()).await;
        let mut shards = Shards::new(1);
        shards.train(1);
        shards.save(&store).await.unwrap();
        // Other blocks in step 1, and one in step 2: little to write if it could be built on step 1.
        let other = Shards::new(1);
        other.train_by(1, |step| [0, 1, 3, 4, 6, 7, 9, 10].map(|i| gradient(id(2, i), step)).to_vec());
        other.train_by(2, |step| vec![gradient(id(2, 7), step)]);
        let snapshot = || other.live[0].snapshot(Step(2), Step(0)).unwrap();
        let mut base = other.write(&store).await.unwrap().remove(0);
        // A record of a save that was never committed, and one of another content than the committed.
        for step in [Step(2), Step(1)] {
            base.step = step;
            let record = store.write(&identity(), snapshot(), Some(&base)).await.unwrap();
            assert_eq!(record.segments.len(), 1);
            assert_eq!((record.segments[0].step, &record.segments[0].rows), (Step(2), &vec![0, 0, 8]));
        }
    });
}

#[test]
fn committers_of_one_save_all_succeed_and_of_two_one_does() {
    run(async {
        for _ in 0..20 {
            let store = open(&in_memory(), small_parts()).await;
            let commit = |records: Vec<ShardRecord>| {
                let store = store.clone();
                tokio::spawn(async move { store.commit(Step(2), &records).await.map(|_| ()) })
            };
            let shards = Shards::new(2);
            shards.train(2);
            // The same content under two names.
            let (first, second) = (shards.write(&store).await.unwrap(), shards.write(&store).await.unwrap());
            assert_ne!(first, second);
            let racers: Vec<_> =
                (0..8).flat_map(|_| [commit(first.clone()), commit(second.clone())]).collect();
            for racer in racers {
                racer.await.unwrap().unwrap();
            }
            let other = Shards::new(2);
            other.train_by(2, |step| vec![gradient(id(2, 7), step)]);
            let other = other.write(&store).await.unwrap();
            let text = store.commit(Step(2), &other).await.unwrap_err().to_string();
            assert!(text.contains("00000002/manifest.json: a manifest of sha256 "), "{text}");
            assert!(text.contains(" is there, expected this save's of sha256 "), "{text}");

            store.discard_after(Step(0)).await.unwrap();
            let (a, b) = (commit(first), commit(other));
            let (a, b) = (a.await.unwrap(), b.await.unwrap());
            assert!(a.is_ok() != b.is_ok());
            assert!(matches!(a.err().or(b.err()), Some(Error::Committed { .. })));
            verify_checkpoint(&store.latest().await.unwrap().unwrap()).await.unwrap();
        }
    });
}

#[test]
fn records_that_do_not_make_a_save_are_refused() {
    run(async {
        let store = open(&in_memory(), small_parts()).await;
        let shards = Shards::new(2);
        shards.train(2);
        let records = shards.write(&store).await.unwrap();
        // They travel as JSON.
        let text = serde_json::to_string(&records).unwrap();
        assert_eq!(serde_json::from_str::<Vec<ShardRecord>>(&text).unwrap(), records);
        let error = async |edit: &dyn Fn(&mut Vec<ShardRecord>)| {
            let mut records = records.clone();
            edit(&mut records);
            let text = store.commit(Step(2), &records).await.err().unwrap().to_string();
            assert!(store.steps().await.unwrap().is_empty());
            text.split("manifest.json: ").last().unwrap().to_owned()
        };
        let text = error(&|records| records.clear()).await;
        assert_eq!(text, "number of records is 0, expected one for each shard");
        let text = error(&|records| drop(records.pop())).await;
        assert_eq!(text, "number of shards in the record of shard 0 is 2, expected 1");
        let text = error(&|records| records[1] = records[0].clone()).await;
        assert_eq!(text, "shard of the next record is 0, expected 1");
        let text = error(&|records| records[1].step = Step(3)).await;
        assert_eq!(text, "step in the record of shard 1 is 3, expected 2");
        let text = error(&|records| records[1].identity.seed = 8).await;
        assert!(text.starts_with("bank in the record of shard 1 is ") && text.contains("seed: 8"), "{text}");
        let text = error(&|records| records[0].segments[0].shard = 1).await;
        assert_eq!(text, "shard of a segment in the record of shard 0 is 1, expected 0");
        let text = error(&|records| records[0].touched[2] += 1).await;
        assert!(text.starts_with("number of touched blocks of level 2 is "), "{text}");
        // One shard's blocks under another's name.
        let swap = |records: &mut Vec<ShardRecord>| {
            let [first, second] = records.as_mut_slice() else { panic!("two records") };
            std::mem::swap(&mut first.segments, &mut second.segments);
            first.segments.iter_mut().for_each(|segment| segment.shard = 0);
            second.segments.iter_mut().for_each(|segment| segment.shard = 1);
        };
        let text = error(&swap).await;
        assert!(text.contains("shard of block "), "{text}");
        let text = error(&|records| records[0].segments[0].values.path = "00000002/none".to_owned()).await;
        assert!(text.contains("00000002/none"), "{text}");
        store.commit(Step(2), &records).await.unwrap();
    });
}

#[test]
fn a_run_that_goes_back_saves_anew() {
    run(async {
        let store = open(&in_memory(), small_parts()).await;
        let mut shards = Shards::new(2);
        for step in [1, 2, 4] {
            shards.train(step);
            shards.save(&store).await.unwrap();
        }
        let back = store.checkpoint(Step(1)).await.unwrap();
        let mut other = Shards::restored(&back, 2).await;
        assert_eq!(store.discard_after(Step(1)).await.unwrap(), [Step(2), Step(4)]);
        other.train_by(2, |step| vec![gradient(id(2, 7), step)]);
        other.save(&store).await.unwrap();
        let found = store.latest().await.unwrap().unwrap();
        assert_eq!(found.step(), Step(2));
        assert_eq!(Shards::restored(&found, 1).await.state(), other.state());
    });
}

/// All blocks by every reader, in the order asked for, some twice.
#[test]
fn readers_serve_every_block() {
    let root = tempfile::tempdir().unwrap();
    run(async {
        let url = root.path().to_str().unwrap();
        let store = BankStore::open_url(url, &[], "facts", small_parts()).await.unwrap();
        let mut shards = Shards::new(3);
        for step in [1, 2] {
            shards.train(step);
            shards.save(&store).await.unwrap();
        }
        let mut ids = all_ids();
        ids.reverse();
        ids.push(id(2, 4));
        let block = |&id: &ClusterId| {
            let placement = |shard| Placement { shard, n_shards: 3 };
            let owner = (0..3).find(|&shard| placement(shard).owns(id)).unwrap();
            Block { id, values: shards.live[owner].with(|shard| shard.block(id)).unwrap().unwrap() }
        };
        let expected: Vec<Block> = ids.iter().map(block).collect();
        assert!(expected.iter().any(|block| block.values == init_block(&spec(), 7, block.id)));

        let ranged = StoreBank::new(store.checkpoint(Step(2)).await.unwrap());
        let mapped = MappedBank::open_step(&root.path().join("facts"), Step(2)).unwrap();
        assert_eq!(bits(&ranged.fetch(Step(2), &ids).await.unwrap()), bits(&expected));
        assert_eq!(bits(&mapped.fetch(Step(2), &ids).await.unwrap()), bits(&expected));
        let kept: Vec<bytes::Bytes> = ids.iter().map(|&id| mapped.block_bytes(id).unwrap()).collect();
        let text = mapped.fetch(Step(3), &ids).await.unwrap_err().to_string();
        assert_eq!(text, "fetch after step 3, but the bank is open read-only at step 2");
        assert_eq!(ranged.fetch(Step(3), &ids).await.unwrap_err().to_string(), text);
        for unknown in [id(1, 0), id(2, 12)] {
            assert!(matches!(ranged.fetch(Step(0), &[unknown]).await, Err(Error::UnknownBlock { .. })));
            assert!(matches!(mapped.fetch(Step(0), &[unknown]).await, Err(Error::UnknownBlock { .. })));
        }
        assert!(matches!(ranged.push(Step(3), 0, Vec::new()).await, Err(Error::ReadOnly { .. })));
        assert!(matches!(mapped.save(Step(2)).await, Err(Error::ReadOnly { .. })));
        drop(mapped);
        for (bytes, block) in kept.iter().zip(&expected) {
            assert_eq!(bytes, bytemuck::cast_slice::<f32, u8>(&block.values));
        }
    });
}

#[test]
fn a_bank_opened_to_be_read_is_never_written() {
    run(async {
        let inner = in_memory();
        let mut shards = Shards::new(1);
        shards.train(1);
        shards.save(&open(&inner, small_parts()).await).await.unwrap();
        let store = open(&inner, StoreOptions { access: Access::Read, ..small_parts() }).await;
        let records: Vec<ShardRecord> = shards.records.iter().flatten().cloned().collect();
        let expected = "access is Read, expected Write, to change a bank";
        assert_eq!(shards.write(&store).await.unwrap_err().to_string(), expected);
        assert_eq!(store.commit(Step(1), &records).await.err().unwrap().to_string(), expected);
        assert_eq!(store.keep(1).await.unwrap_err().to_string(), expected);
        assert_eq!(store.discard_after(Step(0)).await.unwrap_err().to_string(), expected);
        assert_eq!(
            Shards::restored(&store.latest().await.unwrap().unwrap(), 1).await.state(),
            shards.state()
        );
    });
}

#[test]
fn a_restore_of_another_bank_is_refused() {
    run(async {
        let store = open(&in_memory(), small_parts()).await;
        let mut shards = Shards::new(1);
        shards.train(1);
        let saved = shards.save(&store).await.unwrap();
        let mut other = identity();
        other.hashes.insert("anchor".to_owned(), "cc".to_owned());
        let text = saved.load(&other, shard_options(0, 1)).await.unwrap_err().to_string();
        assert!(text.ends_with("hash of anchor is missing, expected cc"), "{text}");
        let options = memory_bank::ShardOptions { seed: 8, ..shard_options(0, 1) };
        let text = saved.load(&identity(), options).await.unwrap_err().to_string();
        assert!(text.ends_with("seed is 7, expected 8"), "{text}");
        assert!(saved.record(Placement { shard: 0, n_shards: 2 }).is_none());
        assert_eq!(saved.record(Placement::WHOLE), shards.records[0]);
    });
}

#[test]
fn a_shard_that_goes_back_keeps_what_was_not_updated_since() {
    run(async {
        for n_shards in [1, 3] {
            let store = open(&in_memory(), small_parts()).await;
            let mut shards = Shards::new(n_shards);
            shards.train(2);
            let saved = shards.save(&store).await.unwrap();
            shards.train(4);
            let (mut n_kept, mut n_read) = (0, 0);
            for shard in 0..n_shards {
                let held = shards.live[shard].with(|shard| shard.unchanged_since(Step(2))).unwrap();
                let options = shard_options(shard, n_shards);
                let restored = saved.load_onto(&identity(), options, held.clone(), None).await.unwrap();
                let rows = restored.snapshot(Step(0)).rows;
                for (id, row) in &held {
                    let (_, found) = rows.iter().find(|(found, _)| found == id).unwrap();
                    let same = |a: &Array, b: &Array| Arc::ptr_eq(&a.read().unwrap(), &b.read().unwrap());
                    assert!(same(&row.values, &found.values) && same(&row.v, &found.v));
                }
                (n_kept, n_read) = (n_kept + held.len(), n_read + rows.len() - held.len());
                shards.live[shard].replace(restored).unwrap();
            }
            assert!(n_kept > 0 && n_read > 0, "{n_kept} {n_read}");
            assert!(shards.state() == expected(2));
            shards.train(5);
            assert!(shards.state() == expected(5));
        }
        // Blocks of another history are noticed.
        let store = open(&in_memory(), small_parts()).await;
        let mut shards = Shards::new(1);
        shards.train(2);
        let saved = shards.save(&store).await.unwrap();
        shards.train(5);
        let held = shards.live[0].with(|shard| shard.unchanged_since(Step(5))).unwrap();
        let text =
            saved.load_onto(&identity(), shard_options(0, 1), held, None).await.unwrap_err().to_string();
        assert!(
            text.contains("updates of block ") && text.contains(" is ") && text.contains(", expected "),
            "{text}"
        );
    });
}
