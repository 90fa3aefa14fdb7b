//! Connections whose other end is gone without a word: nothing sent into them arrives, and nothing comes.

use memory_bank::{BlockStore, Step};
use memory_service::RemoteBank;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::support::{all_ids, bits, gradients, listener, options, reference, remote, serve_options};

/// Leads from a port of 127.0.0.2 to the same one of 127.0.0.1, until it is cut: the connections of then stay
/// open at both ends, and carry nothing any more.
async fn link(port: u16, cut: watch::Receiver<u32>) {
    let listener = TcpListener::bind(("127.0.0.2", port)).await.unwrap();
    tokio::spawn(async move {
        while let Ok((mut from, _)) = listener.accept().await {
            let mut cut = cut.clone();
            cut.mark_unchanged();
            tokio::spawn(async move {
                let mut to = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                tokio::select! {
                    _ = copy_bidirectional(&mut from, &mut to) => return,
                    changed = cut.changed() => changed.unwrap(),
                }
                // Both ends stay open for as long as the test runs.
                let _ = cut.wait_for(|_| false).await;
            });
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_costs_tries_and_no_push() {
    for bulk in [false, true] {
        let mut serving = serve_options();
        let bulk_listener = listener().await;
        let mut ports = vec![];
        if bulk {
            ports.push(bulk_listener.local_addr().unwrap().port());
            serving.bulk = Some(bulk_listener);
        }
        let placement = memory_bank::Placement::WHOLE;
        let served = [crate::support::Served::start(options(1, placement), serving).await];
        ports.push(served[0].address.rsplit_once(':').unwrap().1.parse().unwrap());
        let (cut, is_cut) = watch::channel(0);
        for &port in &ports {
            link(port, is_cut.clone()).await;
        }

        let mut remote = remote(&served);
        remote.shards[0] = remote.shards[0].replace("127.0.0.1", "127.0.0.2");
        (remote.request_s, remote.silent_s, remote.streams) = (1, 2, 1);
        let bank = RemoteBank::connect(remote).await.unwrap();
        for step in 1..=4 {
            bank.fetch(Step(step - 1), &all_ids()).await.unwrap();
            if step == 2 {
                // Between two requests.
                cut.send_modify(|n| *n += 1);
            }
            let push = bank.push(Step(step), 0, gradients(step, 0));
            if step == 4 {
                // With one under way.
                let cutting = async {
                    tokio::task::yield_now().await;
                    cut.send_modify(|n| *n += 1);
                };
                tokio::join!(async { push.await.unwrap() }, cutting);
            } else {
                push.await.unwrap();
            }
        }
        let blocks = bank.fetch(Step(4), &all_ids()).await.unwrap();
        assert!(bits(&blocks) == bits(&reference(4, 1)), "bulk {bulk}");
        assert!(bank.stats().retries > 0);
    }
}
