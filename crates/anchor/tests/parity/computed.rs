//! Logits, losses, gradients and generated tokens, by the anchor and by the decoder that serves.

use anchor::{
    Anchor, Compute, Decoder, DecoderOptions, FetchedMemory, Gradients, Input, KvCache, PathMemory, Scores,
    Segment, Targets,
};

use crate::reference::*;

/// How far logits may be off; those of transformers are within 1e-5 of the exact ones.
const TOLERANCE: f32 = 2e-5;

/// The scores of all tokens of a sequence, in steps of so many tokens.
fn decoded(decoder: &Decoder, tokens: &[u32], step: usize) -> Vec<f32> {
    let mut pages = decoder.pages(tokens.len());
    let mut cache = pages.reserve(tokens.len()).unwrap();
    let memory = PathMemory::default();
    let mut all = vec![];
    for tokens in tokens.chunks(step) {
        let mut segments = [Segment { tokens, cache: &mut cache, memory: &memory, scores: Scores::All }];
        let logits = decoder.step(&mut pages, &mut segments).unwrap();
        (0..logits.n_rows()).for_each(|row| all.extend_from_slice(logits.row(row)));
    }
    all
}

fn close(what: &str, found: &[f32], expected: &[f32]) {
    let distance = furthest(found, expected);
    println!("{what}: {distance:.1e}");
    assert!(distance < TOLERANCE, "{what}: off by {distance}");
}

fn decoder(anchor: &Anchor) -> Decoder {
    Decoder::new(anchor, DecoderOptions::default()).unwrap()
}

/// Every family as it is stored, and as an older transformers described it.
fn each(check: impl Fn(&str, Anchor, Reference)) {
    for family in FAMILIES {
        check(family, read(&folder(family)), Reference::of(family));
        if folder(family).join("config_4.json").exists() {
            let copy = copy(family, "config_4.json");
            check(&format!("{family} of transformers 4"), read(copy.path()), Reference::of(family));
        }
    }
}

#[test]
fn logits_are_those_of_transformers() {
    each(|family, anchor, reference| {
        let (tokens, expected) = (reference.ids("tokens"), reference.numbers("logits"));
        let input = Input { tokens: &tokens, starts: &vec![0; tokens.len()], batch: 3, len: 40 };
        close(&format!("{family}: logits"), &logits(&anchor, input), &expected);
        let decoder = decoder(&anchor);
        let one = |tokens: &[u32]| decoded(&decoder, tokens, 7);
        let found: Vec<f32> = tokens.chunks(40).flat_map(one).collect();
        close(&format!("{family}: logits of the decoder"), &found, &expected);
    });
}

#[test]
fn logits_behind_padding_are_those_of_transformers() {
    each(|family, anchor, reference| {
        let (tokens, first) = (reference.ids("padded.tokens"), reference.ids("padded.first"));
        let expected = reference.numbers("padded.logits");
        let (len, v) = (tokens.len() / first.len(), anchor.config().vocab_size);
        // Text begins behind the padding, which is a document of its own.
        let start = |i: usize| if i % len >= first[i / len] as usize { first[i / len] } else { 0 };
        let starts: Vec<u32> = (0..tokens.len()).map(start).collect();
        let all = logits(&anchor, Input { tokens: &tokens, starts: &starts, batch: first.len(), len });
        let rows = all.chunks(v).enumerate().filter(|(i, _)| i % len >= first[i / len] as usize);
        let found: Vec<f32> = rows.flat_map(|(_, row)| row.to_vec()).collect();
        close(&format!("{family}: padded"), &found, &expected);
        let decoder = decoder(&anchor);
        let texts = tokens.chunks(len).zip(&first).map(|(row, &first)| &row[first as usize..]);
        let found: Vec<f32> = texts.flat_map(|text| decoded(&decoder, text, 5)).collect();
        close(&format!("{family}: padded, of the decoder"), &found, &expected);
    });
}

#[test]
fn logits_at_far_positions_are_those_of_transformers() {
    each(|family, anchor, reference| {
        let (tokens, expected) = (reference.ids("long.tokens"), reference.numbers("long.logits"));
        let input = Input { tokens: &tokens, starts: &vec![0; tokens.len()], batch: 1, len: tokens.len() };
        let last = |all: Vec<f32>| all[all.len() - expected.len()..].to_vec();
        close(&format!("{family}: far"), &last(logits(&anchor, input)), &expected);
        let found = last(decoded(&decoder(&anchor), &tokens, 50));
        close(&format!("{family}: far, of the decoder"), &found, &expected);
    });
}

fn best(scores: &[f32]) -> u32 {
    let better = |(best, most): (usize, f32), (i, &score): (usize, &f32)| {
        if score > most { (i, score) } else { (best, most) }
    };
    scores.iter().enumerate().fold((0, f32::NEG_INFINITY), better).0 as u32
}

#[test]
fn generated_tokens_are_those_of_transformers() {
    each(|family, anchor, reference| {
        let (prompt, expected) = (reference.ids("greedy.prompt"), reference.ids("greedy.tokens"));
        let mut cache = KvCache::default();
        let (mut tokens, mut found) = (prompt.clone(), vec![]);
        while found.len() < expected.len() {
            let input =
                Input { tokens: &tokens, starts: &vec![0; tokens.len()], batch: 1, len: tokens.len() };
            let hidden = anchor.hidden(input, &FetchedMemory::none(), Some(&mut cache)).unwrap();
            let scores: Vec<f32> = anchor.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            tokens = vec![best(&scores[scores.len() - anchor.config().vocab_size..])];
            found.extend_from_slice(&tokens);
        }
        assert_eq!(found, expected, "{family}");
        let decoder = decoder(&anchor);
        let mut pages = decoder.pages(64);
        let (mut cache, memory) = (pages.reserve(64).unwrap(), PathMemory::default());
        let (mut tokens, mut found) = (prompt, vec![]);
        while found.len() < expected.len() {
            let scores = Scores::Last;
            let mut segments = [Segment { tokens: &tokens, cache: &mut cache, memory: &memory, scores }];
            let logits = decoder.step(&mut pages, &mut segments).unwrap();
            tokens = vec![best(logits.row(0))];
            found.extend_from_slice(&tokens);
        }
        assert_eq!(found, expected, "{family}, by the decoder");
    });
}

/// The gradients of the parameters that are this tensor, in its order.
fn gradient(anchor: &Anchor, gradients: &Gradients, name: &str) -> Vec<f32> {
    let slots: Vec<&String> = anchor.parameters().keys().collect();
    let of = |name: &str| -> Vec<f32> {
        let slot = slots.iter().position(|slot| *slot == name).unwrap_or_else(|| panic!("{name}"));
        gradients.get(slot).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    };
    let layer = name.split_once("layers.").map(|(_, rest)| rest.split_once('.').unwrap());
    let Some((layer, name)) = layer else {
        return of(if name == "lm_head.weight" { "output" } else { "token_embedding" });
    };
    let of = |name: &str| of(&format!("layers.{layer}.{name}"));
    let part = |name: &str, parts: usize| {
        let all = of(name);
        all[..all.len() / parts].to_vec()
    };
    match name {
        "mlp.gate_proj.weight" => part("ffn", 3),
        "mlp.gate_proj.bias" => part("ffn_inner_bias", 2),
        "attn.qkv_proj.weight" => [of("query"), of("key"), of("value")].concat(),
        "ffn.proj_1.weight" => {
            let all = of("ffn");
            all[..all.len() / 3 * 2].to_vec()
        }
        "input_layernorm.weight" | "attn_norm.weight" => of("attention_norm"),
        "post_feedforward_layernorm.weight" => of("ffn_post_norm"),
        "self_attn.q_proj.weight" => of("query"),
        "self_attn.k_proj.weight" => of("key"),
        "self_attn.v_proj.weight" => of("value"),
        "self_attn.q_proj.bias" => of("query_bias"),
        "self_attn.k_proj.bias" => of("key_bias"),
        "self_attn.v_proj.bias" => of("value_bias"),
        "self_attn.o_proj.weight" | "attn.out_proj.weight" => of("attention_output"),
        "self_attn.o_proj.bias" => of("attention_output_bias"),
        "self_attn.q_norm.weight" | "attn.q_norm.weight" => of("query_norm"),
        "self_attn.k_norm.weight" | "attn.k_norm.weight" => of("key_norm"),
        other => panic!("which parameter is {other}?"),
    }
}

#[test]
fn losses_and_gradients_are_those_of_transformers() {
    each(|family, anchor, reference| {
        let tokens = reference.ids("tokens");
        let next = |i: usize| if i % 40 == 39 { u32::MAX } else { tokens[i + 1] };
        let targets: Vec<u32> = (0..tokens.len()).map(next).collect();
        let input = Input { tokens: &tokens, starts: &vec![0; tokens.len()], batch: 3, len: 40 };
        let targets = Targets { targets: &targets, scale: 1.0 / (3.0 * 39.0), z_loss: 0.0 };
        for checkpoint in [false, true] {
            let compute = Compute { checkpoint, ..Compute::default() };
            let mut gradients = Gradients::default();
            let none = FetchedMemory::none();
            let (loss, _) =
                anchor.loss_and_gradients((input, targets), &none, compute, &mut gradients).unwrap();
            let expected_loss = f64::from(reference.numbers("loss")[0]);
            assert!((loss - expected_loss).abs() < 1e-5, "{family}: loss {loss}, expected {expected_loss}");
            let squares = |slot| {
                let gradient =
                    gradients.get(slot).unwrap_or_else(|| panic!("{family}: {slot} has no gradient"));
                gradient
                    .flatten_all()
                    .unwrap()
                    .to_vec1::<f32>()
                    .unwrap()
                    .iter()
                    .map(|&x| f64::from(x).powi(2))
                    .sum::<f64>()
            };
            let norm = (0..anchor.parameters().len()).map(squares).sum::<f64>().sqrt();
            let expected = f64::from(reference.numbers("grad_norm")[0]);
            assert!(
                (norm / expected - 1.0).abs() < 1e-4,
                "{family}: gradient norm {norm}, expected {expected}"
            );
            let mut worst: f32 = 0.0;
            let names = reference.tensors().names().into_iter().map(str::to_string).collect::<Vec<_>>();
            for name in names.iter().filter_map(|name| name.strip_prefix("grad.")) {
                let found = gradient(&anchor, &gradients, name);
                let expected = reference.numbers(&format!("grad.{name}"));
                let size = expected.iter().map(|x| x.abs()).fold(0.0, f32::max);
                let distance = furthest(&found, &expected) / size.max(0.1);
                assert!(distance < 1e-4, "{family}: gradient of {name} off by {distance} of {size}");
                worst = worst.max(distance);
            }
            println!("{family}: loss: {:.1e}", (loss - expected_loss).abs());
            println!("{family}: gradient norm: {:.1e}", (norm / expected - 1.0).abs());
            println!("{family}: gradients: {worst:.1e}");
        }
    });
}
