//! A block has the same bits wherever it comes from.

use cluster_tree::ClusterId;
use memory_bank::{Block, BlockDtype, BlockStore, Encoded, TierOptions, TierSource, Tiered};

use crate::support::{Bank, DTYPES, STEP, bits, disk, fetch, n_hits, ram, some_ids, spec, tier, version};

/// What every tier must answer: the bank's own weights, encoded and decoded once.
async fn expected(bank: &Bank, dtype: BlockDtype, ids: &[ClusterId]) -> Vec<(ClusterId, Vec<u32>)> {
    let blocks = bank.local().fetch(STEP, ids).await.unwrap();
    let once = |block: &Block| {
        let values = Encoded::encode(dtype, spec().d_model, block).unwrap().decode();
        Block { id: block.id, values }
    };
    bits(&blocks.iter().map(once).collect::<Vec<_>>())
}

#[tokio::test(start_paused = true)]
async fn every_tier_answers_the_same_bits() {
    let (bank, ids) = (Bank::new().await, some_ids());
    for dtype in DTYPES {
        let expected = expected(&bank, dtype, &ids).await;
        let exact = fetch(&*bank.local(), &ids).await;
        assert_eq!(expected == exact, dtype == BlockDtype::F32);
        let dir = tempfile::tempdir().unwrap();

        let plain = TierOptions { dtype, ..TierOptions::default() };
        let local = vec![TierSource::new("local", bank.local())];
        assert_eq!(fetch(&Tiered::open(&plain, version(), local).unwrap(), &ids).await, expected);

        let both = TierOptions { ram_mib: 1, ..disk(dir.path(), dtype) };
        let remote = bank.remote();
        let tiered = bank.over(&both, &remote);
        assert_eq!(fetch(&tiered, &ids).await, expected, "remote, {dtype}");
        assert_eq!((n_hits(&tiered, "remote"), n_hits(&tiered, "ram")), (7, 0));
        assert_eq!(fetch(&tiered, &ids).await, expected, "ram, {dtype}");
        assert_eq!((n_hits(&tiered, "ram"), n_hits(&tiered, "disk")), (7, 0));
        drop(tiered);

        let tiered = bank.over(&disk(dir.path(), dtype), &remote);
        assert_eq!(fetch(&tiered, &ids).await, expected, "disk, {dtype}");
        assert_eq!((n_hits(&tiered, "disk"), n_hits(&tiered, "remote")), (7, 0));
        assert_eq!(remote.requests().len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn tiers_share_one_fetch() {
    let bank = Bank::new().await;
    let (dir, remote, ids) = (tempfile::tempdir().unwrap(), bank.remote(), some_ids());
    let expected = fetch(&*bank.local(), &ids).await;
    let options = TierOptions { ram_mib: 1, ..disk(dir.path(), BlockDtype::F32) };
    drop(bank.over(&options, &remote).fetch(STEP, &ids[..3]).await.unwrap());

    let tiered = bank.over(&options, &remote);
    tiered.fetch(STEP, &ids[2..5]).await.unwrap();
    remote.requests();
    // Three from RAM, two more from disk, the last two from the source in one request, and the order
    // is that of the question.
    assert_eq!(fetch(&tiered, &ids).await, expected);
    let mut asked = vec![ids[5], ids[6]];
    asked.sort();
    assert_eq!(remote.requests(), [asked]);
    assert_eq!((n_hits(&tiered, "ram"), n_hits(&tiered, "disk"), n_hits(&tiered, "remote")), (3, 3, 4));

    let stats = tiered.stats();
    let n_asked: u64 = stats.levels.iter().map(|level| level.n_asked).sum();
    let n_cached: u64 = stats.levels.iter().map(|level| level.n_cached).sum();
    assert_eq!((n_asked, n_cached), (10, 6));
    assert_eq!(stats.levels.iter().map(|level| level.level).collect::<Vec<_>>(), [0, 2]);
    // Level 0 was asked for block 0, then for 3, 0 and the generic one; of 2304 bytes each.
    let (ram, disk) = (tier(&tiered, "ram").levels[0], tier(&tiered, "disk").levels[0]);
    assert_eq!((ram.n_hits, ram.n_misses, ram.bytes), (1, 3, 2304));
    assert_eq!((disk.n_hits, disk.n_misses, disk.bytes), (1, 2, 2304));
    assert_eq!((ram.hit_rate(), stats.levels[0].hit_rate()), (Some(0.25), Some(0.5)));
    assert_eq!(tier(&tiered, "ram").held_bytes, 3 * 2304 + 4 * 1152);
}

#[tokio::test(start_paused = true)]
async fn what_ram_holds_is_shared() {
    let bank = Bank::new().await;
    let tiered = bank.over(&ram(1, BlockDtype::Int8), &bank.remote());
    let ids = some_ids();
    let first = tiered.fetch_shared(STEP, &ids).await.unwrap();
    let again = tiered.fetch_shared(STEP, &ids).await.unwrap();
    assert!(first.iter().zip(&again).all(|(first, again)| std::sync::Arc::ptr_eq(first, again)));
    // One byte a number and 4 for each row of 24.
    assert_eq!(first[0].bytes(), 288 + 4 * 12);
}

#[tokio::test(start_paused = true)]
async fn a_block_asked_for_twice_is_answered_twice() {
    let bank = Bank::new().await;
    let remote = bank.remote();
    let tiered = bank.over(&TierOptions::default(), &remote);
    let [a, b] = [some_ids()[0], some_ids()[1]];
    let expected = fetch(&*bank.local(), &[a, b, a]).await;
    assert_eq!(fetch(&tiered, &[a, b, a]).await, expected);
    assert_eq!(remote.requests(), [[b, a]]);
    assert!(fetch(&tiered, &[]).await.is_empty());
    assert!(remote.requests().is_empty());
}
