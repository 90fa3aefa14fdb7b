//! Tiers that are slow, that fail, or that answer something else.

use std::sync::Arc;
use std::time::Duration;

use memory_bank::{BlockDtype, BlockStore, Error, TierOptions, TierSource, TierState, Tiered};

use crate::support::{Answer, Bank, Remote, STEP, bits, disk, fetch, id, n_hits, some_ids, tier, version};

/// Two sources, `near` before `far`, and nothing in front of them.
fn two(near: &Arc<Remote>, far: &Arc<Remote>) -> Tiered {
    let sources = vec![TierSource::new("near", near.clone()), TierSource::new("far", far.clone())];
    Tiered::open(&TierOptions::default(), version(), sources).unwrap()
}

async fn fetch_times(tiered: &Tiered, n: usize) {
    for _ in 0..n {
        tiered.fetch(STEP, &[id(2, 1)]).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_slower_than_the_next_is_bypassed_and_comes_back() {
    let bank = Bank::new().await;
    let (near, far) = (bank.remote(), bank.remote());
    near.answer(Answer::Right, 50);
    far.answer(Answer::Right, 5);
    let tiered = two(&near, &far);
    let mut states = tiered.states();
    assert_eq!(*states.borrow_and_update(), [TierState::Used, TierState::Used]);

    // One fetch of 64 asks the far one; after 8 of these it is known to be faster.
    fetch_times(&tiered, 8 * 64 - 1).await;
    assert!(!states.has_changed().unwrap());
    fetch_times(&tiered, 1).await;
    assert!(states.has_changed().unwrap());
    assert_eq!(*states.borrow_and_update(), [TierState::Bypassed, TierState::Used]);
    assert_eq!(tier(&tiered, "near").state, TierState::Bypassed);
    assert!((tier(&tiered, "near").latency_seconds - 0.05).abs() < 1e-9);
    assert!((tier(&tiered, "far").seconds_per_byte - 0.005 / 1152.0).abs() < 1e-12);

    near.requests();
    fetch_times(&tiered, 1000).await;
    assert!(near.requests().is_empty(), "it was measured not long ago");

    near.answer(Answer::Right, 1);
    tokio::time::advance(Duration::from_secs(61)).await;
    fetch_times(&tiered, 9 * 64).await;
    assert!(states.has_changed().unwrap());
    assert_eq!(*states.borrow_and_update(), [TierState::Used, TierState::Used]);
    far.requests();
    fetch_times(&tiered, 10).await;
    assert!(far.requests().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_source_that_fails_is_passed_over_and_in_the_end_bypassed() {
    let bank = Bank::new().await;
    let (near, far) = (bank.remote(), bank.remote());
    near.answer(Answer::Fails, 10);
    far.answer(Answer::Right, 30);
    let tiered = two(&near, &far);
    let expected = fetch(&*bank.local(), &some_ids()).await;
    // It takes 10 ms to fail and 30 more until the blocks are there.
    for _ in 0..8 {
        assert_eq!(fetch(&tiered, &some_ids()).await, expected);
    }
    let stats = tier(&tiered, "near");
    assert_eq!((stats.n_failures, stats.n_requests, stats.state), (8, 0, TierState::Bypassed));
    assert_eq!(stats.last_error.as_deref(), Some("remote: connection reset"));
    assert!((stats.latency_seconds - 0.04).abs() < 1e-9);
    near.requests();
    assert_eq!(fetch(&tiered, &some_ids()).await, expected);
    assert!(near.requests().is_empty());

    // A bypassed source is better than none.
    near.answer(Answer::Right, 10);
    far.answer(Answer::Fails, 0);
    assert_eq!(fetch(&tiered, &some_ids()).await, expected);
    near.answer(Answer::Fails, 0);
    let error = tiered.fetch(STEP, &some_ids()).await.unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn an_answer_of_other_blocks_is_an_error() {
    let bank = Bank::new().await;
    let (remote, ids) = (bank.remote(), [id(2, 1), id(2, 2)]);
    let tiered = bank.over(&TierOptions { ram_mib: 1, ..TierOptions::default() }, &remote);
    for (answer, text) in [
        (Answer::Short, "tier remote answered 1 blocks, expected 2 blocks"),
        (
            Answer::Twice,
            "tier remote answered block level2/1 of 288 values, expected block level2/2 of 288 values",
        ),
        (
            Answer::Cut,
            "tier remote answered block level2/1 of 287 values, expected block level2/1 of 288 values",
        ),
    ] {
        remote.answer(answer, 0);
        assert_eq!(tiered.fetch(STEP, &ids).await.unwrap_err().to_string(), text);
    }
    // Nothing of it was kept.
    remote.answer(Answer::Right, 0);
    assert_eq!(fetch(&tiered, &ids).await, fetch(&*bank.local(), &ids).await);
    assert_eq!((n_hits(&tiered, "ram"), tier(&tiered, "remote").n_failures), (0, 3));
}

#[tokio::test(start_paused = true)]
async fn a_weight_that_cannot_be_encoded_is_an_error() {
    let bank = Bank::new().await;
    let remote = bank.remote();
    remote.answer(Answer::Nan, 0);
    let options = TierOptions { dtype: BlockDtype::Int8, ..TierOptions::default() };
    let error = bank.over(&options, &remote).fetch(STEP, &[id(2, 1)]).await.unwrap_err();
    assert!(error.to_string().starts_with("block level2/1 has NaN at position 5, "), "{error}");
}

/// The disk is bypassed as a source is, and then nothing is kept there; real time is all that it has.
#[tokio::test(start_paused = true)]
async fn the_local_bank_is_a_source_like_any_other() {
    let bank = Bank::new().await;
    let (dir, remote) = (tempfile::tempdir().unwrap(), bank.remote());
    remote.answer(Answer::Fails, 0);
    let sources = vec![TierSource::new("local", bank.local()), TierSource::new("remote", remote.clone())];
    let tiered = Tiered::open(&disk(dir.path(), BlockDtype::F32), version(), sources).unwrap();
    let blocks = tiered.fetch(STEP, &some_ids()).await.unwrap();
    assert_eq!(bits(&blocks), fetch(&*bank.local(), &some_ids()).await);
    assert_eq!((n_hits(&tiered, "local"), n_hits(&tiered, "disk")), (7, 0));
    assert!(remote.requests().is_empty());
    let names: Vec<String> = tiered.stats().tiers.into_iter().map(|tier| tier.name).collect();
    assert_eq!(names, ["disk", "local", "remote"]);
}
