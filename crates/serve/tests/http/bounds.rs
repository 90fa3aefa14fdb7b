//! Bounds of size, number and time; clients that are slow, that go away, and a server that is told to stop.

use std::time::Duration;

use generate::engine::EngineOptions;
use serve::http::HttpLimits;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::world::{Server, Setting, read_all, read_reply};

fn with(limits: HttpLimits) -> Setting {
    Setting { limits, ..Setting::default() }
}

/// What runs for as long as the test needs: 500 tokens, and none of them ends it.
const LONG_BODY: &str = r#"{"prompt": "a", "max_tokens": 500, "ignore_eos": true, "stream": true}"#;

/// Until the engine is as a test expects.
async fn until(server: &Server, done: impl Fn(&generate::engine::EngineStats) -> bool) {
    for _ in 0..20_000 {
        if done(&server.engine.stats()) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("not reached: {:?}", server.engine.stats());
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_and_batches_beyond_the_bounds_are_refused() {
    let limits =
        HttpLimits { body_kib: 1, sequences: 4, prompt_tokens: 8, texts: 2, ..HttpLimits::default() };
    let server = Server::start(with(limits)).await;
    let large = format!("{{\"prompt\": \"{}\"}}", "x".repeat(2000));
    let reply = server.post("/v1/completions", &large).await;
    assert_eq!((reply.status, reply.header("connection")), (413, Some("close")), "{}", reply.text());
    assert!(reply.message().contains("more than 1024 bytes"));
    // Without a length in the head, too.
    let mut tcp = server.connect().await;
    let chunk = format!("{:x}\r\n{}\r\n", 600, "x".repeat(600));
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
    tcp.write_all(format!("{head}{chunk}{chunk}").as_bytes()).await.unwrap();
    assert_eq!(read_reply(&mut tcp).await.status, 413);
    let table = [
        (
            "/v1/completions",
            r#"{"prompt": ["a", "b", "c"], "n": 2}"#,
            "at most 4 prompts times n, found 3 times 2",
        ),
        (
            "/v1/completions",
            r#"{"prompt": "a long prompt of many more tokens 0123456789"}"#,
            "at most 8 tokens",
        ),
        ("/v1/route", r#"{"texts": ["a", "b", "c"]}"#, "expected 1 to 2, found 3"),
        ("/v1/embeddings", r#"{"input": ["a", "b", "c"]}"#, "expected 1 to 2 texts, found 3"),
    ];
    for (path, body, part) in table {
        let reply = server.post(path, body).await;
        assert_eq!(reply.status, 400);
        assert!(reply.message().contains(part), "{}", reply.message());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_clients_are_told_or_closed_in_time() {
    let limits = HttpLimits { header_s: 1, body_s: 1, ..HttpLimits::default() };
    let server = Server::start(with(limits)).await;
    // A head that does not end.
    let mut half_head = server.connect().await;
    half_head.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-slow: ").await.unwrap();
    // A body that does not end.
    let mut half_body = server.connect().await;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"prompt\":";
    half_body.write_all(head.as_bytes()).await.unwrap();
    // Nothing at all, and nothing after an answer.
    let mut silent = server.connect().await;
    let mut idle = server.connect().await;
    idle.write_all(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let reply = read_reply(&mut half_body).await;
    assert_eq!((reply.status, reply.header("connection")), (408, Some("close")));
    assert!(reply.message().contains("the body was not there after 1 s"));
    let told = read_all(&mut half_head).await;
    assert!(told.is_empty() || told.starts_with(b"HTTP/1.1 408"), "{told:?}");
    assert!(read_all(&mut silent).await.is_empty());
    assert!(read_all(&mut idle).await.starts_with(b"HTTP/1.1 200"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_cancels_its_sequences() {
    let server = Server::start(Setting::default()).await;
    for stream in [true, false] {
        let body = LONG_BODY.replace("true}", &format!("{stream}, \"n\": 8}}"));
        let cancelled = server.engine.stats().cancelled;
        let mut tcp = server.connect().await;
        let head =
            format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
        tcp.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
        until(&server, |stats| stats.running > 0).await;
        drop(tcp);
        until(&server, |stats| stats.running == 0 && stats.waiting == 0).await;
        let stats = server.engine.stats();
        assert!(stats.cancelled > cancelled, "{stats:?}");
        assert_eq!(stats.free_pages, stats.total_pages);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_says_when_to_come_back() {
    let engine = EngineOptions { max_sequences: 1, max_waiting: 1, kv_mib: 4, ..EngineOptions::default() };
    let server = Server::start(Setting { engine, ..Setting::default() }).await;
    let mut held = vec![];
    for running in [0, 1] {
        let mut tcp = server.connect().await;
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
            LONG_BODY.len()
        );
        tcp.write_all(format!("{head}{LONG_BODY}").as_bytes()).await.unwrap();
        until(&server, |stats| stats.running + stats.waiting > running).await;
        held.push(tcp);
    }
    let body = r#"{"prompt": ["a", "b", "c"], "max_tokens": 400, "ignore_eos": true}"#;
    let reply = server.post("/v1/completions", body).await;
    assert_eq!(reply.status, 429, "{}", reply.text());
    assert!(reply.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
    assert_eq!(reply.json()["error"]["type"], "rate_limit_error");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_has_a_time_and_many_have_a_number() {
    let limits = HttpLimits { requests: 1, ..HttpLimits::default() };
    let server = Server::start(with(limits)).await;
    let mut first = server.connect().await;
    // It counts from its head on, and waits for a body that does not come. What operators ask is not counted.
    first
        .write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n")
        .await
        .unwrap();
    let mut refused = None;
    for _ in 0..1000 {
        let reply = server.get("/v1/models").await;
        if reply.status == 429 {
            refused = Some(reply);
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let refused = refused.expect("a second request is refused");
    assert!(refused.message().contains("1 requests run already"));
    assert_eq!(server.get("/live").await.status, 200);
    drop(first);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_is_finished_when_the_server_stops() {
    let mut server = Server::start(Setting::default()).await;
    let mut streaming = server.connect().await;
    let body = LONG_BODY.replace("500", "200");
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    streaming.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    let mut idle = server.connect().await;
    idle.write_all(b"GET /ready HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut first = [0; 16];
    streaming.read_exact(&mut first).await.unwrap();
    let stopped = server.stop();
    let rest = read_all(&mut streaming).await;
    assert!(rest.windows(6).any(|six| six == b"[DONE]"), "the stream was finished");
    stopped.await.unwrap();
    assert!(tokio::net::TcpStream::connect(server.address).await.is_err(), "nothing is accepted any more");
    read_all(&mut idle).await;
}
