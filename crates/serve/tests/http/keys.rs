//! Two keys with different block-lists, an admin, and rates.

use serde_json::json;

use crate::world::{Server, Setting, write_private};

const LAB: &str = "0123456789abcdef-lab";
const ART: &str = "0123456789abcdef-art";
const OPS: &str = "0123456789abcdef-ops";

const KEYS: &str = r#"
[[key]]
name = "lab"
token = "0123456789abcdef-lab"
blocked = ["0/1", "0/0"]
[[key]]
name = "art"
token = "0123456789abcdef-art"
blocked = ["1"]
requests_per_minute = 6
[[key]]
name = "ops"
token = "0123456789abcdef-ops"
role = "admin"
"#;

#[tokio::test(flavor = "multi_thread")]
async fn each_key_has_its_own_memory_and_its_own_rate() {
    let server = Server::start(Setting { keys: Some(KEYS), ..Setting::default() }).await;
    let ask = async |key: &str, body: serde_json::Value| {
        server.send("POST", "/v1/completions", key, body.to_string().as_bytes()).await
    };
    for (key, part) in [("", "found none"), ("wrong", "the API key is not known")] {
        let reply = ask(key, json!({"prompt": "a"})).await;
        assert_eq!((reply.status, reply.header("www-authenticate")), (401, Some("Bearer")));
        assert!(reply.message().contains(part), "{}", reply.message());
        assert_eq!(reply.json()["error"]["code"], "invalid_api_key");
    }
    // The nearest leaf of "a" is 0/1: lab gets the next one, art that itself.
    let body = json!({"prompt": "a", "max_tokens": 1});
    let told = ask(LAB, body.clone()).await.json()["anchorage"].clone();
    assert_eq!((&told["path"], &told["blocked"][0]), (&json!("0/2"), &json!("0/1")), "{told}");
    let told = ask(ART, body.clone()).await.json()["anchorage"].clone();
    assert_eq!((&told["path"], &told["blocked"]), (&json!("0/1"), &json!([])));
    // All that is near "b" is blocked for art.
    let told = ask(ART, json!({"prompt": "b", "max_tokens": 1})).await.json()["anchorage"].clone();
    assert!(told["path"].as_str().is_none_or(|path| !path.starts_with("1/")), "{told}");
    assert_eq!(told["blocked"][0], "1");
    let refused = ask(ART, json!({"prompt": "b", "memory": "1/4"})).await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (403, &json!("memory_blocked")));
    let refused = server.send("POST", "/v1/retrieve", ART, br#"{"path": "1/4"}"#).await;
    assert_eq!(refused.status, 403);
    assert_eq!(server.send("POST", "/v1/retrieve", LAB, br#"{"path": "1/4"}"#).await.status, 200);
    let told = server.send("GET", "/v1/explain/1", LAB, b"").await;
    assert_eq!((told.status, &told.json()["path"]), (200, &json!("1")));
    for path in ["/v1/explain/0/1", "/v1/explain/0/0"] {
        assert_eq!(server.send("GET", path, LAB, b"").await.status, 403, "{path}");
    }
    // Art has asked four times, and may ask six times a minute.
    for _ in 0..2 {
        assert_eq!(ask(ART, body.clone()).await.status, 200);
    }
    let refused = ask(ART, body.clone()).await;
    assert_eq!(refused.status, 429);
    assert!((1..=10).contains(&refused.header("retry-after").unwrap().parse::<u64>().unwrap()));
    assert_eq!(ask(LAB, body).await.status, 200);
    for path in ["/live", "/metrics", "/"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn banks_are_changed_by_admins_only() {
    let server = Server::start(Setting { keys: Some(KEYS), ..Setting::default() }).await;
    let body = json!({"name": "next", "source": server.banks[1]}).to_string();
    let refused = server.send("POST", "/v1/banks", LAB, body.as_bytes()).await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (403, &json!("admin_only")));
    let loaded = server.send("POST", "/v1/banks", OPS, body.as_bytes()).await;
    assert_eq!((loaded.status, &loaded.json()["step"]), (200, &json!(2)), "{}", loaded.text());
    let list = server.send("GET", "/v1/banks", LAB, b"").await.json();
    assert_eq!(list["banks"].as_array().unwrap().len(), 2);
    assert!(list["banks"][0].get("source").is_none(), "where a bank is, is for admins");
    let next =
        server.send("POST", "/v1/completions", LAB, br#"{"prompt": "b", "bank": "next"}"#).await.json();
    assert_eq!((&next["anchorage"]["bank"], &next["anchorage"]["step"]), (&json!("next"), &json!(2)));
    assert_eq!(server.send("DELETE", "/v1/banks/next", LAB, b"").await.status, 403);
    assert_eq!(server.send("DELETE", "/v1/banks/next", OPS, b"").await.status, 200);
    assert_eq!(server.send("DELETE", "/v1/banks/next", OPS, b"").await.status, 404);
    let wrong = json!({"source": "/nowhere/memory"}).to_string();
    let wrong = server.send("POST", "/v1/banks", OPS, wrong.as_bytes()).await;
    assert_eq!(wrong.status, 400);
    assert!(wrong.message().contains("/nowhere/memory"), "{}", wrong.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_keys_that_changes_counts_within_a_moment() {
    let server = Server::start(Setting { keys: Some(KEYS), ..Setting::default() }).await;
    assert_eq!(server.send("GET", "/v1/models", LAB, b"").await.status, 200);
    let file = server.dir.path().join("keys.toml");
    write_private(&file, &KEYS.replace(LAB, "0123456789abcdef-new"));
    for _ in 0..200 {
        if server.send("GET", "/v1/models", LAB, b"").await.status == 401 {
            assert_eq!(server.send("GET", "/v1/models", "0123456789abcdef-new", b"").await.status, 200);
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    panic!("the old key is taken still");
}
