//! What is generated: the same as by other ways, and the same alone, among others and in steps of any size.

use generate::engine::{Engine, EngineOptions, Reason, Request, Reroute, Sampling};
use generate::{Options, Prompt, generate};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::fixture::{Answer, Fixture, ask, fixture, leaf, outside, read};

const TEXTS: [&str; 5] = ["The boat", "A gull sits on the mast of the boat", "", "Rope 東京", "the"];

/// Requests of all kinds, each unlike the others.
fn requests(f: &Fixture) -> Vec<Request> {
    let mut random = ChaCha8Rng::seed_from_u64(8);
    let mut below = |n: u32| random.next_u32() % n;
    let make = |i: usize| {
        let text = TEXTS[i % 5].repeat(1 + below(4) as usize);
        let path = [Some(leaf(0)), Some(leaf(1)), Some(leaf(3)), None][below(4) as usize].clone();
        let sampling = Sampling {
            temperature: [0.0, 0.7, 1.3][below(3) as usize],
            top_k: [0, 40][below(2) as usize],
            top_p: [1.0, 0.9][below(2) as usize],
            min_p: [0.0, 0.001][below(2) as usize],
            frequency_penalty: [0.0, 0.3][below(2) as usize],
            seed: i as u64,
            ..Sampling::default()
        };
        let reroute = match below(3) {
            0 => Some(Reroute::EveryTokens(3 + below(4) as usize)),
            1 => Some(Reroute::Entropy { nats: 5.0, min_tokens: 2 }),
            _ => None,
        };
        Request {
            sampling,
            max_new_tokens: [0, 5, 25, 60][below(4) as usize],
            stop: if below(2) == 0 { vec!["e".into(), "qu".into()] } else { vec![] },
            logprobs: [None, Some(0), Some(3)][below(3) as usize],
            prompt_logprobs: [None, Some(2)][below(2) as usize],
            reroute,
            ignore_eot: below(2) == 0,
            ..f.request(&text, path)
        }
    };
    (0..13).map(make).collect()
}

/// The memory after a reroute depends on the tokens only.
async fn answer(f: &Fixture, engine: &Engine, request: Request) -> Answer {
    let memory = |tokens: &[u32]| f.memory(&leaf(tokens.iter().sum::<u32>() % 4));
    read(engine.submit(request).unwrap(), &memory).await.0
}

#[tokio::test]
async fn an_answer_is_the_same_alone_among_others_and_in_steps_of_any_size() {
    let f = fixture();
    let mut alone = vec![];
    let engine = f.engine(EngineOptions { max_sequences: 1, kv_mib: 4, ..EngineOptions::default() });
    for request in requests(f) {
        alone.push(answer(f, &engine, request).await);
    }
    assert!(alone.iter().any(|a| a.reroutes.len() > 2) && alone.iter().any(|a| a.stop.is_some()));
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for (round, step_tokens) in [16, 512, 3, 512].into_iter().enumerate() {
        let engine = f.engine(EngineOptions { step_tokens, kv_mib: 4, ..EngineOptions::default() });
        let waits: Vec<u32> = (0..13).map(|_| random.next_u32() % (200 * round as u32 + 1)).collect();
        let each = requests(f).into_iter().zip(waits).map(|(request, wait)| {
            let engine = engine.clone();
            tokio::spawn(async move {
                // Others take their turns meanwhile.
                for _ in 0..wait {
                    tokio::task::yield_now().await;
                }
                answer(f, &engine, request).await
            })
        });
        let each: Vec<_> = each.collect();
        for (i, (alone, together)) in alone.iter().zip(each).enumerate() {
            let together = together.await.unwrap();
            assert_eq!(*alone, together, "request {i} in steps of {step_tokens}");
            assert_eq!(alone.bits(), together.bits(), "request {i} in steps of {step_tokens}");
        }
    }
}

#[tokio::test]
async fn the_likeliest_tokens_and_their_text_are_those_of_generate() {
    let f = fixture();
    let engine = f.engine(EngineOptions { step_tokens: 7, kv_mib: 4, ..EngineOptions::default() });
    let stops: [&[&str]; 4] = [&[], &["e"], &["th", "q", "\u{fffd}a"], &["zzzzz"]];
    for (i, text) in TEXTS.into_iter().enumerate() {
        for (path, stop) in [Some(leaf(0)), Some(leaf(3)), None, Some(leaf(1))].into_iter().zip(stops) {
            let stop: Vec<String> = stop.iter().map(ToString::to_string).collect();
            let temperature = [0.0, 1.0][i % 2];
            let options =
                Options { max_new_tokens: 40, stop: stop.clone(), temperature, ..Options::default() };
            let prompt = Prompt { tokens: f.tokenizer.encode(text).unwrap(), path: path.clone() };
            let expected =
                outside(|| generate(&f.model(), &f.tokenizer, &[prompt], &options).unwrap().remove(0));
            let sampling = Sampling { temperature, ..Sampling::default() };
            let request = f.request(text, path);
            let found = ask(&engine, Request { max_new_tokens: 40, stop, sampling, ..request }).await;
            assert_eq!((found.tokens.clone(), found.text()), (expected.tokens, expected.text), "{text}");
        }
    }
}

#[tokio::test]
async fn log_probabilities_are_those_of_the_anchor() {
    let f = fixture();
    let engine = f.engine(EngineOptions { kv_mib: 4, ..EngineOptions::default() });
    let text = "A gull sits on the mast of the boat. ".repeat(6);
    for path in [Some(leaf(2)), None] {
        let sampling = Sampling { temperature: 0.8, top_k: 5, presence_penalty: 1.0, ..Sampling::default() };
        let request = Request {
            logprobs: Some(4),
            prompt_logprobs: Some(2),
            sampling,
            ..f.request(&text, path.clone())
        };
        let only_scored = ask(&engine, Request { max_new_tokens: 0, ..request.clone() }).await;
        let n_prompt = request.prompt.len();
        assert!(n_prompt > 64, "more than a step's rows of scores");
        let mut whole = request.prompt.clone();
        let answer = ask(&engine, request).await;
        let prompt = answer.prompt.clone().unwrap();
        assert_eq!(only_scored.prompt.as_ref(), Some(&prompt));
        assert_eq!((only_scored.reason, only_scored.tokens.len()), (Some(Reason::Length), 0));
        assert_eq!((prompt.len(), prompt[0].logprob, prompt[0].top.len()), (n_prompt, None, 0));
        whole.extend(&answer.tokens);
        let rows = f.logits(&whole, path);
        for (i, score) in prompt.iter().chain(&answer.scores).enumerate().skip(1) {
            let row = &rows[i - 1];
            let log_sum = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
            let expected = |token: u32| f64::from(row[token as usize]) - log_sum;
            assert_eq!(score.token, whole[i]);
            let scored = score.top.iter().copied().chain([(score.token, score.logprob.unwrap())]);
            for (token, logprob) in scored {
                let difference = (f64::from(logprob) - expected(token)).abs();
                assert!(difference < 1e-4, "{difference} at {i}");
            }
            assert_eq!(score.top.len(), if i < n_prompt { 2 } else { 4 });
            let more_likely = row.iter().filter(|&&x| x > row[score.top[0].0 as usize]).count();
            assert_eq!(more_likely, 0);
        }
    }
}

#[tokio::test]
async fn the_end_of_text_ends_unless_it_is_ignored() {
    let f = fixture();
    let engine = f.engine(EngineOptions { kv_mib: 4, ..EngineOptions::default() });
    let eot = f.tokenizer.eot();
    let sampling = Sampling { logit_bias: [(eot, 1e4)].into(), ..Sampling::default() };
    let request = Request { sampling, ..f.request("The boat", None) };
    let ended = ask(&engine, request.clone()).await;
    assert_eq!(
        (ended.tokens.clone(), ended.text(), ended.reason),
        (vec![eot], String::new(), Some(Reason::Stop))
    );
    let ignored = ask(&engine, Request { ignore_eot: true, ..request }).await;
    assert_eq!(
        (ignored.tokens.len(), ignored.text(), ignored.reason),
        (12, String::new(), Some(Reason::Length))
    );
}

#[tokio::test]
async fn a_stop_text_over_tokens_is_never_shown() {
    let f = fixture();
    let engine = f.engine(EngineOptions { kv_mib: 4, ..EngineOptions::default() });
    let sampling = Sampling { temperature: 1.0, ..Sampling::default() };
    let free = Request { sampling, max_new_tokens: 80, ignore_eot: true, ..f.request("The boat", None) };
    let (text, mut over_tokens) = (ask(&engine, free.clone()).await, 0);
    let (pieces, text) = (text.pieces.clone(), text.text());
    let starts: Vec<usize> = text.char_indices().map(|(start, _)| start).collect();
    for window in starts.windows(5).step_by(3) {
        let stop = &text[window[0]..window[4]];
        over_tokens += usize::from(!pieces.iter().any(|piece| piece.contains(stop)));
        let stopped = ask(&engine, Request { stop: vec![stop.into()], ..free.clone() }).await;
        assert_eq!(stopped.text(), text[..text.find(stop).unwrap()], "before {stop:?}");
        assert_eq!((stopped.stop.as_deref(), stopped.reason), (Some(stop), Some(Reason::Stop)));
    }
    assert!(over_tokens > 10, "only {over_tokens} stop texts lie over tokens");
}
