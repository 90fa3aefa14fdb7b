//! The first format of llama2.c, written here from checkpoints whose logits are known.

use std::path::Path;

use anchor::{Anchor, Input, llama2c};

use crate::reference::*;

/// The anchor's numbers in that format: pairs of dimensions are neighbours, kinds come one after another.
fn write(anchor: &Anchor, path: &Path) {
    let config = anchor.config();
    let (layer, d, f) = (config.layer(0), config.d_model, config.ffn_width);
    let vocab = config.vocab_size as i32 * if config.tied_embeddings { 1 } else { -1 };
    let sizes = [d, f, config.n_layers, layer.heads, layer.kv_heads].map(|size| size as i32);
    let header = [&sizes[..], &[vocab, config.max_seq_len as i32]].concat();
    let of = |name: &str| anchor.parameters()[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let mut numbers = of("token_embedding");
    let mut kind = |name: &str, change: &dyn Fn(Vec<f32>) -> Vec<f32>| {
        for layer in 0..config.n_layers {
            numbers.extend(change(of(&format!("layers.{layer}.{name}"))));
        }
    };
    let same = |x: Vec<f32>| x;
    let neighbours = |x: Vec<f32>| {
        let (k, half) = (config.head_width, config.head_width / 2);
        let row = |i: usize| i / k * k + i % k / 2 + i % 2 * half;
        (0..x.len() / d).flat_map(|i| x[row(i) * d..][..d].to_vec()).collect()
    };
    kind("attention_norm", &same);
    kind("query", &neighbours);
    kind("key", &neighbours);
    kind("value", &same);
    kind("attention_output", &same);
    kind("ffn_norm", &same);
    kind("ffn", &|x| x[..f * d].to_vec());
    kind("ffn", &|x| (0..d * f).map(|i| x[2 * f * d + i % f * d + i / f]).collect());
    kind("ffn", &|x| x[f * d..2 * f * d].to_vec());
    numbers.extend(of("final_norm"));
    // Tables of the rotation, which nothing reads.
    numbers.extend(vec![f32::NAN; config.max_seq_len * config.head_width]);
    if !config.tied_embeddings {
        numbers.extend(of("output"));
    }
    let header = header.iter().flat_map(|size| size.to_le_bytes());
    let bytes: Vec<u8> = header.chain(numbers.iter().flat_map(|x| x.to_le_bytes())).collect();
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn logits_are_those_of_the_checkpoint_it_was_made_of() {
    // An output of its own; and one head of keys for three of queries, with a tied output.
    for family in ["llama2", "smollm"] {
        let (reference, folder) = (Reference::of(family), tempfile::tempdir().unwrap());
        let mut anchor = read(&crate::reference::folder(family));
        let path = folder.path().join("model.bin");
        write(&anchor, &path);
        let again = llama2c::read(&path, CPU).unwrap();
        let tokens = reference.ids("tokens");
        let input = Input { tokens: &tokens, starts: &vec![0; tokens.len()], batch: 3, len: 40 };
        if family == "smollm" {
            // The format has no base of the rotation: it is 10,000.
            assert_ne!(anchor.config().rope_base, again.config().rope_base);
            let to = tempfile::tempdir().unwrap();
            anchor::hf::write(&again, to.path(), &anchor::hf::SpecialTokens::default()).unwrap();
            anchor = read(to.path());
            assert_eq!(anchor.config(), again.config());
            assert_eq!(furthest(&logits(&again, input), &logits(&anchor, input)), 0.0);
            continue;
        }
        assert_eq!(again.config(), anchor.config());
        assert!(furthest(&logits(&again, input), &reference.numbers("logits")) < 1e-5);
    }
}

#[test]
fn files_of_another_length_or_of_no_model_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.bin");
    let message = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let error = llama2c::read(&path, CPU).map(|_| ()).unwrap_err().to_string();
        error.split_once("model.bin: ").unwrap().1.to_string()
    };
    write(&read(&crate::reference::folder("llama2")), &path);
    let whole = std::fs::read(&path).unwrap();
    assert_eq!(message(&whole[..12]), "expected 7 integers, found 12 bytes");
    let expected =
        format!("expected {} bytes of a model of this header, found {}", whole.len(), whole.len() - 4);
    assert_eq!(message(&whole[..whole.len() - 4]), expected);
    let with = |index: usize, size: i32| {
        let mut bytes = whole.clone();
        bytes[4 * index..][..4].copy_from_slice(&size.to_le_bytes());
        bytes
    };
    assert_eq!(message(&with(2, -1)), "n_layers: expected a size, found -1");
    assert_eq!(message(&with(3, 5)), "dim: expected a multiple of 5 heads, found 32");
    assert_eq!(message(&with(5, i32::MIN)), "vocab_size: expected a size, found -2147483648");
}
