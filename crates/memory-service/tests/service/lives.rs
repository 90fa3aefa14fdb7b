//! What a client is told when the blocks of a shard are not those that it knew.

use std::sync::Arc;
use std::time::Duration;

use memory_bank::{BlockStore, Placement, Step};
use memory_service::proto::OpenBulkRequest;
use memory_service::{RemoteBank, RemoteOptions, ServeOptions};
use object_store::memory::InMemory;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tonic::Code;

use crate::checkpoints::store;
use crate::refusals::{client, wire_identity};
use crate::support::{
    Served, all_ids, bits, gradients, listener, options, reference, remote, serve_options, spec,
};

async fn serving(objects: &Arc<InMemory>, bulk: bool) -> ServeOptions {
    let bulk = if bulk { Some(listener().await) } else { None };
    ServeOptions { store: Some(store(objects).await), bulk, ..serve_options() }
}

async fn start(objects: &Arc<InMemory>, world_size: usize, bulk: bool) -> Served {
    Served::start(options(world_size, Placement::WHOLE), serving(objects, bulk).await).await
}

/// A shard at the same address, with the blocks of the newest checkpoint.
async fn start_again(served: Served, objects: &Arc<InMemory>, bulk: bool) -> Served {
    let address = served.address.clone();
    served.kill();
    let store = store(objects).await;
    let latest = store.store.latest().await.unwrap().unwrap();
    let shard = latest.load(&store.identity, options(1, Placement::WHOLE)).await.unwrap();
    let listener = loop {
        // The task that is aborted has yet to let go of the port.
        match TcpListener::bind(&address).await {
            Ok(listener) => break listener,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    Served::start_at(listener, shard, serving(objects, bulk).await)
}

/// A shard of one worker after two steps, which it has saved.
async fn saved_at_2(bulk: bool) -> (Arc<InMemory>, Served, RemoteBank) {
    let objects = Arc::new(InMemory::new());
    let served = start(&objects, 1, bulk).await;
    let bank = RemoteBank::connect(remote(std::slice::from_ref(&served))).await.unwrap();
    push(&bank, 1..=2, 1).await;
    bank.save(Step(2)).await.unwrap();
    (objects, served, bank)
}

/// A wait for what never comes fails a test.
async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), work).await.expect("an answer")
}

async fn push(bank: &RemoteBank, steps: std::ops::RangeInclusive<u64>, world_size: usize) {
    for step in steps {
        for rank in 0..world_size {
            soon(bank.push(Step(step), rank, gradients(step, rank))).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_comes_back_with_less_than_it_was_given_says_so_at_once() {
    for bulk in [false, true] {
        let (objects, served, bank) = saved_at_2(bulk).await;
        let reader = RemoteBank::connect(remote(std::slice::from_ref(&served))).await.unwrap();
        soon(reader.fetch(Step(0), &all_ids())).await.unwrap();
        push(&bank, 3..=3, 1).await;

        let served = start_again(served, &objects, bulk).await;
        let lost = "came back at step 2: what it was given since, up to step 3, is lost";
        let error = soon(bank.fetch(Step(3), &all_ids())).await.unwrap_err().to_string();
        assert!(error.contains(lost) && error.contains(&served.address), "{error}");
        let error = soon(bank.push(Step(4), 0, gradients(4, 0))).await.unwrap_err().to_string();
        assert!(error.contains(lost), "{error}");
        let error = soon(bank.save(Step(3))).await.unwrap_err().to_string();
        assert!(error.contains(lost), "{error}");
        // Who relies on no step reads what is there.
        let found = soon(reader.fetch(Step(0), &all_ids())).await.unwrap();
        assert!(bits(&found) == bits(&reference(2, 1)), "bulk {bulk}");

        assert_eq!(bank.restore(None).await.unwrap(), Step(2));
        push(&bank, 3..=4, 1).await;
        let found = soon(bank.fetch(Step(4), &all_ids())).await.unwrap();
        assert!(bits(&found) == bits(&reference(4, 1)), "bulk {bulk}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_comes_back_with_all_that_it_was_given_is_gone_on_with() {
    for bulk in [false, true] {
        let (objects, served, bank) = saved_at_2(bulk).await;
        let _served = start_again(served, &objects, bulk).await;
        push(&bank, 3..=3, 1).await;
        let found = soon(bank.fetch(Step(3), &all_ids())).await.unwrap();
        assert!(bits(&found) == bits(&reference(3, 1)), "bulk {bulk}");
        assert!(bank.stats().retries > 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_ends_what_others_wait_for_and_takes_nothing_from_before() {
    for bulk in [false, true] {
        let objects = Arc::new(InMemory::new());
        let served = start(&objects, 2, bulk).await;
        let connect = || RemoteBank::connect(remote(std::slice::from_ref(&served)));
        let (first, second) = (connect().await.unwrap(), connect().await.unwrap());
        push(&first, 1..=2, 2).await;
        first.save(Step(2)).await.unwrap();
        // Of the second rank's push nothing is known, so this waits.
        first.push(Step(3), 0, gradients(3, 0)).await.unwrap();
        let waiting = first.prefetch(Step(3), &all_ids());
        assert_eq!(second.restore(None).await.unwrap(), Step(2));
        let lost = "came back at step 2: what it was given since, up to step 3, is lost";
        let error = soon(waiting).await.unwrap().unwrap_err().to_string();
        assert!(error.contains(lost), "{error}");
        // A push of before, late: with those of now it would make a step.
        let error = soon(first.push(Step(3), 0, gradients(9, 0))).await.unwrap_err().to_string();
        assert!(error.contains(lost), "{error}");
        push(&second, 3..=5, 2).await;
        let found = soon(second.fetch(Step(5), &all_ids())).await.unwrap();
        assert!(bits(&found) == bits(&reference(5, 2)), "bulk {bulk}");
    }
}

/// The restore comes between the beginning of a push and its end, which only the bulk stream's first reply
/// lets a test tell apart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_that_is_on_its_way_when_the_blocks_are_replaced_is_not_taken() {
    let objects = Arc::new(InMemory::new());
    let bulk = listener().await;
    let port = bulk.local_addr().unwrap();
    let serving = ServeOptions { bulk: Some(bulk), ..serving(&objects, false).await };
    let served = Served::start(options(2, Placement::WHOLE), serving).await;
    let bank = RemoteBank::connect(remote(std::slice::from_ref(&served))).await.unwrap();
    push(&bank, 1..=1, 2).await;
    bank.save(Step(1)).await.unwrap();

    let request = OpenBulkRequest { identity: Some(wire_identity(0, 1)) };
    let ticket = client(&served).await.open_bulk(request).await.unwrap().into_inner().ticket;
    let mut stream = TcpStream::connect(port).await.unwrap();
    let len = spec().block_len(0);
    let mut head = [0; 24];
    // A push of f32, of one block, of rank 0 in step 2.
    (head[0], head[1], head[4], head[8]) = (2, 1, 1, 2);
    let entry = [&[0; 8][..], &(4 * len as u64).to_le_bytes()].concat();
    stream.write_all(&[&ticket[..], &head, &entry].concat()).await.unwrap();
    let mut reply = [0; 16];
    stream.read_exact(&mut reply).await.unwrap();
    assert_eq!(reply[0], Code::Ok as u8, "the shard waits for the block");
    assert_eq!(bank.restore(None).await.unwrap(), Step(1));
    stream.write_all(&vec![0; 4 * len]).await.unwrap();
    stream.read_exact(&mut reply).await.unwrap();
    assert_eq!(reply[0], Code::Aborted as u8);
    // The step is made of what is pushed now.
    push(&bank, 2..=2, 2).await;
    let found = soon(bank.fetch(Step(2), &all_ids())).await.unwrap();
    assert!(bits(&found) == bits(&reference(2, 2)));
}

/// As of a job that was started again elsewhere while the one before still runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_later_attempt_at_a_run_ends_what_an_earlier_one_may_ask() {
    for bulk in [false, true] {
        let objects = Arc::new(InMemory::new());
        let served = start(&objects, 2, bulk).await;
        let connect =
            |attempt| RemoteBank::connect(RemoteOptions { attempt, ..remote(std::slice::from_ref(&served)) });
        let (first, same) = (connect(5).await.unwrap(), connect(5).await.unwrap());
        push(&first, 1..=1, 2).await;
        push(&same, 2..=2, 2).await;
        first.save(Step(2)).await.unwrap();
        // A part of the next step is there, and another is waited for.
        first.push(Step(3), 0, gradients(9, 0)).await.unwrap();
        let waiting = first.prefetch(Step(3), &all_ids());
        let second = connect(6).await.unwrap();
        assert!(second.is_after(Step(2)).await.unwrap(), "what waited is still there");
        let over = "attempt 5 was taken over by attempt 6: another job trains on this shard";
        let errors = [
            soon(waiting).await.unwrap().map(drop),
            soon(first.push(Step(3), 1, gradients(9, 1))).await,
            soon(first.save(Step(2))).await,
            soon(first.restore(Some(Step(2)))).await.map(drop),
            soon(same.fetch(Step(0), &all_ids())).await.map(drop),
            connect(5).await.map(drop),
        ];
        for error in errors {
            let error = error.unwrap_err();
            assert!(error.to_string().contains(over), "bulk {bulk}: {error}");
            assert!(matches!(error, memory_bank::Error::Remote { is_transient: false, .. }), "{error}");
        }
        second.restore(Some(Step(2))).await.unwrap();
        push(&second, 3..=4, 2).await;
        second.save(Step(4)).await.unwrap();
        let found = soon(second.fetch(Step(4), &all_ids())).await.unwrap();
        assert!(bits(&found) == bits(&reference(4, 2)), "bulk {bulk}");
        // Who is of no attempt reads what is there.
        let found = soon(connect(0).await.unwrap().fetch(Step(4), &all_ids())).await.unwrap();
        assert!(bits(&found) == bits(&reference(4, 2)), "bulk {bulk}");
    }
}

/// A shard that was started again knows no attempts: what an earlier one pushes there before the later one is
/// back is not taken for the later one's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_earlier_attempt_pushes_to_a_shard_started_again_is_told_to_the_later_one() {
    for bulk in [false, true] {
        let objects = Arc::new(InMemory::new());
        let served = start(&objects, 1, bulk).await;
        let connect =
            |attempt| RemoteBank::connect(RemoteOptions { attempt, ..remote(std::slice::from_ref(&served)) });
        let (first, second) = (connect(5).await.unwrap(), connect(6).await.unwrap());
        push(&second, 1..=2, 1).await;
        second.save(Step(2)).await.unwrap();
        let served = start_again(served, &objects, bulk).await;
        push(&first, 3..=3, 1).await;
        let told = "is at step 3, of which this worker has pushed 2: another attempt has pushed since";
        let error = soon(second.fetch(Step(2), &all_ids())).await.unwrap_err().to_string();
        assert!(error.contains(told) && error.contains(&served.address), "bulk {bulk}: {error}");
        second.restore(Some(Step(2))).await.unwrap();
        push(&second, 3..=4, 1).await;
        let found = soon(second.fetch(Step(4), &all_ids())).await.unwrap();
        assert!(bits(&found) == bits(&reference(4, 1)), "bulk {bulk}");
        let error = soon(first.push(Step(5), 0, gradients(9, 0))).await.unwrap_err().to_string();
        assert!(error.contains("attempt 5 was taken over by attempt 6"), "bulk {bulk}: {error}");
    }
}
