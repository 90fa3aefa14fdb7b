//! Each error with its status and message, and input that is hostile.

use crate::world::{Server, Setting};

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_says_what_was_expected() {
    let server = Server::start(Setting::default()).await;
    let deep = format!("{}1{}", "[".repeat(5000), "]".repeat(5000));
    let table: [(&str, &str, &str, u16, &str); 24] = [
        ("POST", "/v1/completions", "", 400, "the body is not JSON: EOF"),
        ("POST", "/v1/completions", "[]", 400, "the body is not JSON of an object"),
        ("POST", "/v1/completions", "{\"prompt\": \"a\"", 400, "the body is not JSON: EOF"),
        (
            "POST",
            "/v1/completions",
            "{\"prompt\": \"\u{fffd}\u{0}\"}",
            400,
            "the body is not JSON: control character",
        ),
        ("POST", "/v1/completions", &deep, 400, "expected"),
        (
            "POST",
            "/v1/completions",
            "{\"promt\": \"a\"}",
            400,
            "unknown field `promt`, did you mean `prompt`?",
        ),
        (
            "POST",
            "/v1/completions",
            "{\"prompt\": \"a\", \"prompt\": \"b\"}",
            400,
            "duplicate field `prompt`",
        ),
        ("POST", "/v1/completions", "{\"prompt\": \"a\", \"model\": \"x\"}", 404, "expected \"tiny\""),
        (
            "POST",
            "/v1/completions",
            "{\"prompt\": \"a\", \"max_tokens\": 4000}",
            400,
            "the 512 positions there are",
        ),
        ("POST", "/v1/completions", "{\"prompt\": \"a\", \"memory\": \"0/5\"}", 400, "no cluster 0/5"),
        (
            "POST",
            "/v1/completions",
            "{\"prompt\": \"a\", \"bank\": \"x\"}",
            404,
            "no bank \"x\": expected one of [\"default\"]",
        ),
        ("POST", "/v1/completions", "{\"prompt\": [999999]}", 400, "expected token ids below"),
        ("POST", "/v1/chat/completions", "{}", 404, "this run has no chat template"),
        ("POST", "/v1/route", "{\"texts\": []}", 400, "texts: expected 1 to 256, found 0"),
        ("POST", "/v1/route", "{\"texts\": [\" \"]}", 400, "texts: "),
        (
            "POST",
            "/v1/route",
            "{\"embeddings\": [[1, 2, 3]]}",
            400,
            "embedding 0: expected 2 numbers, found 3",
        ),
        ("POST", "/v1/route", "{}", 400, "expected either texts or embeddings"),
        (
            "POST",
            "/v1/retrieve",
            "{\"path\": \"0/1\", \"levels\": [7]}",
            400,
            "levels: expected some of [0, 1]",
        ),
        (
            "POST",
            "/v1/embeddings",
            "{\"input\": \"a\", \"dimensions\": 3}",
            400,
            "dimensions: expected 2, found 3",
        ),
        ("GET", "/v1/explain/7", "", 404, "no cluster 7"),
        ("GET", "/v1/explain/x", "", 400, "expected indices such as 3/49, found \"x\""),
        ("GET", "/v1/completions", "", 405, "GET is not a method of /v1/completions"),
        ("GET", "/nothing/here", "", 404, "/nothing/here is not a path of this server"),
        ("POST", "/v1/banks", "{\"source\": \"/tmp\"}", 403, "banks are changed with an admin's key"),
    ];
    for (method, path, body, status, part) in table {
        let reply = server.send(method, path, "", body.as_bytes()).await;
        assert_eq!(reply.status, status, "{method} {path} {body}: {}", reply.text());
        assert!(reply.message().contains(part), "{method} {path} {body}: {}", reply.message());
        assert!(reply.json()["error"]["type"].is_string());
    }
}

/// Bodies that are nearly right: bytes changed, cut, doubled and swapped, in an order that a seed decides.
#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_were_damaged_are_answered_and_the_server_lives() {
    let server = Server::start(Setting::default()).await;
    let bodies = [
        (
            r#"/v1/completions"#,
            r#"{"prompt": ["a", "b"], "max_tokens": 2, "logit_bias": {"3": 1.5}, "stop": ["x"], "memory": [0, 1]}"#,
        ),
        (
            r#"/v1/completions"#,
            r#"{"prompt": [[1, 2], [3]], "echo": true, "logprobs": 2, "max_tokens": 1, "seed": -1}"#,
        ),
        (r#"/v1/route"#, r#"{"embeddings": [[1.0, 0.5], [1e3, -2]], "n": 2}"#),
        (r#"/v1/retrieve"#, r#"{"path": "0/1", "levels": [0, 1], "bank": "default"}"#),
        (r#"/v1/embeddings"#, r#"{"input": ["a b", "c"], "encoding_format": "float"}"#),
    ];
    let pieces: [&[u8]; 10] =
        [b"\"", b"{", b"]", b"-", b"1e999", b"null", b"\\ud800", b"\xff", b"18446744073709551616", b","];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % n as u64) as usize
    };
    for round in 0..400 {
        let (path, body) = bodies[round % bodies.len()];
        let mut bytes = body.as_bytes().to_vec();
        for _ in 0..=next(3) {
            let at = next(bytes.len());
            match next(4) {
                0 => bytes[at] = next(256) as u8,
                1 => bytes.truncate(at + 1),
                2 => _ = bytes.splice(at..at, pieces[next(pieces.len())].iter().copied()),
                _ => _ = bytes.remove(at),
            }
            if bytes.is_empty() {
                bytes.push(b'{');
            }
        }
        let reply = server.send("POST", path, "", &bytes).await;
        let text = String::from_utf8_lossy(&bytes);
        assert!(matches!(reply.status, 200 | 400 | 404), "{text}: {} {}", reply.status, reply.text());
        if reply.status != 200 {
            assert!(!reply.message().is_empty());
        }
    }
    assert_eq!(server.get("/live").await.status, 200);
    server.complete(r#"{"prompt": "a", "max_tokens": 1}"#).await;
}
