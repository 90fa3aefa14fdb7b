//! An anchor that has everything its form can have, with memory: gradients against finite differences, and the decoder
//! against the anchor in f64 and against itself.

use anchor::{
    Activation, Anchor, AnchorConfig, AttentionBias, Decoder, DecoderOptions, FetchedMemory, Form,
    LayerSizes, LocalLayers, PathMemory, QkNorm, RopeScaling,
};
use candle_core::{DType, Device, Tensor};
use memory_bank::BlockDtype;

use crate::decoder::{decode, path_memories};
use crate::fixtures::*;

fn everything(qk_norm: QkNorm) -> AnchorConfig {
    let mut form = Form {
        local: Some(LocalLayers { window: 37, layers: vec![1], rope_base: Some(100.0) }),
        activation: Activation::GeluTanh,
        ffn_bias: true,
        post_norms: true,
        embedding_scale: Some(4.0),
        logit_cap: Some(2.0),
        layers: [(4, 2, 24), (3, 1, 17)]
            .map(|(n_heads, kv_heads, ffn_width)| LayerSizes { n_heads, kv_heads, ffn_width })
            .to_vec(),
        ..Form::default()
    };
    form.attention.qk_norm = qk_norm;
    form.attention.bias = AttentionBias::All;
    form.attention.factor = Some(0.7);
    form.attention.cap = Some(1.5);
    form.rope.scaling =
        RopeScaling::Llama3 { factor: 4.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_len: 64 };
    AnchorConfig { n_heads: 4, max_seq_len: 150, form, ..config(true) }
}

/// The anchor, with gains and biases that are not all the same.
pub(crate) fn anchor_of(config: AnchorConfig, on: (&Device, DType)) -> Anchor {
    let anchor = Anchor::new(config, 7, on).unwrap();
    for parameter in anchor.parameters().values().filter(|parameter| parameter.dims().len() == 1) {
        let n = parameter.elem_count();
        // Exact in f32, so that anchors of both types have the same numbers.
        let shift: Vec<f32> = (0..n).map(|i| ((i * 37 % 64) as f32 - 32.0) / 128.0).collect();
        let shift = Tensor::from_vec(shift, n, on.0).unwrap().to_dtype(on.1).unwrap();
        parameter.slice_set(&(parameter + shift).unwrap(), 0, 0).unwrap();
    }
    anchor
}

const NORMS: [QkNorm; 3] = [QkNorm::Full, QkNorm::Head, QkNorm::None];

#[test]
fn gradients_are_those_of_finite_differences() {
    const STEP: f64 = 1e-5;
    for qk_norm in NORMS {
        // The window of 37 hides the beginning.
        let (spec, batch, paths) = (spec([4, 2]), Batch::random(2, 50, 6), [leaf(0), generic()]);
        let blocks = trained_blocks(&spec, &paths);
        let anchor = anchor_of(everything(qk_norm), CPU);
        let (found, of_blocks) = gradients(&anchor, &batch, &memory(&blocks, &paths, &spec));
        let exact = anchor_of(everything(qk_norm), CPU_F64);
        let exact_memory = FetchedMemory::to_device(&blocks, &paths, &spec, CPU_F64).unwrap();
        let (of_exact, exact_blocks) = gradients(&exact, &batch, &exact_memory);
        for (block, exact) in of_blocks.iter().zip(&exact_blocks) {
            let error = relative_error(&block.values, &exact.values);
            assert!(error < 1e-5, "{qk_norm:?}: {}: {error}", block.id);
        }
        for (slot, (name, parameter)) in exact.parameters().iter().enumerate() {
            let gradient = of_exact.get(slot).unwrap();
            let error = relative_error(&values(found.get(slot).unwrap()), &values(gradient));
            assert!(error < 1e-5, "{qk_norm:?}: {name}: {error}");
            let kept = parameter.copy().unwrap();
            let flat: Vec<f64> = parameter.flatten_all().unwrap().to_vec1().unwrap();
            let gradient: Vec<f64> = gradient.flatten_all().unwrap().to_vec1().unwrap();
            for place in (0..flat.len()).step_by(flat.len().div_ceil(3)) {
                let loss = |delta: f64| {
                    let mut moved = flat.clone();
                    moved[place] += delta;
                    let moved = Tensor::from_vec(moved, parameter.shape(), &Device::Cpu).unwrap();
                    parameter.slice_set(&moved, 0, 0).unwrap();
                    exact.loss(batch.input(), batch.targets(), &exact_memory).unwrap().0
                };
                let expected = (loss(STEP) - loss(-STEP)) / (2.0 * STEP);
                let error = (gradient[place] - expected).abs();
                assert!(
                    error < 1e-5 * (1.0 + expected.abs()),
                    "{qk_norm:?}: {name} {place}: {error} of {expected}"
                );
            }
            parameter.slice_set(&kept, 0, 0).unwrap();
        }
    }
}

#[test]
fn scores_of_the_decoder_are_those_of_the_anchor_in_f64_and_the_same_however_cut() {
    for qk_norm in NORMS {
        let (spec, len) = (spec([4, 2]), 107);
        let anchor = anchor_of(everything(qk_norm), CPU);
        let decoder = Decoder::new(&anchor, DecoderOptions::default()).unwrap();
        let mut pages = decoder.pages(3 * 128);
        let batch = Batch::random(3, len, 5);
        let paths = [leaf(3), generic(), leaf(2)];
        let (memories, blocks) = path_memories(&spec, &paths, BlockDtype::Int8);
        let exact = anchor_of(everything(qk_norm), CPU_F64);
        let memory = FetchedMemory::to_device(&blocks, &paths, &spec, CPU_F64).unwrap();
        let expected = logits(&exact, &batch, &memory);
        let sequences: Vec<(&[u32], &PathMemory)> = batch.tokens.chunks_exact(len).zip(&memories).collect();
        let found = decode(&decoder, &mut pages, &sequences, |i, step| 1 + (7 * i + 5 * step) % 40);
        let error = relative_error(&found.concat().concat(), &expected);
        assert!(error < 2e-6, "{qk_norm:?}: {error}");
        let singly = decode(&decoder, &mut pages, &sequences, |_, _| 1);
        assert_eq!(bits(&singly.concat().concat()), bits(&found.concat().concat()), "{qk_norm:?}");
    }
}

#[test]
fn a_cache_continues_what_a_window_sees() {
    let anchor = anchor_of(everything(QkNorm::Head), CPU);
    let batch = Batch::random(1, 90, 5);
    let none = FetchedMemory::none();
    let whole = logits(&anchor, &batch, &none);
    let mut cache = anchor::KvCache::default();
    let mut pieces = vec![];
    for range in [0..50, 50..51, 51..90] {
        let piece = batch.slice(0, range);
        let hidden = anchor.hidden(piece.input(), &none, Some(&mut cache)).unwrap();
        pieces.extend(values(&anchor.logits(&hidden).unwrap()));
    }
    assert!(relative_error(&pieces, &whole) < 1e-5);
}
