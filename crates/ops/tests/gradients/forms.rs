//! What decoders of the usual families want: heads that share keys, soft caps, norms of heads, biases, post-norms.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use ops::{Activation, AttentionShape, FfnPart, NormRope, Precision, RopeTable, Run, Scoring, Tape, Traced};

use crate::case::Case;

fn check_attention(name: &str, shape: AttentionShape, window: usize) {
    let AttentionShape { batch: b, queries: t, keys: s, heads, kv_heads, head_width, .. } = shape;
    let start = |query: usize| (s - t + query + 1).saturating_sub(window) as u32;
    let starts: Arc<[u32]> = (0..b * t).map(|i| start(i % t)).collect();
    let op = |tape: &mut Tape, x: &[Traced]| ops::attention(tape, [&x[0], &x[1], &x[2]], &starts, shape);
    let (d, e) = (heads * head_width, kv_heads * head_width);
    Case { shapes: vec![vec![b, t, d], vec![b, s, e], vec![b, s, e]], n_activations: 3, op: &op }.check(name);
}

#[test]
fn attention_of_heads_that_share_keys_with_factors_caps_and_windows() {
    let all = usize::MAX;
    let shape = |heads: (usize, usize), head_width: usize, scoring: Scoring| AttentionShape {
        batch: 2,
        queries: 70,
        keys: 70,
        heads: heads.0,
        kv_heads: heads.1,
        head_width,
        scoring,
    };
    let (factor, cap) = (Some(0.8), Some(0.5));
    check_attention("two a head of keys", shape((4, 2), 6, Scoring::default()), all);
    check_attention("one head of keys", shape((3, 1), 16, Scoring::default()), all);
    check_attention("a factor", shape((2, 2), 6, Scoring { factor, cap: None }), all);
    check_attention("a cap", shape((2, 2), 6, Scoring { factor: None, cap }), all);
    check_attention("a window", shape((2, 1), 6, Scoring::default()), 40);
    check_attention("everything", shape((4, 2), 6, Scoring { factor, cap }), 33);
    let continued = AttentionShape { queries: 3, keys: 50, ..shape((4, 2), 32, Scoring { factor, cap }) };
    check_attention("new queries", continued, 7);
}

#[test]
fn heads_that_cannot_share_keys_are_an_error() {
    let zeros = |d: usize| Traced::constant(Tensor::zeros((1, 2, d), DType::F32, &Device::Cpu).unwrap());
    let (q, k) = (zeros(12), zeros(8));
    let scoring = Scoring::default();
    let shape =
        AttentionShape { batch: 1, queries: 2, keys: 2, heads: 3, kv_heads: 2, head_width: 4, scoring };
    let tape = &mut Tape::off(Precision::F32);
    let error = ops::attention(tape, [&q, &k, &k], &[0, 0].into(), shape).unwrap_err().to_string();
    assert!(error.contains("heads: 3, kv_heads: 2"), "{error}");
}

#[test]
fn norm_of_each_head_and_no_norm_before_rope() {
    for (b, t, heads, k, first_position) in [(1, 1, 1, 2, 0), (2, 37, 3, 10, 5), (3, 33, 2, 32, 0)] {
        let frequencies: Vec<f64> = (0..k / 2).map(|i| 0.7f64.powi(i as i32)).collect();
        let table = RopeTable::of_frequencies(64, &frequencies, heads > 1);
        let options = NormRope { table: &table, first_position, eps: 1e-6 };
        let op = |tape: &mut Tape, x: &[Traced]| ops::norm_rope(tape, &x[0], Some(&x[1]), options);
        let x = vec![b, t, heads * k];
        Case { shapes: vec![x.clone(), vec![k]], n_activations: 1, op: &op }.check("norm of heads and rope");
        let op = |tape: &mut Tape, x: &[Traced]| ops::norm_rope(tape, &x[0], None, options);
        Case { shapes: vec![x], n_activations: 1, op: &op }.check("rope");
    }
}

#[test]
fn a_norm_of_another_length_before_rope_is_an_error() {
    let x = Traced::constant(Tensor::zeros((1, 1, 8), DType::F32, &Device::Cpu).unwrap());
    let gain = Traced::constant(Tensor::ones(2, DType::F32, &Device::Cpu).unwrap());
    let options = NormRope { table: &RopeTable::new(5, 4, 1e4), first_position: 0, eps: 1e-6 };
    let error = ops::norm_rope(&mut Tape::off(Precision::F32), &x, Some(&gain), options).unwrap_err();
    assert!(error.to_string().contains("gain [2] for x [1, 1, 8]"), "{error}");
}

#[test]
fn rms_norm_added_to_a_base() {
    for (rows, d) in [(1, 2), (70, 33), (130, 64)] {
        let op = |tape: &mut Tape, x: &[Traced]| ops::add_rms_norm(tape, &x[0], &x[1], &x[2], 1e-6);
        let x = vec![rows, d];
        Case { shapes: vec![x.clone(), x, vec![d]], n_activations: 2, op: &op }.check("post-norm");
    }
}

#[test]
fn linear_with_a_bias() {
    for (b, t, i, o) in [(1, 1, 1, 1), (2, 3, 5, 7), (3, 41, 33, 65)] {
        let op = |tape: &mut Tape, x: &[Traced]| ops::affine(tape, None, &x[0], &x[1], Some(&x[2]));
        Case { shapes: vec![vec![b, t, i], vec![o, i], vec![o]], n_activations: 1, op: &op }.check("affine");
        let op = |tape: &mut Tape, x: &[Traced]| ops::affine(tape, Some(&x[1]), &x[0], &x[2], Some(&x[3]));
        let shapes = vec![vec![b, t, i], vec![b, t, o], vec![o, i], vec![o]];
        Case { shapes, n_activations: 2, op: &op }.check("affine on a base");
    }
}

#[test]
fn scale() {
    let op = |tape: &mut Tape, x: &[Traced]| ops::scale(tape, &x[0], 5.656_854);
    Case { shapes: vec![vec![2, 3, 5]], n_activations: 1, op: &op }.check("scale");
}

#[test]
fn gated_ffn_of_other_activations_and_of_no_base() {
    // Without relu, at whose kink a product rounded to bf16 may lie on the other side.
    for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
        let op = |tape: &mut Tape, x: &[Traced]| {
            // The rows 30..40 are served by the second part alone, 40..45 by none.
            let run = |first_row, n_rows| vec![Run { block: 0, first_row, n_rows }];
            let parts = vec![
                FfnPart { blocks: vec![x[1].clone()], runs: run(0, 30), bias: None },
                FfnPart { blocks: vec![x[2].clone()], runs: run(10, 30), bias: None },
            ];
            ops::gated_ffn(tape, None, &x[0], activation, parts)
        };
        let shapes = vec![vec![3, 15, 6], vec![3, 40, 6], vec![3, 5, 6]];
        Case { shapes, n_activations: 1, op: &op }.check(&format!("{activation:?}"));
    }
}

#[test]
fn gated_ffn_with_biases_of_its_inner_layer() {
    let op = |tape: &mut Tape, x: &[Traced]| {
        let run = |first_row, n_rows| Run { block: 0, first_row, n_rows };
        let biased = |block: &Traced, bias: &Traced, runs: Vec<Run>| FfnPart {
            blocks: vec![block.clone()],
            runs,
            bias: Some(bias.clone()),
        };
        let parts = vec![
            biased(&x[2], &x[3], vec![run(0, 150)]),
            biased(&x[4], &x[5], vec![run(3, 70), run(80, 11)]),
        ];
        ops::gated_ffn(tape, Some(&x[0]), &x[1], Activation::GeluTanh, parts)
    };
    let x = vec![2, 75, 6];
    let shapes = vec![x.clone(), x, vec![3, 7, 6], vec![14], vec![3, 2, 6], vec![4]];
    Case { shapes, n_activations: 2, op: &op }.check("biases");
}

#[test]
fn a_bias_added_to_rows() {
    let op = |tape: &mut Tape, x: &[Traced]| ops::add_bias(tape, &x[0], &x[1]);
    Case { shapes: vec![vec![3, 70, 5], vec![5]], n_activations: 1, op: &op }.check("bias");
    let zeros = |n: usize| Traced::constant(Tensor::zeros(n, DType::F32, &Device::Cpu).unwrap());
    let error = ops::add_bias(&mut Tape::off(Precision::F32), &zeros(6), &zeros(4)).unwrap_err().to_string();
    assert!(error.contains("bias [4] for x [6]"), "{error}");
}
