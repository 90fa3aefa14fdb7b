use super::*;
use crate::http::body::parse;

fn bounds() -> Bounds {
    Bounds {
        model: "run".into(),
        vocab_size: 300,
        positions: 64,
        sequences: 8,
        prompt_tokens: 32,
        n_levels: Some(2),
        memory: Memory::Auto,
    }
}

fn ask(body: &str) -> Answer<Completion> {
    completion(parse(body.as_bytes())?, &bounds(), 7)
}

#[test]
fn a_request_that_says_little_has_the_defaults_of_openai() {
    let asked = ask(r#"{"prompt": "a"}"#).unwrap();
    assert_eq!(asked.prompts, [Prompt::Text("a".into())]);
    assert_eq!((asked.n, asked.max_tokens, asked.logprobs), (1, Some(16), None));
    assert_eq!((asked.sampling.temperature, asked.sampling.top_p, asked.sampling.seed), (1.0, 1.0, 7));
    assert!(!asked.echo && !asked.stream && !asked.ignore_eos);
    assert_eq!((asked.memory, asked.bank, asked.reroute), (Memory::Auto, None, None));
}

#[test]
fn the_requests_of_an_evaluation_harness_are_taken() {
    let asked = ask(
        r#"{"model": "run", "prompt": [[1, 2, 3], [4, 5]], "temperature": 0, "max_tokens": 1, "logprobs": 1,
            "seed": 1234, "echo": true}"#,
    )
    .unwrap();
    assert_eq!((asked.prompts.len(), asked.max_tokens, asked.logprobs), (2, Some(1), Some(1)));
    assert!(asked.echo);
    let asked = ask(
        r#"{"prompt": [[1]], "model": "run", "max_tokens": 24, "temperature": 0.0, "stop": ["\n", "<|endoftext|>"],
            "seed": 1234, "do_sample": false}"#,
    );
    assert!(asked.unwrap_err().message.contains("unknown field `do_sample`"));
}

#[test]
fn memory_is_a_word_or_a_path() {
    let path = ClusterPath::new(vec![3, 14]).unwrap();
    let table = [
        ("\"auto\"", Memory::Auto),
        ("\"off\"", Memory::Off),
        ("\"generic\"", Memory::Generic),
        ("\"3/14\"", Memory::Path(path.clone())),
        ("[3, 14]", Memory::Path(path)),
    ];
    for (text, expected) in table {
        assert_eq!(ask(&format!(r#"{{"prompt": "a", "memory": {text}}}"#)).unwrap().memory, expected);
    }
    // Behind the model's name, unless the field says otherwise.
    let named = |rest: &str| ask(&format!(r#"{{"prompt": "a", "model": "run{rest}}}"#));
    assert_eq!(named(":off\"").unwrap().memory, Memory::Off);
    assert_eq!(named(":3/14\", \"memory\": \"generic\"").unwrap().memory, Memory::Generic);
    assert!(named(":some\"").unwrap_err().message.contains("some"));
    assert_eq!(named("other:off\"").unwrap_err().status.as_u16(), 404);
    let without = Bounds { n_levels: None, memory: Memory::Off, ..bounds() };
    let of = |text: &str| completion(parse(text.as_bytes())?, &without, 7);
    assert_eq!(of(r#"{"prompt": "a"}"#).unwrap().memory, Memory::Off);
    assert!(
        of(r#"{"prompt": "a", "memory": "auto"}"#).unwrap_err().message.contains("this run has no memory")
    );
}

#[test]
fn what_is_wrong_is_named_with_what_is_expected() {
    let many = format!("{:?}", vec![1; 33]);
    let table = [
        ("", "prompt", "prompt: expected a text or token ids, found nothing"),
        (r#""prompt": []"#, "prompt", "prompt: expected one at least, found none"),
        (r#""prompt": [300]"#, "prompt", "prompt: expected token ids below 300, found 300"),
        (r#""prompt": "a", "n": 9"#, "n", "n: expected 1 to 8, found 9"),
        (r#""prompt": "a", "n": 0"#, "n", "n: expected 1 to 8, found 0"),
        (r#""prompt": ["a", "b", "c"], "n": 3"#, "prompt", "prompts times n, found 3 times 3"),
        (r#""prompt": "a", "best_of": 3"#, "best_of", "best_of: is not supported"),
        (r#""prompt": "a", "suffix": "x""#, "suffix", "suffix: is not supported"),
        (r#""prompt": "a", "temperature": -1"#, "temperature", "expected 0 to 100, found -1"),
        (r#""prompt": "a", "top_p": 1.5"#, "top_p", "expected 0 to 1, found 1.5"),
        (r#""prompt": "a", "top_k": -2"#, "top_k", "found -2"),
        (r#""prompt": "a", "logprobs": 21"#, "logprobs", "expected 0 to 20, found 21"),
        (r#""prompt": "a", "logprobs": true"#, "logprobs", "found true"),
        (r#""prompt": "a", "stop": """#, "stop", "found 0"),
        (r#""prompt": "a", "logit_bias": {"300": 1}"#, "logit_bias", "below 300, found \"300\""),
        (r#""prompt": "a", "logit_bias": {"3": 101}"#, "logit_bias", "expected -100 to 100, found 101"),
        (r#""prompt": "a", "memory": "3""#, "memory", "a path of 2 indices"),
        (r#""prompt": "a", "memory": [3]"#, "memory", "expected 2 indices, one a level, found 1"),
        (r#""prompt": "a", "memory": "off", "reroute": {"every_tokens": 4}"#, "reroute", "memory = \"auto\""),
        (r#""prompt": "a", "reroute": {"every_tokens": 0}"#, "reroute", "at least 1, found 0"),
        (r#""prompt": "a", "reroute": {}"#, "reroute", "expected {\"every_tokens\": n}"),
        (r#""prompt": "a", "memory_text": ["a", "b"]"#, "memory_text", "expected 1 as prompts, found 2"),
        (r#""prompt": "a", "stream_options": {"include_usage": true}"#, "stream_options", "stream = true"),
        (r#""prompt": "a", "messages": []"#, "messages", "is of /v1/chat/completions"),
        (r#""prompt": "a", "max_tokens": -1"#, "max_tokens", "max_tokens: invalid value"),
        (r#""prompt": "a", "seed": 1.5"#, "seed", "seed: invalid type"),
    ];
    for (body, param, part) in table {
        let error = ask(&format!("{{{body}}}")).unwrap_err();
        assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{body}");
        assert!(error.message.contains(part), "{body}: {}", error.message);
    }
    let stops = format!("{:?}", vec!["a"; 17]);
    let error = ask(&format!("{{\"prompt\": \"a\", \"stop\": {stops}}}")).unwrap_err();
    assert!(error.message.contains("at most 16 texts, found 17"));
    let error = ask(&format!("{{\"prompt\": {many}}}")).unwrap_err();
    assert_eq!((error.code, error.status.as_u16()), (Some("context_length_exceeded"), 400));
    let error = ask(r#"{"prompt": "a", "model": "gpt-4"}"#).unwrap_err();
    assert_eq!((error.status.as_u16(), error.code), (404, Some("model_not_found")));
}

#[test]
fn a_chat_is_one_prompt_with_its_own_bounds() {
    let of = |body: &str| chat(parse(body.as_bytes())?, "user: a".into(), &bounds(), 7);
    let asked =
        of(r#"{"messages": [{"role": "user", "content": "a"}], "logprobs": true, "top_logprobs": 2}"#)
            .unwrap();
    assert_eq!((asked.prompts.len(), asked.logprobs, asked.max_tokens), (1, Some(2), None));
    assert_eq!((asked.new_tokens(10, 64), asked.new_tokens(80, 64)), (54, 0));
    let table = [
        (r#""logprobs": 3"#, "expected true or false, found 3"),
        (r#""top_logprobs": 3"#, "logprobs = true"),
        (r#""echo": true"#, "is of /v1/completions"),
        (r#""prompt": "a""#, "is of /v1/completions"),
    ];
    for (body, part) in table {
        assert!(of(&format!("{{{body}}}")).unwrap_err().message.contains(part), "{body}");
    }
    let none = parse::<Fields>(b"{\"messages\": []}").unwrap();
    assert!(messages(&none).unwrap_err().message.contains("expected one at least"));
}
