//! Banks that come and go, caches that stay within their limits, and blocks that are fetched ahead.

use std::sync::Arc;

use cluster_tree::ClusterPath;
use futures::future::join_all;
use memory_bank::{BlockDtype, DiskOptions, TierOptions};
use serve::memory::{Ask, BankSource, Banks, Blocked, Error, Memory, MemoryOptions, MemoryStats, Retrieval};

use crate::made_up::{folder, id, identity, save, spec};
use crate::reader::retrieval;

fn ask(memory: Memory, text: &str) -> Ask {
    Ask { bank: None, text: text.to_owned(), memory, blocked: Arc::new(Blocked::default()) }
}

fn path(leaf: u32) -> Memory {
    Memory::Path(ClusterPath::new(vec![leaf / 3, leaf]).unwrap())
}

/// A bit of work of the others that are ready.
async fn until(served: &Retrieval, done: impl Fn(&MemoryStats) -> bool) -> MemoryStats {
    for _ in 0..10_000 {
        let stats = served.stats();
        if done(&stats) {
            return stats;
        }
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    panic!("not reached: {:?}", served.stats());
}

#[tokio::test]
async fn a_swap_is_whole_and_who_holds_the_old_bank_goes_on_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let old = save(dir.path(), &identity(), 1, &[id(0, 0), id(1, 0)]).await;
    let new = save(dir.path(), &identity(), 2, &[id(0, 0), id(1, 0)]).await;
    let served = retrieval(MemoryOptions { prefetch: 0, ..MemoryOptions::default() });
    let error = served.select(ask(path(0), "")).await.err().unwrap();
    assert!(matches!(&error, Error::UnknownBank { name, .. } if name == "default"), "{error}");

    let info = served.banks().load(Banks::DEFAULT, folder(&old)).await.unwrap();
    assert_eq!((info.step.0, info.load, info.dtype), (1, 1, BlockDtype::F32));
    let held = served.select(ask(path(0), "")).await.unwrap();
    let (bank, before) = (held.bank.clone().unwrap(), served.stats().packed);
    let block = &bank.blocks(&[id(0, 0)]).await.unwrap()[0];

    assert_eq!(served.banks().load(Banks::DEFAULT, folder(&new)).await.unwrap().load, 2);
    let swapped = served.select(ask(path(0), "")).await.unwrap();
    assert_eq!((swapped.bank_version.unwrap().0, bank.version().step.0), (2, 1));
    assert!(swapped.cached.iter().all(|level| !level.cached), "blocks of another load were answered");
    // The old one answers as before.
    let again = bank.path_memory(held.path.as_ref().unwrap()).await.unwrap();
    assert!(again.1.levels.iter().all(|level| level.cached));
    assert_eq!(&bank.blocks(&[id(0, 0)]).await.unwrap()[0], block);
    assert_ne!(&swapped.bank.as_ref().unwrap().blocks(&[id(0, 0)]).await.unwrap()[0], block);
    assert_eq!(served.stats().packed.bytes, 2 * before.bytes);

    // And its blocks go with its last holder.
    drop((held, bank, again));
    assert_eq!(served.stats().packed.bytes, before.bytes);
    served.banks().unload(Banks::DEFAULT).unwrap();
    assert!(served.banks().list().is_empty());
    assert!(matches!(served.banks().unload(Banks::DEFAULT), Err(Error::UnknownBank { .. })));
    drop(swapped);
    assert_eq!(served.stats().packed.n_blocks, 0);
}

#[tokio::test]
async fn a_bank_of_another_run_is_refused_by_name_and_the_old_one_stays() {
    let dir = tempfile::tempdir().unwrap();
    let served = retrieval(MemoryOptions::default());
    let good = save(&dir.path().join("good"), &identity(), 1, &[id(0, 0)]).await;
    served.banks().load(Banks::DEFAULT, folder(&good)).await.unwrap();

    let mut other = identity();
    other.hashes.insert("tree".to_owned(), "another".to_owned());
    let bank = save(&dir.path().join("tree"), &other, 1, &[id(0, 0)]).await;
    let error = served.banks().load(Banks::DEFAULT, folder(&bank)).await.unwrap_err().to_string();
    let expected = &identity().hashes["tree"];
    assert!(error.ends_with(&format!("memory: hash of tree is another, expected {expected}")), "{error}");

    let mut other = identity();
    other.spec.width = vec![4, 4];
    let bank = save(&dir.path().join("spec"), &other, 1, &[id(0, 0)]).await;
    let error = served.banks().load(Banks::DEFAULT, folder(&bank)).await.unwrap_err();
    assert!(matches!(&error, Error::OtherBank { what, .. } if what == "spec"), "{error}");

    for (name, source) in [("default", BankSource::default()), ("../up", folder(&good))] {
        let error = served.banks().load(name, source).await.unwrap_err();
        assert!(matches!(error, Error::NoBank { .. } | Error::BankName { .. }), "{error}");
    }
    let mut later = folder(&good);
    later.step = Some(memory_bank::Step(9));
    let error = served.banks().load("later", later).await.unwrap_err().to_string();
    assert!(error.ends_with("expected step 9, found 1"), "{error}");
    assert_eq!(served.banks().list().len(), 1);
    served.select(ask(path(0), "")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_miss_together_pack_a_block_once() {
    let dir = tempfile::tempdir().unwrap();
    let bank = save(dir.path(), &identity(), 1, &[id(0, 0)]).await;
    let served = retrieval(MemoryOptions::default());
    served.banks().load(Banks::DEFAULT, folder(&bank)).await.unwrap();
    let requests = (0..64).map(|i| served.select(ask(path(i % 2), "")));
    for selected in join_all(requests).await {
        assert_eq!(selected.unwrap().memory.blocks().len(), 2);
    }
    let levels = served.stats().packed.levels;
    assert_eq!(levels.iter().map(|level| level.n_packed).collect::<Vec<_>>(), [1, 2]);
    assert!(levels.iter().all(|level| level.n_hits + level.n_misses == 64), "{levels:?}");
}

#[tokio::test]
async fn packed_blocks_stay_within_their_limit_and_pinned_levels_stay() {
    let dir = tempfile::tempdir().unwrap();
    let mut wide = identity();
    // Blocks of 384 KiB and 192 KiB: two of level 0 and a generic one are 1.1 MiB.
    wide.spec.d_model = 1024;
    wide.spec.width = vec![16, 8];
    let bank = save(dir.path(), &wide, 1, &[id(0, 0)]).await;
    let options = MemoryOptions { packed_mib: 2, pinned_levels: vec![0], prefetch: 0 };
    let served = crate::reader::retrieval_of(wide, options);
    served.banks().load(Banks::DEFAULT, folder(&bank)).await.unwrap();
    assert_eq!(served.stats().packed.n_blocks, 3);
    for _ in 0..3 {
        for leaf in 0..6 {
            let selected = served.select(ask(path(leaf), "")).await.unwrap();
            assert!(selected.cached[0].cached, "a pinned block had gone");
            let packed = served.stats().packed;
            assert!(packed.bytes <= packed.limit_bytes, "{packed:?}");
        }
    }
    let levels = served.stats().packed.levels;
    assert_eq!((levels[0].n_evictions, levels[0].n_packed), (0, 3));
    assert!(levels[1].n_evictions > 0, "{levels:?}");

    let options = MemoryOptions { packed_mib: 1, pinned_levels: vec![0], prefetch: 0 };
    let served = crate::reader::retrieval_of(served.identity().clone(), options);
    let error = served.banks().load(Banks::DEFAULT, folder(&bank)).await.unwrap_err();
    assert_eq!(error.to_string(), "packed_mib: expected at least 2 for pinned levels [0], found 1");
}

#[tokio::test]
async fn likely_blocks_are_packed_ahead_unless_it_is_off() {
    let dir = tempfile::tempdir().unwrap();
    let bank = save(dir.path(), &identity(), 1, &[id(0, 0)]).await;
    for (prefetch, expected) in [(64, 2), (1, 1), (0, 0)] {
        let served = retrieval(MemoryOptions { prefetch, ..MemoryOptions::default() });
        served.banks().load(Banks::DEFAULT, folder(&bank)).await.unwrap();
        // The other candidate is leaf 1, and leaf 0 is beside.
        served.select(ask(Memory::Auto, "1 0.09")).await.unwrap();
        let stats = until(&served, |stats| stats.prefetched == expected).await;
        assert_eq!(stats.prefetch_dropped + stats.prefetched, if prefetch == 0 { 0 } else { 2 });
        let asked = |level: usize| stats.packed.levels[level].n_hits + stats.packed.levels[level].n_misses;
        assert_eq!([asked(0), asked(1)], [1, 1], "what nobody asked for was counted as asked for");
        if prefetch != 1 {
            let selected = served.select(ask(path(1), "")).await.unwrap();
            assert_eq!(selected.cached[1].cached, prefetch > 0);
        }
    }
}

#[tokio::test]
async fn likely_blocks_go_to_the_caches_of_a_bank_when_packed_ones_have_no_room() {
    let dir = tempfile::tempdir().unwrap();
    let bank = save(dir.path(), &identity(), 1, &[id(0, 0)]).await;
    let cached = BankSource { tiers: TierOptions { ram_mib: 1, ..TierOptions::default() }, ..folder(&bank) };
    for (source, expected) in [(cached, [2, 0]), (folder(&bank), [0, 2])] {
        let served = retrieval(MemoryOptions { packed_mib: 0, ..MemoryOptions::default() });
        served.banks().load(Banks::DEFAULT, source).await.unwrap();
        served.select(ask(Memory::Auto, "1 0.09")).await.unwrap();
        let stats = until(&served, |stats| stats.prefetched + stats.prefetch_dropped == 2).await;
        assert_eq!([stats.prefetched, stats.prefetch_dropped], expected);
        if expected[0] > 0 {
            let ram = |stats: &MemoryStats| stats.banks[0].tiers.tiers[0].levels[1].n_hits;
            assert_eq!(ram(&stats), 0);
            served.select(ask(path(1), "")).await.unwrap();
            assert_eq!(ram(&served.stats()), 1, "the block was not in RAM");
        }
    }
}

#[tokio::test]
async fn a_cache_on_disk_outlives_a_swap_and_those_of_older_banks_go() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Some(DiskOptions { dir: dir.path().join("cache"), mib: 1 });
    let tiers = TierOptions { disk, dtype: BlockDtype::Int8, ..TierOptions::default() };
    let served = retrieval(MemoryOptions::default());
    let mut seen = vec![];
    for step in 1..=3 {
        let bank = save(dir.path(), &identity(), step, &[id(0, 0)]).await;
        let source = BankSource { folder: Some(bank), step: None, tiers: tiers.clone() };
        let info = served.banks().load(Banks::DEFAULT, source).await.unwrap();
        assert_eq!((info.dtype, info.n_parameters), (BlockDtype::Int8, spec().bank_len()));
        seen.push(served.select(ask(path(0), "")).await.unwrap());
    }
    let folders = std::fs::read_dir(dir.path().join("cache")).unwrap();
    let mut names: Vec<String> =
        folders.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["default@2-7-int8", "default@3-7-int8"]);
    // What was removed is still read by who holds it.
    for selected in seen {
        let bank = selected.bank.unwrap();
        assert_eq!(bank.blocks(&[id(1, 3)]).await.unwrap().len(), 1);
    }
}
