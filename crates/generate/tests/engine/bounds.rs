//! What is refused, what waits, and what is given back.

use std::time::Duration;

use generate::engine::{
    Engine, EngineOptions, EngineStats, Event, Generation, Reason, Refused, Request, Reroute, Sampling,
};

use crate::fixture::{Fixture, ask, fixture, leaf, read};

/// A sequence that rests, and so keeps its place for as long as the test wants.
async fn rest(f: &Fixture, engine: &Engine) -> Generation {
    let request = Request { reroute: Some(Reroute::EveryTokens(1)), ..f.request("The", None) };
    let mut generation = engine.submit(request).unwrap();
    assert!(matches!(generation.next().await, Some(Event::Token(_))));
    assert!(matches!(generation.next().await, Some(Event::Reroute { .. })));
    generation
}

fn refused(engine: &Engine, request: Request) -> Refused {
    engine.submit(request).err().expect("it is refused")
}

#[tokio::test]
async fn a_full_queue_refuses_at_once_and_serves_in_order() {
    let f = fixture();
    let options = EngineOptions { max_sequences: 1, max_waiting: 2, kv_mib: 1, ..EngineOptions::default() };
    let engine = f.engine(options);
    let resting = rest(f, &engine).await;
    let first = engine.submit(f.request("A gull", None)).unwrap();
    let second = engine.submit(f.request("A gull", Some(leaf(1)))).unwrap();
    let full = refused(&engine, f.request("A", None));
    let Refused::Busy { waiting: 2, retry_after } = full else { panic!("{full}") };
    assert_eq!(retry_after, Duration::from_secs(1));
    assert_eq!(full.to_string(), "2 requests wait already; try again in 1 s");
    let EngineStats { running, waiting, refused, .. } = engine.stats();
    assert_eq!((running, waiting, refused), (1, 2, 1));
    // Whoever goes away makes room at once.
    drop(second);
    let third = engine.submit(f.request("Rope", None)).unwrap();
    drop(resting);
    let (first, third) = tokio::join!(read(first, &|_| unreachable!()), read(third, &|_| unreachable!()));
    assert!(first.1.queue_ms <= third.1.queue_ms && third.1.prefill_ms > 0.0 && third.1.decode_ms > 0.0);
    let EngineStats { completed, cancelled, failed, free_pages, total_pages, generated_tokens, .. } =
        engine.stats();
    assert_eq!((completed, cancelled, failed, generated_tokens), (2, 2, 0, 25));
    assert_eq!(free_pages, total_pages);
}

#[tokio::test]
async fn what_is_dropped_frees_its_pages() {
    let f = fixture();
    let engine = f.engine(EngineOptions { kv_mib: 1, ..EngineOptions::default() });
    let total = engine.stats().total_pages;
    let long = Request { max_new_tokens: 200, ignore_eot: true, ..f.request("The boat", None) };
    for n_events in [0, 1, 5] {
        let mut generation = engine.submit(long.clone()).unwrap();
        for _ in 0..n_events {
            assert!(matches!(generation.next().await, Some(Event::Token(_))));
        }
        drop(generation);
    }
    // The step that admits this one has seen the others go.
    ask(&engine, f.request("Rope", None)).await;
    let stats = engine.stats();
    assert_eq!((stats.free_pages, stats.running, stats.cancelled), (total, 0, 3));
    assert!(stats.generated_tokens < 3 * 200);
}

#[tokio::test]
async fn more_than_the_pages_hold_waits_its_turn() {
    let f = fixture();
    let engine = f.engine(EngineOptions { kv_mib: 1, ..EngineOptions::default() });
    let total = engine.stats().total_pages;
    assert_eq!(total, 51, "a position of this anchor has 640 bytes");
    let long = |i: u64| Request {
        max_new_tokens: 230,
        ignore_eot: true,
        sampling: Sampling { temperature: 1.0, seed: i, ..Sampling::default() },
        ..f.request("The boat", Some(leaf(i as u32 % 4)))
    };
    // Each has 8 of 51 pages.
    let mut all: Vec<Generation> = (0..20).map(|i| engine.submit(long(i)).unwrap()).collect();
    assert!(matches!(all[6].next().await, Some(Event::Token(_))), "the seventh comes when one has ended");
    let stats = engine.stats();
    assert!(stats.running <= 6 && stats.completed >= 1, "{stats:?}");
    for mut generation in all {
        let mut last = None;
        while let Some(event) = generation.next().await {
            last = Some(event);
        }
        assert!(matches!(last, Some(Event::Done(finish)) if finish.reason == Reason::Length));
    }
    let EngineStats { free_pages, completed, generated_tokens, prompt_tokens, steps, .. } = engine.stats();
    assert_eq!((free_pages, completed, generated_tokens), (total, 20, 20 * 230));
    assert!(prompt_tokens > 40 && steps >= 4 * 230 && engine.stats().busy_s > 0.0);
}

#[tokio::test]
async fn what_can_never_be_is_refused() {
    let f = fixture();
    let engine = f.engine(EngineOptions { kv_mib: 1, ..EngineOptions::default() });
    assert_eq!(engine.max_positions(), 256);
    let request = f.request("The", None);
    let new = 256 - request.prompt.len();
    ask(&engine, Request { max_new_tokens: new, ..request.clone() }).await;
    let n_prompt = request.prompt.len();
    let long = refused(&engine, Request { max_new_tokens: new + 1, ..request.clone() });
    let expected =
        format!("prompt of {n_prompt} tokens plus {} new ones exceeds the 256 positions there are", new + 1);
    assert_eq!(long.to_string(), expected);
    assert!(matches!(
        refused(&engine, Request { max_new_tokens: usize::MAX, ..request.clone() }),
        Refused::TooLong { .. }
    ));
    let says = |request: Request, expected: &str| assert_eq!(refused(&engine, request).to_string(), expected);
    let vocab = f.tokenizer.vocab_size();
    says(
        Request { prompt: vec![], ..request.clone() },
        "prompt: expected at least the end-of-text token, found 0 tokens",
    );
    says(
        Request { prompt: vec![vocab as u32], ..request.clone() },
        &format!("token: expected an id below {vocab}, found {vocab}"),
    );
    says(
        Request { stop: vec![String::new()], ..request.clone() },
        "stop: expected texts of 1 to 1024 bytes, found 0",
    );
    says(
        Request { stop: vec!["a".into(); 65], ..request.clone() },
        "stop: expected at most 64 texts, found 65",
    );
    says(Request { logprobs: Some(257), ..request.clone() }, "logprobs: expected at most 256, found 257");
    says(
        Request { reroute: Some(Reroute::EveryTokens(0)), ..request.clone() },
        "reroute: expected every 1 token or more, found 0",
    );
    let nats = Some(Reroute::Entropy { nats: f64::NAN, min_tokens: 0 });
    says(
        Request { reroute: nats, ..request.clone() },
        "reroute: expected an entropy of 0 nats or more, found NaN",
    );
    let sampling = |sampling| Request { sampling, ..request.clone() };
    let defaults = Sampling::default;
    says(
        sampling(Sampling { temperature: -1.0, ..defaults() }),
        "generate.temperature: expected 0 or more, found -1",
    );
    says(
        sampling(Sampling { top_p: 0.0, ..defaults() }),
        "generate.top_p: expected a number in (0, 1], found 0",
    );
    says(
        sampling(Sampling { min_p: 1.5, ..defaults() }),
        "generate.min_p: expected a number in [0, 1], found 1.5",
    );
    let bias = |token, bias| sampling(Sampling { logit_bias: [(token, bias)].into(), ..defaults() });
    says(bias(9999, 1.0), &format!("token: expected an id below {vocab}, found 9999"));
    says(bias(1, f32::INFINITY), "generate.logit_bias: expected a number, found inf");
    let options = EngineOptions { max_waiting: 0, ..EngineOptions::default() };
    let error = Engine::start(f.decoder.clone(), f.tokenizer.clone(), options).err().unwrap();
    assert_eq!(error.to_string(), "serve.max_waiting: expected at least 1, found 0");
}

#[tokio::test]
async fn without_handles_what_waits_fails_and_what_runs_is_finished() {
    let f = fixture();
    let engine = f.engine(EngineOptions { max_sequences: 1, kv_mib: 1, ..EngineOptions::default() });
    let running = rest(f, &engine).await;
    let mut waiting = engine.submit(f.request("A gull", None)).unwrap();
    let other = engine.clone();
    drop(engine);
    assert_eq!((other.stats().running, other.stats().waiting), (1, 1), "a handle is left");
    drop(other);
    let Some(Event::Done(finish)) = waiting.next().await else { panic!("it waits") };
    assert_eq!(finish.reason, Reason::Failed("the engine stops".into()));
    assert!(waiting.next().await.is_none());
    running.set_memory(f.memory(&leaf(1)));
    let (answer, finish) = read(running, &|_| f.memory(&leaf(1))).await;
    assert_eq!((answer.tokens.len(), finish.reason), (11, Reason::Length));
}
