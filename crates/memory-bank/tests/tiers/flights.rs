//! Fetches at the same time, of the same blocks.

use std::sync::Arc;
use std::time::Duration;

use memory_bank::{BlockDtype, BlockStore, Error, TierOptions};
use tokio::time::Instant;

use crate::support::{Answer, Bank, STEP, fetch, id, ram, some_ids};

#[tokio::test(start_paused = true)]
async fn a_block_on_its_way_is_not_asked_for_again() {
    let bank = Bank::new().await;
    for options in [ram(1, BlockDtype::F32), TierOptions::default()] {
        let remote = bank.remote();
        remote.answer(Answer::Right, 100);
        let tiered = bank.over(&options, &remote);
        let expected = fetch(&*bank.local(), &some_ids()).await;
        let start = Instant::now();
        // Overlapping sets: each but the first waits for some blocks and asks for others.
        let fetches: Vec<_> = (0..some_ids().len())
            .map(|n| {
                let (tiered, ids) = (tiered.clone(), some_ids()[..=n].to_vec());
                tokio::spawn(async move { fetch(&tiered, &ids).await })
            })
            .collect();
        for (n, fetched) in fetches.into_iter().enumerate() {
            assert_eq!(fetched.await.unwrap(), expected[..=n]);
        }
        let mut asked = remote.requests().concat();
        asked.sort();
        let mut ids = some_ids();
        ids.sort();
        assert_eq!(asked, ids);
        assert_eq!(start.elapsed(), Duration::from_millis(100), "all wait at the same time");
    }
}

#[tokio::test(start_paused = true)]
async fn those_who_wait_for_a_fetch_that_is_given_up_ask_themselves() {
    let bank = Bank::new().await;
    let remote = bank.remote();
    remote.answer(Answer::Right, 100);
    let tiered = bank.over(&ram(1, BlockDtype::F32), &remote);
    let spawn = || {
        let tiered = tiered.clone();
        tokio::spawn(async move { fetch(&tiered, &some_ids()).await })
    };
    let (first, second) = (spawn(), spawn());
    tokio::time::advance(Duration::from_millis(50)).await;
    assert_eq!(remote.requests().len(), 1);
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    assert_eq!(second.await.unwrap(), fetch(&*bank.local(), &some_ids()).await);
    assert_eq!(remote.requests().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_error_reaches_all_who_wait_and_is_not_kept() {
    let bank = Bank::new().await;
    let remote = bank.remote();
    remote.answer(Answer::Fails, 100);
    let tiered = bank.over(&ram(1, BlockDtype::F32), &remote);
    let ids = [id(2, 1)];
    let fetches: Vec<_> = (0..3)
        .map(|_| {
            let tiered = tiered.clone();
            tokio::spawn(async move { tiered.fetch(STEP, &ids).await.unwrap_err() })
        })
        .collect();
    for fetched in fetches {
        let error = fetched.await.unwrap();
        assert!(matches!(&error, Error::Shared { source } if matches!(**source, Error::Io { .. })));
        assert_eq!(error.to_string(), "remote: connection reset");
    }
    assert_eq!(remote.requests().len(), 1);
    remote.answer(Answer::Right, 0);
    assert_eq!(fetch(&tiered, &ids).await, fetch(&*bank.local(), &ids).await);
}

/// The runtime of whoever asks first is not needed by those who wait on another.
#[test]
fn plain_threads_share_a_fetch() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let bank = runtime.block_on(Bank::new());
    let remote = bank.remote();
    remote.answer(Answer::Right, 0);
    let tiered = Arc::new(bank.over(&ram(1, BlockDtype::Int8), &remote));
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let store = memory_bank::Blocking::new(Arc::clone(&tiered)).unwrap();
            std::thread::spawn(move || store.fetch(STEP, &some_ids()).unwrap())
        })
        .collect();
    let found: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    assert!(found.iter().all(|blocks| *blocks == found[0]));
    assert_eq!(remote.requests().len(), 1);
}
