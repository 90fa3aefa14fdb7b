//! Blocks that are read time and again: kept, and fetched again only where they have changed.

use memory_bank::{BlockStore, Placement, Step, Traffic};
use memory_service::proto::FetchRequest;
use memory_service::{Dtype, RemoteBank, RemoteOptions};

use crate::refusals::{client, wire_identity};
use crate::support::{
    Served, all_ids, bits, gradients, id, options, reference, remote, serve_options, shards, spec,
};

/// Bytes of all blocks, as numbers of `size` bytes.
fn all_bytes(size: usize) -> u64 {
    bytes_of(&all_ids(), size)
}

fn bytes_of(ids: &[cluster_tree::ClusterId], size: usize) -> u64 {
    ids.iter().map(|id| (spec().block_len(usize::from(id.level)) * size) as u64).sum()
}

/// What was fetched and what was kept since an earlier look.
fn read_since(bank: &RemoteBank, before: &mut Traffic) -> (u64, u64) {
    let now = bank.traffic().unwrap();
    let since = now.since(&std::mem::replace(before, now));
    (since.fetched_bytes, since.unchanged_bytes)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_what_has_changed_is_sent_again() {
    for (bulk, dtype, size) in
        [(false, Dtype::F32, 4), (true, Dtype::F32, 4), (true, Dtype::Bf16, 2), (false, Dtype::Bf16, 2)]
    {
        let served = shards(2, 1, bulk).await;
        let options = RemoteOptions { fetch_dtype: dtype, cache_bytes: 1 << 20, ..remote(&served) };
        let bank = RemoteBank::connect(options.clone()).await.unwrap();
        let plain = RemoteBank::connect(RemoteOptions { cache_bytes: 0, ..options }).await.unwrap();
        let (mut before, all) = (Traffic::default(), all_bytes(size));
        for step in 0..6 {
            let expected = bits(&plain.fetch(Step(step), &all_ids()).await.unwrap());
            for time in 0..2 {
                let found = bank.read(Step(step), &all_ids()).await.unwrap();
                assert!(bits(&found) == expected, "bulk {bulk}, {dtype:?}, step {step}, time {time}");
                // Of a bank that begins nothing is held; then what the last step updated has changed.
                let changed: Vec<_> = gradients(step, 0).iter().map(|block| block.id).collect();
                let fetched = match (time, step) {
                    (0, 0) => all,
                    (0, _) => bytes_of(&changed, size),
                    _ => 0,
                };
                assert_eq!(read_since(&bank, &mut before), (fetched, all - fetched), "step {step}");
            }
            // What is trained on is fetched whole, and not kept.
            bank.fetch(Step(step), &all_ids()[..3]).await.unwrap();
            assert_eq!(read_since(&bank, &mut before), (bytes_of(&all_ids()[..3], size), 0));
            bank.push(Step(step + 1), 0, gradients(step + 1, 0)).await.unwrap();
        }
        let found = plain.read(Step(6), &all_ids()).await.unwrap();
        assert_eq!(plain.stats().unchanged_bytes, 0);
        assert!(dtype != Dtype::F32 || bits(&found) == bits(&reference(6, 1)));
    }
}

/// Versions of one life say nothing about another: the second shard has made as many updates of a block, and
/// other ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_kept_of_a_life_ends_with_it() {
    for bulk in [false, true] {
        let mut served = shards(1, 1, bulk).await;
        let options = RemoteOptions { cache_bytes: 1 << 20, ..remote(&served) };
        let bank = RemoteBank::connect(options).await.unwrap();
        bank.push(Step(1), 0, gradients(1, 0)).await.unwrap();
        bank.read(Step(1), &all_ids()).await.unwrap();
        let mut before = bank.traffic().unwrap();
        let other = memory_bank::Shard::new(spec(), crate::support::options(1, Placement::WHOLE)).unwrap();
        let other = memory_bank::Live::new(other);
        let push = |step: u64, gradients| {
            let gradients = memory_bank::Gradients::new(&spec(), gradients).unwrap();
            other.push(Step(step), 0, gradients).unwrap();
        };
        push(1, gradients(4, 0));
        let expected: Vec<_> = all_ids().into_iter().zip(other.fetch(&all_ids()).unwrap()).collect();
        let shard = other.with(Clone::clone).unwrap();
        let address = served.remove(0);
        let (at, listening) = (address.address.clone(), serve_options());
        // All of its connections are closed then: the next answer is the other's.
        address.stop().await;
        let listener = loop {
            match tokio::net::TcpListener::bind(&at).await {
                Ok(listener) => break listener,
                Err(_) => tokio::task::yield_now().await,
            }
        };
        let bulk_port = if bulk { Some(crate::support::listener().await) } else { None };
        let serving = memory_service::ServeOptions { bulk: bulk_port, ..listening };
        let _served = Served::start_at(listener, shard, serving);
        let found = bank.read(Step(1), &all_ids()).await.unwrap();
        for (block, (id, values)) in found.iter().zip(expected) {
            assert!(block.id == id && block.values == *values, "bulk {bulk}, block {id}");
        }
        assert_eq!(read_since(&bank, &mut before), (all_bytes(4), 0), "bulk {bulk}");
    }
}

/// Who does not say what it holds is told no versions, as before there were any.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_knows_no_versions_is_told_none() {
    let served = Served::start(options(1, Placement::WHOLE), serve_options()).await;
    for (held, version, payload) in
        [(vec![], 0, true), (vec![0], 1, true), (vec![9], 1, true), (vec![1], 1, false)]
    {
        let request = FetchRequest {
            identity: Some(wire_identity(0, 1)),
            blocks: vec![memory_service::proto::BlockId { level: 2, index: 5 }],
            held,
            ..FetchRequest::default()
        };
        let mut pieces = client(&served).await.fetch(request).await.unwrap().into_inner();
        let piece = pieces.message().await.unwrap().unwrap();
        assert_eq!((piece.id, piece.version), (id(2, 5), version));
        assert_eq!(piece.total_bytes > 0, payload);
        assert_eq!(piece.payload == memory_service::Payload::default(), !payload);
        assert!(pieces.message().await.unwrap().is_none());
    }
    let request = FetchRequest {
        identity: Some(wire_identity(0, 1)),
        blocks: vec![memory_service::proto::BlockId { level: 2, index: 5 }],
        held: vec![1, 1],
        ..FetchRequest::default()
    };
    let refused = client(&served).await.fetch(request).await.unwrap_err();
    assert_eq!(refused.message(), "versions of 2 blocks held, expected 1 or none");
}
