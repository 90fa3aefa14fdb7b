//! A bank that is swapped while others ask.

use std::sync::atomic::{AtomicBool, Ordering};

use futures::future::join_all;
use serde_json::json;

use crate::world::{Server, Setting};

const OPS: &str = "0123456789abcdef-ops";
const KEYS: &str = "[[key]]\nname = \"ops\"\ntoken = \"0123456789abcdef-ops\"\nrole = \"admin\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn no_request_fails_while_a_bank_is_swapped_under_load() {
    let server = Server::start(Setting { keys: Some(KEYS), ..Setting::default() }).await;
    let done = AtomicBool::new(false);
    let asks = (0..4).map(|i| {
        let (server, done) = (&server, &done);
        async move {
            let mut steps = vec![];
            let body = json!({"prompt": ["a", "b"], "max_tokens": 4, "seed": i}).to_string();
            while !done.load(Ordering::Relaxed) {
                let reply = server.send("POST", "/v1/completions", OPS, body.as_bytes()).await;
                assert_eq!(reply.status, 200, "{}", reply.text());
                let step = reply.json()["anchorage"]["step"].as_u64().unwrap();
                assert!([1, 2].contains(&step));
                steps.push(step);
            }
            steps
        }
    });
    let swaps = async {
        for i in 0..30 {
            let body = json!({"source": server.banks[(i + 1) % 2]}).to_string();
            let reply = server.send("POST", "/v1/banks", OPS, body.as_bytes()).await;
            assert_eq!(reply.status, 200, "{}", reply.text());
        }
        done.store(true, Ordering::Relaxed);
    };
    let (steps, ()) = tokio::join!(join_all(asks), swaps);
    let steps = steps.concat();
    assert!(steps.contains(&1) && steps.contains(&2), "{} requests saw one bank only", steps.len());
}
