//! RAM holds no more than it may, and pinned levels for good.

use memory_bank::{BlockDtype, TierOptions};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::support::{Bank, DTYPES, STEP, fetch, id, ram, spec, tier};

const MIB: u64 = 1 << 20;

#[tokio::test(start_paused = true)]
async fn ram_never_holds_more_than_its_limit() {
    let bank = Bank::new().await;
    let tiered = bank.over(&ram(1, BlockDtype::F32), &bank.remote());
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut largest = 0;
    for _ in 0..60 {
        let n = rng.random_range(1..100);
        let ids: Vec<_> = (0..n).map(|_| id(2, rng.random_range(0..1024))).collect();
        tiered.fetch_shared(STEP, &ids).await.unwrap();
        let held = tier(&tiered, "ram").held_bytes;
        assert!(held <= MIB && held.is_multiple_of(1152), "{held}");
        largest = largest.max(held);
    }
    assert_eq!(largest, MIB / 1152 * 1152);
    let level = tier(&tiered, "ram").levels[1];
    assert_eq!((level.level, level.n_misses - level.n_evictions), (2, MIB / 1152));
    assert!(level.n_evictions > 0 && level.n_hits > 0, "{level:?}");
}

#[tokio::test(start_paused = true)]
async fn pinned_levels_stay() {
    let bank = Bank::new().await;
    let remote = bank.remote();
    for dtype in DTYPES {
        let tiered = bank.over(&TierOptions { pinned_levels: vec![0], ..ram(1, dtype) }, &remote);
        tiered.warm().await.unwrap();
        let pinned = [0, 1, 2, 3, cluster_tree::ClusterId::GENERIC].map(|index| id(0, index));
        assert_eq!(remote.requests(), [pinned]);
        let warm = fetch(&tiered, &pinned).await;
        for start in (0..2048).step_by(64) {
            let ids: Vec<_> = (start..start + 64).map(|index| id(2, index % 1024)).collect();
            tiered.fetch_shared(STEP, &ids).await.unwrap();
            assert!(tier(&tiered, "ram").held_bytes <= MIB);
        }
        remote.requests();
        assert_eq!(fetch(&tiered, &pinned).await, warm);
        assert!(remote.requests().is_empty());
        let level = tier(&tiered, "ram").levels[0];
        assert_eq!((level.n_hits, level.n_misses, level.n_evictions), (10, 5, 0));
        // All of level 2 fits beside them unless it is f32.
        let evicts = tier(&tiered, "ram").levels[1].n_evictions > 0;
        assert_eq!(evicts, dtype == BlockDtype::F32);
    }
}

/// What is pinned takes its room before it is there.
#[tokio::test(start_paused = true)]
async fn pinned_levels_have_their_room_from_the_start() {
    let bank = Bank::new().await;
    let options = TierOptions { pinned_levels: vec![0], ..ram(1, BlockDtype::F32) };
    let tiered = bank.over(&options, &bank.remote());
    let ids: Vec<_> = (0..1024).map(|index| id(2, index)).collect();
    tiered.fetch_shared(STEP, &ids).await.unwrap();
    let pinned = options.dtype.block_bytes(&spec(), 0) * 5;
    assert_eq!(tier(&tiered, "ram").held_bytes, (MIB - pinned) / 1152 * 1152);
    tiered.warm().await.unwrap();
    assert_eq!(tier(&tiered, "ram").held_bytes, (MIB - pinned) / 1152 * 1152 + pinned);
}
