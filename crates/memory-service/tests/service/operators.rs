//! What operators see: health, metrics, reflection.

use std::collections::BTreeMap;
use std::sync::Arc;

use memory_bank::{BlockStore, Placement, Step};
use memory_service::{READY, RemoteBank, ServeOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::checkpoints::store;
use crate::support::{Served, gradients, id, listener, options, remote, serve_options, spec};

async fn get(address: std::net::SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_tell_what_was_done() {
    let (http, bulk) = (listener().await, listener().await);
    let address = http.local_addr().unwrap();
    let store = Some(store(&Arc::default()).await);
    let serving = ServeOptions { http: Some(http), bulk: Some(bulk), store, ..serve_options() };
    let served = [Served::start(options(2, Placement::WHOLE), serving).await];
    for bulk in [true, false] {
        let mut options = remote(&served);
        options.bulk = bulk;
        let bank = RemoteBank::connect(options).await.unwrap();
        bank.fetch(Step(0), &[id(0, 0), id(2, 1), id(2, 2)]).await.unwrap();
    }
    let bank = RemoteBank::connect(remote(&served)).await.unwrap();
    bank.push(Step(1), 1, gradients(1, 1)).await.unwrap();
    let text = get(address, "/metrics").await;
    assert!(text.contains("anchorage_shard_fence_lag_steps 1\n"), "{text}");
    bank.push(Step(1), 0, gradients(1, 0)).await.unwrap();
    assert!(bank.push(Step(7), 0, vec![]).await.is_err());
    bank.save(Step(1)).await.unwrap();

    let text = get(address, "/metrics").await;
    let sent = 2 * 4 * (spec().block_len(0) + 2 * spec().block_len(2));
    let saved: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix("anchorage_shard_saved_bytes_total "))
        .map(|n_bytes| n_bytes.parse().unwrap())
        .unwrap();
    // Weights and moments of what was pushed, and little beside.
    let pushed = [0, 1].map(|rank| gradients(1, rank)).concat();
    let ids: BTreeMap<_, _> = pushed.iter().map(|block| (block.id, block.values.len())).collect();
    let expected = 3 * 4 * ids.values().sum::<usize>() as u64;
    assert!((expected..expected + 4096).contains(&saved), "{saved} bytes, expected {expected}");
    for line in [
        "anchorage_shard_applied_step 1".to_owned(),
        "anchorage_shard_fence_lag_steps 0".to_owned(),
        "anchorage_shard_fetched_blocks_total{level=\"0\"} 2".to_owned(),
        "anchorage_shard_fetched_blocks_total{level=\"2\"} 4".to_owned(),
        format!("anchorage_shard_block_bytes_total{{direction=\"sent\"}} {sent}"),
        "anchorage_shard_request_seconds_count{call=\"fetch\"} 2".to_owned(),
        "anchorage_shard_requests_total{call=\"push\",code=\"ok\"} 2".to_owned(),
        "anchorage_shard_requests_total{call=\"push\",code=\"failed_precondition\"} 1".to_owned(),
    ] {
        assert!(text.contains(&format!("{line}\n")), "no {line} in {text}");
    }
    assert!(get(address, "/live").await.starts_with("HTTP/1.1 200"));
    assert!(get(address, "/ready").await.starts_with("HTTP/1.1 200"));
    assert!(get(address, "/elsewhere").await.starts_with("HTTP/1.1 404"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_tells_live_and_ready_apart() {
    let served = Served::start(options(1, Placement::WHOLE), serve_options()).await;
    let channel = Channel::from_shared(format!("http://{}", served.address)).unwrap().connect_lazy();
    let mut health = HealthClient::new(channel);
    let mut watched =
        health.watch(HealthCheckRequest { service: READY.to_owned() }).await.unwrap().into_inner();
    let status = watched.message().await.unwrap().unwrap().status();
    assert_eq!(status, ServingStatus::Serving);
    let live = HealthCheckRequest { service: String::new() };
    assert_eq!(health.check(live).await.unwrap().into_inner().status(), ServingStatus::Serving);
    // A shard that stops says so to those who watch, before it is gone.
    let stopping = tokio::spawn(served.stop());
    let status = watched.message().await.unwrap().unwrap().status();
    assert_eq!(status, ServingStatus::NotServing);
    drop((watched, health));
    stopping.await.unwrap();
}
