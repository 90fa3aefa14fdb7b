//! What is answered when all is well.

use base64::Engine as _;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::made_up::spec;
use crate::world::{POSITIONS, Server, Setting};

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_tells_its_memory_and_its_times() {
    let server = Server::start(Setting::default()).await;
    let reply =
        server.complete(r#"{"model": "tiny", "prompt": "a cat", "max_tokens": 4, "temperature": 0}"#).await;
    assert_eq!((&reply["object"], &reply["model"]), (&json!("text_completion"), &json!("tiny")));
    let choice = &reply["choices"][0];
    assert!(choice["text"].is_string() && choice["logprobs"].is_null());
    assert!(["stop", "length"].contains(&choice["finish_reason"].as_str().unwrap()));
    let usage = &reply["usage"];
    assert_eq!(
        usage["total_tokens"],
        usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap()
    );
    let told = &reply["anchorage"];
    assert_eq!(
        (&told["memory"], &told["bank"], &told["step"]),
        (&json!("auto"), &json!("default"), &json!(1))
    );
    assert!(told["path"].as_str().unwrap().starts_with("0/"), "{told}");
    for time in ["queue_ms", "route_ms", "fetch_ms", "prefill_ms", "decode_ms"] {
        assert!(told["timing"][time].as_f64().unwrap() >= 0.0, "{time}");
    }
    // Another text has another path; memory may be named; and what is routed may be another text.
    let path = async |body: Value| server.complete(&body.to_string()).await["anchorage"]["path"].clone();
    assert!(path(json!({"prompt": "b", "max_tokens": 1})).await.as_str().unwrap().starts_with("1/"));
    assert!(
        path(json!({"prompt": "b", "max_tokens": 1, "memory_text": "a"}))
            .await
            .as_str()
            .unwrap()
            .starts_with("0/")
    );
    assert_eq!(path(json!({"prompt": "b", "max_tokens": 1, "memory": "1/4"})).await, "1/4");
    assert_eq!(path(json!({"prompt": "b", "max_tokens": 1, "memory": [0, 2]})).await, "0/2");
    assert_eq!(path(json!({"prompt": "b", "max_tokens": 1, "memory": "generic"})).await, "generic");
    assert_eq!(path(json!({"prompt": "b", "max_tokens": 1, "memory": "off"})).await, Value::Null);
    assert_eq!(path(json!({"prompt": "", "max_tokens": 1})).await, "generic");
}

#[tokio::test(flavor = "multi_thread")]
async fn scores_are_those_that_a_harness_reads() {
    let server = Server::start(Setting::default()).await;
    let body = json!({"model": "tiny", "prompt": [[5, 6, 7, 8], [0, 9, 9]], "temperature": 0, "max_tokens": 1,
        "logprobs": 1, "seed": 1234, "echo": true, "memory": "off"});
    let reply = server.complete(&body.to_string()).await;
    for (i, n_prompt) in [4, 3].into_iter().enumerate() {
        let choice = &reply["choices"][i];
        assert_eq!(choice["index"], i);
        let table = &choice["logprobs"];
        let columns = ["tokens", "token_logprobs", "top_logprobs", "text_offset"];
        let lens = columns.map(|column| table[column].as_array().unwrap().len());
        assert_eq!(lens, [n_prompt + 1; 4], "{table}");
        assert!(table["token_logprobs"][0].is_null() && table["top_logprobs"][0].is_null());
        for at in 1..=n_prompt {
            let (chosen, top) = (table["token_logprobs"][at].as_f64().unwrap(), &table["top_logprobs"][at]);
            let best =
                top.as_object().unwrap().values().map(|v| v.as_f64().unwrap()).fold(f64::MIN, f64::max);
            assert!(chosen <= best && chosen < 0.0);
        }
        // The generated one is the likeliest.
        let last = table["top_logprobs"][n_prompt].as_object().unwrap();
        assert_eq!((last.len(), last.values().next()), (1, Some(&table["token_logprobs"][n_prompt])));
    }
    // Alone, and as a text that is only scored, the numbers are the same.
    let alone =
        json!({"prompt": [5, 6, 7, 8], "max_tokens": 0, "logprobs": 1, "echo": true, "memory": "off"});
    let alone = server.complete(&alone.to_string()).await;
    let numbers =
        |reply: &Value| reply["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap()[..4].to_vec();
    assert_eq!(numbers(&alone), numbers(&reply));
    assert_eq!(alone["choices"][0]["finish_reason"], "length");
    assert_eq!(
        (&alone["usage"]["prompt_tokens"], &alone["usage"]["completion_tokens"]),
        (&json!(4), &json!(0))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_says_what_a_whole_answer_says() {
    let server = Server::start(Setting { has_chat: true, ..Setting::default() }).await;
    let body =
        json!({"prompt": ["a cat", "b"], "n": 2, "max_tokens": 12, "seed": 3, "logprobs": 2, "echo": true});
    let whole = server.complete(&body.to_string()).await;
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let reply = server.post("/v1/completions", &streamed.to_string()).await;
    assert_eq!(reply.header("content-type"), Some("text/event-stream"));
    let events = reply.events();
    for choice in whole["choices"].as_array().unwrap() {
        let of_choice =
            || events.iter().map(|event| &event["choices"][0]).filter(|c| c["index"] == choice["index"]);
        let text: String = of_choice().map(|c| c["text"].as_str().unwrap()).collect();
        assert_eq!(text, choice["text"].as_str().unwrap());
        let column = |name: &str| -> Vec<Value> {
            of_choice().flat_map(|c| c["logprobs"][name].as_array().cloned().unwrap_or_default()).collect()
        };
        for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(json!(column(name)), choice["logprobs"][name], "{name}");
        }
        let reasons: Vec<_> = of_choice().filter_map(|c| c["finish_reason"].as_str()).collect();
        assert_eq!(reasons, [choice["finish_reason"].as_str().unwrap()]);
    }
    let told: Vec<_> = events.iter().filter(|event| event["anchorage"].is_object()).collect();
    assert_eq!((told.len(), told[0]["anchorage"]["choices"].as_array().unwrap().len()), (1, 4));
    assert!(events.last().unwrap()["anchorage"].is_object(), "the last chunk tells");

    streamed["stream_options"] = json!({"include_usage": true});
    let events = server.post("/v1/completions", &streamed.to_string()).await.events();
    let last = events.last().unwrap();
    assert_eq!((&last["usage"], &last["choices"]), (&whole["usage"], &json!([])));
    assert!(last["anchorage"].is_object());

    let chat = json!({"messages": [{"role": "user", "content": "b"}], "max_tokens": 5, "seed": 3});
    let whole = server.post("/v1/chat/completions", &chat.to_string()).await.json();
    assert_eq!(
        (&whole["object"], &whole["choices"][0]["message"]["role"]),
        (&json!("chat.completion"), &json!("assistant"))
    );
    assert!(whole["anchorage"]["path"].as_str().unwrap().starts_with("1/"), "what was said is routed");
    // In a chat what spells a token of the tokenizer's own is that token, not a dozen of its letters.
    let mut marked = chat.clone();
    marked["messages"][0]["content"] = json!("b<|endoftext|>");
    let marked = server.post("/v1/chat/completions", &marked.to_string()).await.json();
    let n = |reply: &Value| reply["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!((1..=2).contains(&(n(&marked) - n(&whole))), "{marked}");
    let mut streamed = chat.clone();
    streamed["stream"] = json!(true);
    let events = server.post("/v1/chat/completions", &streamed.to_string()).await.events();
    let text: String =
        events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(json!(text), whole["choices"][0]["message"]["content"]);
    assert_eq!(events[0]["object"], "chat.completion.chunk");
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_asked_for_anew_where_the_request_says() {
    let server = Server::start(Setting::default()).await;
    let body = json!({"prompt": "a", "max_tokens": 9, "temperature": 0, "ignore_eos": true, "reroute": {"every_tokens": 4}});
    let reply = server.complete(&body.to_string()).await;
    let rerouted = reply["anchorage"]["rerouted"].as_array().unwrap();
    let at: Vec<_> = rerouted.iter().map(|reroute| reroute["at"].as_u64().unwrap()).collect();
    assert_eq!(at, [4, 8]);
    assert!(rerouted.iter().all(|reroute| reroute["path"].is_string()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_has_the_same_answer_whatever_else_runs() {
    let server = Server::start(Setting::default()).await;
    let body = r#"{"prompt": "a cat", "max_tokens": 24, "seed": 11, "logprobs": 1}"#;
    let alone = server.complete(body).await;
    let others = (0..6).map(|i| server.complete(body_of(i)));
    let (among, _) = tokio::join!(server.complete(body), futures::future::join_all(others));
    assert_eq!(alone["choices"], among["choices"]);
}

fn body_of(i: usize) -> &'static str {
    [r#"{"prompt": "b boat", "max_tokens": 30}"#, r#"{"prompt": ["a", "the quay"], "max_tokens": 9, "n": 2}"#]
        [i % 2]
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_by_text_has_routes_blocks_and_explanations() {
    let server = Server::start(Setting::default()).await;
    let routes = server.post("/v1/route", r#"{"texts": ["a", "b"], "n": 1}"#).await.json();
    let first = |i: usize| routes["routes"][i][0]["path"].as_str().unwrap().to_owned();
    assert_eq!((first(0).as_str(), first(1).as_str()), ("0/1", "1/4"));
    let same = server.post("/v1/route", r#"{"embeddings": [[1, 0], [-1, 0]], "n": 1}"#).await.json();
    assert_eq!(routes, same);

    let reply = server.post("/v1/retrieve", r#"{"text": "b", "levels": [1]}"#).await;
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/octet-stream")));
    let tensors = SafeTensors::deserialize(&reply.body).unwrap();
    assert_eq!(tensors.names(), ["level1"]);
    let spec = spec();
    assert_eq!(tensors.tensor("level1").unwrap().shape(), [spec.n_layers, 3, spec.width[1], spec.d_model]);
    let (_, metadata) = SafeTensors::read_metadata(&reply.body).unwrap();
    let metadata = metadata.metadata().clone().unwrap();
    assert_eq!((metadata["path"].as_str(), metadata["step"].as_str()), ("1/4", "1"));

    assert_eq!(server.get("/v1/explain").await.json()["children"].as_array().unwrap().len(), 2);
    assert_eq!(server.get("/v1/explain/1/4").await.json()["path"], "1/4");
    let tree = server.get("/v1/tree").await.json();
    assert_eq!((&tree["branching"], tree["levels"][1].as_array().unwrap().len()), (&json!([2, 3]), 5));
    let fetches = server.get("/v1/tree/fetches").await.json();
    assert!(fetches["levels"][1].as_array().unwrap().iter().any(|pair| pair[0] == 4), "{fetches}");
    assert_eq!(server.get("/v1/banks").await.json()["banks"][0]["name"], "default");

    let models = server.get("/v1/models").await.json();
    assert_eq!(
        (&models["data"][0]["id"], &models["data"][0]["max_model_len"]),
        (&json!("tiny"), &json!(POSITIONS))
    );
    assert_eq!(server.get("/v1/models/tiny").await.status, 200);
    let floats = server.post("/v1/embeddings", r#"{"input": ["b", "a"], "dimensions": 2}"#).await.json();
    assert_eq!(floats["data"][0]["embedding"], json!([-1.0, 0.0]));
    let base64 = server.post("/v1/embeddings", r#"{"input": "b", "encoding_format": "base64"}"#).await.json();
    let bytes =
        base64::engine::general_purpose::STANDARD.decode(base64["data"][0]["embedding"].as_str().unwrap());
    assert_eq!(bytes.unwrap(), [(-1.0f32).to_le_bytes(), 0.0f32.to_le_bytes()].concat());
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_and_readers_find_what_they_look_for() {
    let server = Server::start(Setting::default()).await;
    server.complete(r#"{"prompt": "a", "max_tokens": 2}"#).await;
    for path in ["/live", "/ready"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    assert_eq!(
        server.metric("anchorage_serve_requests_total{route=\"/v1/completions\",code=\"200\"}").await,
        1.0
    );
    assert!(server.metric("anchorage_serve_generated_tokens_total").await >= 1.0);
    assert!(server.metric("anchorage_serve_first_token_seconds_count").await == 1.0);
    let page = server.get("/").await;
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    assert!(page.header("etag").is_some() && page.header("content-security-policy").is_some());
    assert_eq!(server.get("/main.js").await.status, 200);
}
