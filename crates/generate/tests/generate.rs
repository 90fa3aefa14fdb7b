//! Generation and scoring with the memory of different paths in one batch, against loops without batch
//! or cache.

use anchor::{Anchor, AnchorConfig, Input};
use candle_core::{DType, Device};
use cluster_tree::ClusterPath;
use corpus::Tokenizer;
use generate::{Continuation, Error, Model, Options, Prompt, generate, score};
use memory_bank::{Blocking, LocalBank, Step};

#[path = "../../../tests/fixtures/bank.rs"]
mod fixtures;

use fixtures::{bank, leaf};

const SENTENCES: [&str; 3] =
    ["The boat lies at the quay.", "A gull sits on the mast.", "Rope and chain hold the boat."];

struct Fixture {
    tokenizer: Tokenizer,
    anchor: Anchor,
    bank: Blocking<LocalBank>,
}

impl Fixture {
    fn new() -> Self {
        let texts = SENTENCES.iter().map(|text| Ok(text.to_string()));
        let tokenizer = Tokenizer::train(texts, 280, 1 << 20).unwrap();
        let config = AnchorConfig {
            vocab_size: tokenizer.vocab_size(),
            d_model: 16,
            n_layers: 2,
            n_heads: 2,
            head_width: 8,
            ffn_width: 32,
            tied_embeddings: false,
            max_seq_len: 48,
            rope_base: 10_000.0,
            norm_eps: 1e-5,
            form: anchor::Form::default(),
        };
        let anchor = Anchor::new(config, 5, (&Device::Cpu, DType::F32)).unwrap().freeze();
        Self { tokenizer, anchor, bank: bank(16, [8, 4], 0.3) }
    }

    fn model(&self) -> Model<'_, LocalBank> {
        Model { anchor: &self.anchor, bank: Some(&self.bank), step: Step(1) }
    }

    fn without_bank(&self) -> Model<'_, LocalBank> {
        Model { anchor: &self.anchor, bank: None, step: Step(0) }
    }

    fn prompt(&self, text: &str, path: Option<ClusterPath>) -> Prompt {
        Prompt { tokens: self.tokenizer.encode(text).unwrap(), path }
    }

    /// Prompts of different lengths, two of them with the same path.
    fn prompts(&self) -> Vec<Prompt> {
        let texts = ["The boat", "A gull sits on the mast of the boat", "", "Rope", "the"];
        let paths = [leaf(0), leaf(3), leaf(0), ClusterPath::generic(2).unwrap(), leaf(1)];
        texts.iter().zip(paths).map(|(text, path)| self.prompt(text, Some(path))).collect()
    }

    /// Scores of the token after each of `tokens`, computed alone and from the beginning.
    fn logits(&self, tokens: &[u32], path: &Option<ClusterPath>) -> Vec<Vec<f32>> {
        let starts = vec![0; tokens.len()];
        let input = Input { tokens, starts: &starts, batch: 1, len: tokens.len() };
        let memory = self.model().memory(std::slice::from_ref(path)).unwrap();
        let hidden = self.anchor.hidden(input, &memory, None).unwrap();
        self.anchor.logits(&hidden).unwrap().squeeze(0).unwrap().to_vec2().unwrap()
    }

    /// The likeliest continuation, recomputing everything for every token.
    fn greedy(&self, prompt: &Prompt, n: usize) -> Vec<u32> {
        let mut tokens = [&[self.tokenizer.eot()], &prompt.tokens[..]].concat();
        let first_new = tokens.len();
        while tokens.len() < first_new + n {
            let last = self.logits(&tokens, &prompt.path).pop().unwrap();
            let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap() as u32;
            tokens.push(best);
            if best == self.tokenizer.eot() {
                break;
            }
        }
        tokens.split_off(first_new)
    }
}

#[test]
fn a_batch_continues_each_prompt_as_it_would_alone_and_without_a_cache() {
    let f = Fixture::new();
    let (prompts, options) = (f.prompts(), Options { max_new_tokens: 12, ..Options::default() });
    let together = generate(&f.model(), &f.tokenizer, &prompts, &options).unwrap();
    for (prompt, completion) in prompts.iter().zip(&together) {
        let alone = generate(&f.model(), &f.tokenizer, std::slice::from_ref(prompt), &options).unwrap();
        assert_eq!(&alone[0], completion, "{prompt:?}");
        assert_eq!(f.greedy(prompt, 12), completion.tokens, "{prompt:?}");
    }
    let distinct: std::collections::BTreeSet<_> = together.iter().map(|c| &c.tokens).collect();
    assert!(distinct.len() > 3, "the prompts have continuations of their own");
    assert_eq!(generate(&f.model(), &f.tokenizer, &[], &options).unwrap(), []);
}

#[test]
fn the_path_decides_the_continuation() {
    let f = Fixture::new();
    let options = Options { max_new_tokens: 12, ..Options::default() };
    let paths = [Some(leaf(0)), Some(leaf(1)), Some(leaf(3)), None];
    let texts = paths.map(|path| {
        let prompt = f.prompt("The boat", path);
        generate(&f.model(), &f.tokenizer, std::slice::from_ref(&prompt), &options).unwrap().remove(0).tokens
    });
    for i in 0..texts.len() {
        assert!(!texts[..i].contains(&texts[i]), "path {i} says what another one says");
    }
    let plain = generate(&f.without_bank(), &f.tokenizer, &[f.prompt("The boat", None)], &options).unwrap();
    assert_eq!(plain[0].tokens, texts[3], "no path is the plain anchor, with a bank or without");
}

#[test]
fn samples_repeat_by_seed() {
    let f = Fixture::new();
    let options = Options { max_new_tokens: 20, temperature: 1.0, ..Options::default() };
    let sample = |seed| {
        let options = Options { seed, ..options.clone() };
        generate(&f.model(), &f.tokenizer, &f.prompts(), &options).unwrap()
    };
    assert_eq!(sample(1), sample(1));
    assert_ne!(sample(1), sample(2));
    let twice = vec![f.prompt("The boat", None); 2];
    let both = generate(&f.model(), &f.tokenizer, &twice, &options).unwrap();
    assert_ne!(both[0].tokens, both[1].tokens, "each prompt of a batch has random numbers of its own");
}

#[test]
fn a_stop_text_ends_the_completion_and_is_not_part_of_it() {
    let f = Fixture::new();
    let prompts = f.prompts();
    let mut options = Options { max_new_tokens: 24, temperature: 1.0, ..Options::default() };
    let free = generate(&f.model(), &f.tokenizer, &prompts, &options).unwrap();
    let is_plain = |c: &char| c.is_ascii_graphic();
    let stop = free.iter().find_map(|completion| completion.text.chars().find(is_plain));
    let stop = stop.expect("120 random tokens spell an ASCII character");
    options.stop = vec![stop.to_string()];
    let stopped = generate(&f.model(), &f.tokenizer, &prompts, &options).unwrap();
    for (free, stopped) in free.iter().zip(&stopped) {
        assert!(free.tokens.starts_with(&stopped.tokens) && !stopped.text.contains(stop));
        match free.text.find(stop) {
            Some(end) => assert_eq!(stopped.text, free.text[..end]),
            None => assert_eq!(stopped, free),
        }
    }
    assert_ne!(stopped, free);
}

#[test]
fn a_score_is_the_sum_of_log_probabilities() {
    let f = Fixture::new();
    let eot = f.tokenizer.eot();
    let continuations: Vec<Continuation> = f
        .prompts()
        .into_iter()
        .zip([" lies at the quay.", ".", " A gull", " and chain", " mast"])
        .map(|(prompt, text)| Continuation {
            context: [&[eot], &prompt.tokens[..]].concat(),
            tokens: f.tokenizer.encode(text).unwrap(),
            path: prompt.path,
        })
        .collect();
    let scores = score(&f.model(), &continuations).unwrap();
    assert_eq!(scores.len(), continuations.len());
    for (continuation, found) in continuations.iter().zip(scores) {
        let whole = [&continuation.context[..], &continuation.tokens[..]].concat();
        let rows = f.logits(&whole, &continuation.path);
        let log_probability = |position: usize| {
            let row = &rows[position - 1];
            let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
            f64::from(row[whole[position] as usize]) - sum.ln()
        };
        let expected: f64 = (continuation.context.len()..whole.len()).map(log_probability).sum();
        assert!((found - expected).abs() < 1e-4 * expected.abs(), "{found} {expected}");
    }
    let nothing = Continuation { context: vec![eot], tokens: vec![], path: None };
    assert_eq!(score(&f.model(), &[nothing]).unwrap(), [0.0]);
}

#[test]
fn a_continuation_of_nothing_is_an_error() {
    let f = Fixture::new();
    let whole = Continuation { context: vec![0], tokens: vec![1, 2], path: None };
    let empty = Continuation { context: vec![], ..whole.clone() };
    let error = score(&f.model(), &[whole, empty]).unwrap_err();
    assert!(matches!(error, Error::EmptyContext { index: 1 }), "{error}");
}

#[test]
fn what_does_not_fit_the_anchor_is_an_error() {
    let f = Fixture::new();
    let prompt = Prompt { tokens: vec![1; 38], path: None };
    let options = Options { max_new_tokens: 9, ..Options::default() };
    generate(&f.model(), &f.tokenizer, std::slice::from_ref(&prompt), &options).unwrap();
    let options = Options { max_new_tokens: 10, ..options };
    let error = generate(&f.model(), &f.tokenizer, &[prompt], &options).unwrap_err();
    assert_eq!(error.to_string(), "prompt of 39 tokens plus 10 new ones exceeds the anchor's 48 positions");
    let long = Continuation { context: vec![0], tokens: vec![1; 49], path: None };
    let error = score(&f.model(), &[long]).unwrap_err().to_string();
    assert!(error.contains("position 48 asked for, the table holds 48"), "{error}");
}

#[test]
fn paths_that_cannot_be_fetched_are_errors() {
    let f = Fixture::new();
    let options = Options { max_new_tokens: 2, ..Options::default() };
    let error = |model: &Model<LocalBank>, paths: [Option<ClusterPath>; 2]| {
        let prompts = paths.map(|path| f.prompt("The", path));
        generate(model, &f.tokenizer, &prompts, &options).unwrap_err()
    };
    let no_bank = error(&f.without_bank(), [Some(leaf(3)), None]);
    assert_eq!(no_bank.to_string(), "memory path 1/3 asked of a run that has no memory bank");
    let mixed = error(&f.model(), [None, Some(leaf(1))]);
    assert!(matches!(mixed, Error::Mixed { with: 1, without: 1 }), "{mixed}");
    let unknown = error(&f.model(), [Some(leaf(4)), Some(leaf(1))]);
    assert!(unknown.to_string().contains("no block level0/2: level 0 has 2 blocks"), "{unknown}");
}

#[test]
fn options_out_of_range_are_errors() {
    let f = Fixture::new();
    let error = |options| generate(&f.model(), &f.tokenizer, &f.prompts(), &options).unwrap_err().to_string();
    let defaults = Options::default;
    let found = error(Options { temperature: -1.0, ..defaults() });
    assert_eq!(found, "generate.temperature: expected 0 or more, found -1");
    let found = error(Options { top_p: 0.0, ..defaults() });
    assert_eq!(found, "generate.top_p: expected a number in (0, 1], found 0");
    let found = error(Options { max_new_tokens: 0, ..defaults() });
    assert_eq!(found, "generate.max_new_tokens: expected at least 1, found 0");
}
