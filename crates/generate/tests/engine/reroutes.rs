//! Memory that is asked for anew while a text is generated.

use generate::engine::{EngineOptions, Event, Request, Reroute};

use crate::fixture::{ask, fixture, leaf, read};

#[tokio::test]
async fn a_sequence_goes_on_with_the_memory_it_is_given() {
    let f = fixture();
    let engine = f.engine(EngineOptions { kv_mib: 4, ..EngineOptions::default() });
    let rules = [
        Reroute::EveryTokens(1),
        Reroute::EveryTokens(4),
        Reroute::Entropy { nats: 0.0, min_tokens: 3 },
        Reroute::Entropy { nats: 5.2, min_tokens: 0 },
        Reroute::Entropy { nats: 5.2, min_tokens: 2 },
    ];
    let mut seen = vec![];
    for rule in rules {
        let request = f.request("The boat", Some(leaf(0)));
        let request = Request { reroute: Some(rule), max_new_tokens: 30, ..request };
        let paths: Vec<_> = (0..30).map(|i| leaf(i % 4)).collect();
        let (tokens, reroutes) = f.by_hand(&request, &paths);
        let left = std::sync::Mutex::new(paths.iter());
        let memory = |_: &[u32]| f.memory(left.lock().unwrap().next().unwrap());
        let (answer, finish) = read(engine.submit(request).unwrap(), &memory).await;
        assert_eq!((&answer.tokens, &answer.reroutes), (&tokens, &reroutes), "{rule:?}");
        assert!(finish.rest_ms >= 0.0);
        seen.push((reroutes, tokens));
    }
    assert_eq!(seen[1].0.len(), 7);
    assert!(seen.iter().all(|(reroutes, _)| !reroutes.is_empty()));
    assert!(seen[3].0.len() < 29, "some tokens are surer than others");
}

#[tokio::test]
async fn one_rests_while_the_others_go_on() {
    let f = fixture();
    let engine = f.engine(EngineOptions { kv_mib: 4, ..EngineOptions::default() });
    let request = Request { reroute: Some(Reroute::EveryTokens(2)), ..f.request("The boat", Some(leaf(0))) };
    let mut resting = engine.submit(request.clone()).unwrap();
    for _ in 0..2 {
        assert!(matches!(resting.next().await, Some(Event::Token(_))));
    }
    let Some(Event::Reroute { tokens }) = resting.next().await else { panic!("no reroute") };
    assert_eq!(tokens.len(), request.prompt.len() + 2);
    for _ in 0..3 {
        assert_eq!(ask(&engine, f.request("Rope", None)).await.tokens.len(), 12);
    }
    let stats = engine.stats();
    assert_eq!((stats.running, stats.resting, stats.completed), (1, 1, 3));
    resting.set_memory(f.memory(&leaf(3)));
    let (answer, _) = read(resting, &|_| f.memory(&leaf(3))).await;
    assert_eq!(answer.tokens.len(), 10);
    let dropped = engine.submit(request).unwrap();
    drop(dropped);
    ask(&engine, f.request("Rope", None)).await;
    assert_eq!(engine.stats().free_pages, engine.stats().total_pages, "a rest does not outlive its caller");
}
