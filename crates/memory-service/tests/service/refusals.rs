//! What a shard does not do, and what it says then.

use std::time::Duration;

use bytes::Bytes;
use memory_bank::{BlockStore, Placement, Step};
use memory_service::proto::memory_service_client::MemoryServiceClient;
use memory_service::proto::{BankIdentity, BlockId, FetchRequest, OpenBulkRequest, PushHead};
use memory_service::{Limits, Payload, PushPiece, RemoteBank, Retry};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::support::{
    Served, bits, gradients, id, identity, listener, options, remote, serve_options, shards, spec,
};

pub(crate) async fn client(served: &Served) -> MemoryServiceClient<Channel> {
    MemoryServiceClient::new(
        Channel::from_shared(format!("http://{}", served.address)).unwrap().connect_lazy(),
    )
}

pub(crate) fn wire_identity(shard: u32, n_shards: u32) -> BankIdentity {
    let identity = identity();
    BankIdentity {
        attempt: 0,
        bank: identity.bank,
        spec: identity.spec,
        hashes: identity.hashes.into_iter().collect(),
        shard,
        n_shards,
        life: 0,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_of_another_bank_is_refused_and_both_values_are_named() {
    let served = shards(1, 1, false).await;
    let refused = async |change: &dyn Fn(&mut BankIdentity)| {
        let mut identity = wire_identity(0, 1);
        change(&mut identity);
        let request = FetchRequest { identity: Some(identity), ..FetchRequest::default() };
        let status = client(&served[0]).await.fetch(request).await.err().unwrap();
        assert_eq!(status.code(), Code::FailedPrecondition);
        status.message().to_owned()
    };
    let found = refused(&|identity| identity.bank = "other".into()).await;
    assert_eq!(found, "bank is bank here and other in the request");
    let found = refused(&|identity| drop(identity.hashes.insert("tree".into(), "zz".into()))).await;
    assert_eq!(found, "hash of tree is a1 here and zz in the request");
    let found = refused(&|identity| drop(identity.hashes.remove("anchor"))).await;
    assert_eq!(found, "hash of anchor is b2 here and missing in the request");
    let found = refused(&|identity| identity.spec = "5".into()).await;
    assert_eq!(found, format!("hash of the bank's spec is {} here and 5 in the request", spec().hash()));
    let found = refused(&|identity| identity.n_shards = 2).await;
    assert_eq!(found, "number of shards is 1 here and 2 in the request");

    // A client finds out when it connects, and names the address.
    let mut options = remote(&served);
    options.identity.hashes.insert("tree".into(), "zz".into());
    let error = RemoteBank::connect(options).await.err().unwrap().to_string();
    assert!(
        error.contains(&served[0].address) && error.contains("hash of tree is zz here and a1"),
        "{error}"
    );
    let swapped = shards(2, 1, false).await;
    let mut options = remote(&swapped);
    options.shards.swap(0, 1);
    let error = RemoteBank::connect(options).await.err().unwrap().to_string();
    // Whichever answers first.
    assert!(error.contains("shard is 0 here and 1") || error.contains("shard is 1 here and 0"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_that_are_not_the_shards_are_refused() {
    let served = shards(2, 1, true).await;
    for bulk in [false, true] {
        let mut options = remote(&served);
        options.bulk = bulk;
        let bank = RemoteBank::connect(options).await.unwrap();
        let error = bank.fetch(Step(0), &[id(2, 12)]).await.err().unwrap().to_string();
        assert_eq!(error, "no block level2/12: level 2 has 12 blocks");
        // Nothing of a push with a wrong gradient is applied.
        let mut wrong = gradients(1, 0);
        wrong[0].values[3] = f32::NAN;
        let error = bank.push(Step(1), 0, wrong).await.err().unwrap().to_string();
        assert!(error.contains("has NaN at position 3"), "{error}");
        let error = bank.push(Step(2), 0, Vec::new()).await.err().unwrap().to_string();
        assert!(error.contains("push of step 2, but steps up to 0 are applied: expected 1"), "{error}");
        let error = bank.push(Step(1), 5, Vec::new()).await.err().unwrap().to_string();
        assert!(error.contains("push from rank 5"), "{error}");
        let error = bank.save(Step(0)).await.err().unwrap().to_string();
        assert!(error.contains("no store for checkpoints"), "{error}");
    }
    assert!(served.iter().all(|shard| shard.live.applied() == Step(0)));
}

/// Sends a push of one block in these pieces and tells how it ended.
async fn push_pieces(served: &Served, pieces: Vec<PushPiece>) -> Status {
    let pushed = client(served).await.push(tokio_stream::iter(pieces)).await;
    pushed.expect_err("the push was taken")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_in_wrong_pieces_is_not_applied() {
    let served = &shards(1, 1, false).await[0];
    let block = BlockId { level: 2, index: 4 };
    let n_bytes = 4 * spec().block_len(2);
    let head =
        PushHead { identity: Some(wire_identity(0, 1)), step: 1, blocks: vec![block], ..PushHead::default() };
    let head = || PushPiece { head: Some(head.clone()), ..PushPiece::default() };
    let piece = |block, offset: usize, n_bytes: usize| PushPiece {
        block,
        offset: offset as u64,
        payload: Payload::Bytes(Bytes::from(vec![0; n_bytes])),
        ..PushPiece::default()
    };
    for (pieces, expected) in [
        (vec![], "begins with a head"),
        (vec![piece(0, 0, n_bytes)], "begins with a head"),
        (vec![head()], "ends at byte 0 of block level2/4"),
        (vec![head(), piece(0, 0, 8)], "ends at byte 8"),
        (vec![head(), piece(0, 4, 8)], "a piece of 8 bytes at byte 4 of place 0"),
        (vec![head(), piece(1, 0, 8)], "of place 1"),
        (vec![head(), piece(0, 0, n_bytes + 4)], "expected at most"),
        (vec![head(), piece(0, 0, 0)], "a piece of 0 bytes"),
        (vec![head(), head()], "a piece of 0 bytes"),
        (vec![head(), piece(0, 0, n_bytes), piece(0, n_bytes, 4)], "goes on after its last block"),
    ] {
        let status = push_pieces(served, pieces).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(expected), "{status} without {expected}");
    }
    assert_eq!(served.live.applied(), Step(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_beyond_the_bounds_are_refused_at_once() {
    let limits = Limits { fetches: 0, push_mib: 0, blocks_per_request: 3, ..Limits::default() };
    for bulk in [false, true] {
        let mut serving = serve_options();
        serving.limits = limits;
        if bulk {
            serving.bulk = Some(listener().await);
        }
        let served = [Served::start(options(1, Placement::WHOLE), serving).await];
        let mut options = remote(&served);
        options.retry = Retry { seconds: 0, ..Retry::default() };
        let bank = RemoteBank::connect(options).await.unwrap();
        let error = bank.fetch(Step(0), &[id(0, 0); 4]).await.err().unwrap().to_string();
        // The bulk stream ends: a request of that size is not read.
        assert!(
            error.contains(if bulk { "broke" } else { "4 blocks in one request, expected at most 3" }),
            "{error}"
        );
        let error = bank.fetch(Step(0), &[id(0, 0)]).await.err().unwrap().to_string();
        assert!(error.contains("InvalidArgument") || error.contains("1 fetches"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overload_is_refused_with_a_hint_and_retried() {
    let mut serving = serve_options();
    serving.limits = Limits { waiting: 1, ..Limits::default() };
    let served = [Served::start(options(1, Placement::WHOLE), serving).await];
    let bank = RemoteBank::connect(remote(&served)).await.unwrap();
    let request = || FetchRequest {
        identity: Some(wire_identity(0, 1)),
        after: 1,
        blocks: vec![BlockId { level: 0, index: 0 }],
        ..FetchRequest::default()
    };
    // One that comes again, should another be waiting when it arrives.
    let first = tokio::spawn({
        let bank = bank.clone();
        async move { bank.fetch(Step(1), &[id(0, 0)]).await }
    });
    let refused = loop {
        // Until the first one waits, this one would: give it a short time.
        let mut second = tonic::Request::new(request());
        second.set_timeout(Duration::from_millis(100));
        let status = client(&served[0]).await.fetch(second).await.err().unwrap();
        if status.code() == Code::ResourceExhausted {
            break status;
        }
    };
    assert_eq!(refused.message(), "1 of 1 waiting requests are in use");
    assert_eq!(refused.metadata().get("grpc-retry-pushback-ms").unwrap(), "50");
    // A client that is refused comes back, and succeeds once the step is there. Which of the two is
    // refused does not matter.
    let again = tokio::spawn({
        let bank = bank.clone();
        async move { bank.fetch(Step(1), &[id(0, 0)]).await }
    });
    while bank.stats().retries == 0 {
        tokio::task::yield_now().await;
    }
    bank.push(Step(1), 0, gradients(1, 0)).await.unwrap();
    first.await.unwrap().unwrap();
    let blocks = again.await.unwrap().unwrap();
    assert_eq!(bits(&blocks), bits(&crate::support::reference(1, 1)[..1]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bulk_stream_needs_its_ticket_and_minds_its_protocol() {
    let mut serving = serve_options();
    let bulk = listener().await;
    let address = bulk.local_addr().unwrap();
    serving.bulk = Some(bulk);
    let served = Served::start(options(1, Placement::WHOLE), serving).await;
    let ticket = async || {
        let request = OpenBulkRequest { identity: Some(wire_identity(0, 1)) };
        client(&served).await.open_bulk(request).await.unwrap().into_inner().ticket
    };
    // All that the shard answers to these bytes, until it closes the connection.
    let answer = async |bytes: &[u8]| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        // A connection that is reset has answered nothing.
        let _ = stream.read_to_end(&mut answer).await;
        answer
    };
    let refused = answer(&[0; 32]).await;
    assert_eq!(refused[0], Code::Unauthenticated as u8);
    let used = ticket().await;
    assert!(answer(&used).await.is_empty());
    assert_eq!(answer(&used).await[0], Code::Unauthenticated as u8, "a ticket opens one connection");

    let head = |kind: u8, dtype: u8, n_blocks: u32| {
        let mut head = [0; 24];
        (head[0], head[1]) = (kind, dtype);
        head[4..8].copy_from_slice(&n_blocks.to_le_bytes());
        head
    };
    for head in [head(0, 1, 0), head(4, 1, 0), head(1, 0, 0), head(1, 9, 0), head(1, 1, u32::MAX)] {
        let found = answer(&[&ticket().await[..], &head].concat()).await;
        assert!(found.is_empty(), "{head:?} was answered by {found:?}");
    }
    // A block of another size than the bank's is refused before anything is sent.
    let entry = [&[0; 8][..], &7u64.to_le_bytes()].concat();
    let found = answer(&[&ticket().await[..], &head(1, 1, 1), &entry].concat()).await;
    assert_eq!(found[0], Code::FailedPrecondition as u8);
    let text = String::from_utf8_lossy(&found[16..]);
    assert_eq!(text, format!("block level0/0 of 7 bytes, expected {}", 4 * spec().block_len(0)));
}
