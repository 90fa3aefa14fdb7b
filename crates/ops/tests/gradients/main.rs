//! Each fused body, in f32 and with products in bf16, against the composed body in f64, forward and backward,
//! and the composed body against central differences, over odd sizes.

mod case;
mod forms;
mod memory;
mod memory_decode;

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use ops::{
    Activation, AttentionShape, CrossEntropy, FfnPart, Gradients, IGNORE, NormRope, Precision, RopeTable,
    Run, Scoring, Tape, Traced,
};

use crate::case::{Body, Case, values};

#[test]
fn rms_norm() {
    for (rows, d) in [(1, 2), (3, 7), (70, 33), (130, 64)] {
        let op = |tape: &mut Tape, x: &[Traced]| ops::rms_norm(tape, &x[0], &x[1], 1e-6);
        Case { shapes: vec![vec![rows, d], vec![d]], n_activations: 1, op: &op }.check("rms norm");
    }
}

#[test]
fn norm_and_rope_with_an_offset() {
    for (b, t, heads, k, first_position) in [(1, 1, 1, 2, 0), (2, 37, 3, 10, 5), (3, 33, 2, 32, 0)] {
        let table = RopeTable::new(64, k, 10_000.0);
        let op = |tape: &mut Tape, x: &[Traced]| {
            ops::norm_rope(tape, &x[0], Some(&x[1]), NormRope { table: &table, first_position, eps: 1e-6 })
        };
        Case { shapes: vec![vec![b, t, heads * k], vec![heads * k]], n_activations: 1, op: &op }
            .check("norm and rope");
    }
}

#[test]
fn rope_outside_its_table_is_an_error() {
    let x = Traced::constant(Tensor::zeros((1, 4, 8), DType::F32, &Device::Cpu).unwrap());
    let gain = Traced::constant(Tensor::ones(8, DType::F32, &Device::Cpu).unwrap());
    let options = NormRope { table: &RopeTable::new(5, 4, 1e4), first_position: 2, eps: 1e-6 };
    let error = ops::norm_rope(&mut off(), &x, Some(&gain), options).unwrap_err().to_string();
    assert!(error.contains("position 5") && error.contains("holds 5"), "{error}");
}

fn off() -> Tape<'static> {
    Tape::off(Precision::F32)
}

#[test]
fn linear_with_and_without_a_base() {
    for (b, t, i, o) in [(1, 1, 1, 1), (2, 3, 5, 7), (3, 41, 33, 65), (1, 130, 64, 32)] {
        let op = |tape: &mut Tape, x: &[Traced]| ops::linear(tape, None, &x[0], &x[1]);
        Case { shapes: vec![vec![b, t, i], vec![o, i]], n_activations: 1, op: &op }.check("linear");
        let op = |tape: &mut Tape, x: &[Traced]| ops::linear(tape, Some(&x[1]), &x[0], &x[2]);
        Case { shapes: vec![vec![b, t, i], vec![b, t, o], vec![o, i]], n_activations: 2, op: &op }
            .check("linear on a base");
    }
}

#[test]
fn embedding_sums_the_gradient_of_repeated_tokens() {
    let ids: Vec<u32> = (0..3 * 50).map(|i| (i * i % 13) as u32).collect();
    let op = |tape: &mut Tape, x: &[Traced]| ops::embedding(tape, &x[0], &ids, (3, 50));
    Case { shapes: vec![vec![600, 9]], n_activations: 0, op: &op }.check("embedding");
    let table = Traced::constant(Tensor::zeros((4, 2), DType::F32, &Device::Cpu).unwrap());
    let error = ops::embedding(&mut off(), &table, &[1, 4], (1, 2)).unwrap_err().to_string();
    assert!(error.contains("token 4 of a vocabulary of 4"), "{error}");
}

fn one_head((queries, keys): (usize, usize), head_width: usize) -> AttentionShape {
    AttentionShape { batch: 1, queries, keys, heads: 1, kv_heads: 1, head_width, scoring: Scoring::default() }
}

fn check_attention(b: usize, t: usize, s: usize, heads: usize, k: usize, starts: &[u32]) {
    let shape = AttentionShape { batch: b, heads, kv_heads: heads, ..one_head((t, s), k) };
    let starts: Arc<[u32]> = starts.into();
    let op = |tape: &mut Tape, x: &[Traced]| ops::attention(tape, [&x[0], &x[1], &x[2]], &starts, shape);
    let d = heads * k;
    Case { shapes: vec![vec![b, t, d], vec![b, s, d], vec![b, s, d]], n_activations: 3, op: &op }
        .check("attention");
}

#[test]
fn attention_over_whole_sequences_and_over_documents() {
    check_attention(1, 1, 1, 1, 1, &[0]);
    check_attention(2, 67, 67, 2, 5, &vec![0; 2 * 67]);
    // Documents that begin at 0, 10, 64, 65 and 129, so tiles see none, one or several of them.
    let start = |t: u32| [129, 65, 64, 10, 0].into_iter().find(|&s| s <= t).unwrap();
    let starts: Vec<u32> = (0..2).flat_map(|_| (0..140).map(start)).collect();
    check_attention(2, 140, 140, 3, 4, &starts);
    check_attention(2, 140, 140, 2, 16, &starts);
}

#[test]
fn attention_of_new_queries_against_earlier_keys() {
    for head_width in [4, 32] {
        check_attention(2, 3, 9, 2, head_width, &[0, 2, 2, 4, 4, 8]);
    }
}

#[test]
fn attention_that_would_see_no_key_is_an_error() {
    let x = Traced::constant(Tensor::zeros((1, 2, 4), DType::F32, &Device::Cpu).unwrap());
    let shape = one_head((2, 2), 4);
    let error = ops::attention(&mut off(), [&x, &x, &x], &[1, 0].into(), shape).unwrap_err().to_string();
    assert!(error.contains("query 0 of sequence 0 starts at key 1"), "{error}");
}

#[test]
fn gated_ffn_of_one_block() {
    let op = |tape: &mut Tape, x: &[Traced]| {
        ops::gated_ffn(
            tape,
            Some(&x[0]),
            &x[1],
            Activation::Silu,
            vec![FfnPart::everywhere(x[2].clone(), 300)],
        )
    };
    let x = vec![3, 100, 6];
    Case { shapes: vec![x.clone(), x, vec![3, 11, 6]], n_activations: 2, op: &op }.check("one block");
}

#[test]
fn gated_ffn_widened_by_blocks_of_several_widths() {
    // Of the second part, block 2 serves two runs and the rows 30..35 use none; a run begins at an odd row.
    // Of the third, one block serves rows that the second cuts.
    let run = |block, first_row, n_rows| Run { block, first_row, n_rows };
    let op = |tape: &mut Tape, x: &[Traced]| {
        let anchor = FfnPart::everywhere(x[2].clone(), 75);
        let runs = vec![run(2, 0, 20), run(0, 20, 10), run(2, 35, 33), run(1, 68, 7)];
        let many = FfnPart { blocks: x[3..6].to_vec(), runs, bias: None };
        let few = FfnPart { blocks: x[6..7].to_vec(), runs: vec![run(0, 10, 60)], bias: None };
        ops::gated_ffn(tape, Some(&x[0]), &x[1], Activation::Silu, vec![anchor, many, few])
    };
    let (x, block) = (vec![3, 25, 6], |r: usize| vec![3, r, 6]);
    let shapes = vec![x.clone(), x, block(40), block(5), block(5), block(5), block(1)];
    Case { shapes, n_activations: 2, op: &op }.check("many blocks");
}

#[test]
fn gated_ffn_without_the_anchor_keeps_the_base_of_other_rows() {
    let op = |tape: &mut Tape, x: &[Traced]| {
        let runs = vec![Run { block: 0, first_row: 3, n_rows: 4 }];
        ops::gated_ffn(
            tape,
            Some(&x[0]),
            &x[1],
            Activation::Silu,
            vec![FfnPart { blocks: vec![x[2].clone()], runs, bias: None }],
        )
    };
    let x = vec![9, 6];
    Case { shapes: vec![x.clone(), x, vec![3, 2, 6]], n_activations: 2, op: &op }.check("some rows");
}

#[test]
fn gated_ffn_refuses_runs_that_overlap_and_blocks_of_other_sizes() {
    let zeros = |shape: &[usize]| Traced::constant(Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap());
    let x = zeros(&[4, 2]);
    let error = |blocks: Vec<Traced>, runs: &[Run]| {
        let part = FfnPart { blocks, runs: runs.to_vec(), bias: None };
        ops::gated_ffn(&mut off(), Some(&x), &x, Activation::Silu, vec![part]).unwrap_err().to_string()
    };
    let runs = [Run { block: 0, first_row: 0, n_rows: 3 }, Run { block: 0, first_row: 2, n_rows: 2 }];
    let overlap = error(vec![zeros(&[3, 2, 2])], &runs);
    assert!(overlap.contains("rows below 3 being taken"), "{overlap}");
    let size = error(vec![zeros(&[3, 2, 2]), zeros(&[3, 1, 2])], &runs[..1]);
    assert!(size.contains("a block of [3, 1, 2] for x of width 2"), "{size}");
}

#[test]
fn linear_cross_entropy_with_ignored_rows_and_z_loss() {
    for (n, d, v) in [(1, 1, 2), (5, 3, 33), (300, 7, 40)] {
        let targets: Vec<u32> =
            (0..n).map(|i| if i % 5 == 3 { IGNORE } else { (i * 7 % v) as u32 }).collect();
        for (z_loss, cap) in [(0.0, None), (1e-2, None), (1e-2, Some(0.7))] {
            // The loss is the end of a tape: it makes its gradients itself, so its weight is 1.
            let op = |tape: &mut Tape, x: &[Traced]| {
                let options = CrossEntropy { targets: &targets, scale: 0.3, z_loss };
                let (loss, rows) = ops::linear_cross_entropy(tape, &x[0], &x[1], cap, options)?;
                let scored: f64 = rows.iter().map(|&r| f64::from(r)).sum::<f64>() * 0.3;
                assert!(z_loss > 0.0 || (scored - loss).abs() < 1e-4 * (1.0 + loss.abs()));
                assert!(rows.iter().zip(&targets).all(|(&r, &t)| t != IGNORE || r == 0.0));
                let weight = values(1, 17, 1.0)[0];
                Ok(Traced::constant(Tensor::new(&[loss / weight], &Device::Cpu)?))
            };
            Case { shapes: vec![vec![n, d], vec![v, d]], n_activations: 1, op: &op }.check("cross-entropy");
        }
    }
}

#[test]
fn a_checkpoint_changes_nothing() -> Result<()> {
    let shapes = [vec![2, 9, 8], vec![8], vec![8, 8]];
    let block = |tape: &mut Tape, x: &Traced, w: &[Traced]| {
        let normed = ops::rms_norm(tape, x, &w[0], 1e-6)?;
        ops::linear(tape, Some(x), &normed, &w[1])
    };
    let gradients = |checkpoint: bool| -> Result<Vec<Vec<f32>>> {
        let leaf = |(slot, shape): (usize, &Vec<usize>)| {
            let values = values(shape.iter().product(), slot + 1, 0.9);
            let tensor = Tensor::from_vec(values, shape.clone(), &Device::Cpu)?.to_dtype(DType::F32)?;
            Ok(Traced::leaf(tensor, slot))
        };
        let leaves = shapes.iter().enumerate().map(leaf).collect::<Result<Vec<_>>>()?;
        let mut gradients = Gradients::default();
        let mut tape = Tape::recording(Precision::F32, &mut gradients, leaves.len());
        let mut x = leaves[0].clone();
        for _ in 0..2 {
            let weights = leaves[1..].to_vec();
            x = match checkpoint {
                true => tape.checkpoint(&x, move |tape, x| block(tape, x, &weights))?,
                false => block(&mut tape, &x, &weights)?,
            };
        }
        tape.seed(&x, x.value())?;
        tape.backward()?;
        let all =
            (0..leaves.len()).map(|slot| gradients.get(slot).expect("a gradient").flatten_all()?.to_vec1());
        all.collect()
    };
    assert_eq!(gradients(true)?, gradients(false)?);
    Ok(())
}

/// Every device that this build has bodies for.
fn devices() -> Vec<Device> {
    let mut all = vec![];
    for (body, _) in Body::fused() {
        if !all.iter().any(|device: &Device| device.same_device(&body.device)) {
            all.push(body.device);
        }
    }
    all
}

#[test]
fn adamw_matches_its_definition_in_f64() -> Result<()> {
    devices().iter().try_for_each(check_adamw)
}

fn check_adamw(device: &Device) -> Result<()> {
    let n = 20_000;
    let (start, gradient) = (values(n, 3, 1.0), values(n, 4, 0.01));
    let var = Tensor::from_vec(start.clone(), n, device)?.to_dtype(DType::F32)?;
    let g = Tensor::from_vec(gradient.clone(), n, device)?.to_dtype(DType::F32)?;
    let (m, v) = (var.zeros_like()?, var.zeros_like()?);
    let (mut p64, mut m64, mut v64) = (start, vec![0f64; n], vec![0f64; n]);
    for step in 1..=5 {
        let a = ops::AdamW {
            learning_rate: 0.01,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            step,
            gradient_scale: 0.5,
        };
        ops::adamw_step(&var, &g, [&m, &v], a)?;
        for i in 0..n {
            let g = gradient[i] * 0.5;
            m64[i] = 0.9 * m64[i] + 0.1 * g;
            v64[i] = 0.95 * v64[i] + 0.05 * g * g;
            let (mh, vh) =
                (m64[i] / (1.0 - 0.9f64.powi(step as i32)), v64[i] / (1.0 - 0.95f64.powi(step as i32)));
            p64[i] -= 0.01 * 0.1 * p64[i] + 0.01 * mh / (vh.sqrt() + 1e-8);
        }
    }
    for (found, expected) in var.to_vec1::<f32>()?.iter().zip(&p64) {
        assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} against {expected}");
    }
    Ok(())
}

#[test]
fn sum_of_squares_is_exact_enough() -> Result<()> {
    for device in devices() {
        let x = values(50_001, 5, 3.0);
        let expected: f64 = x.iter().map(|x| x * x).sum();
        let found = ops::sum_of_squares(&Tensor::from_vec(x, 50_001, &device)?.to_dtype(DType::F32)?)?;
        assert!((found - expected).abs() < 1e-5 * expected);
    }
    Ok(())
}

#[test]
fn operands_and_gradients_that_cannot_be_are_errors() -> Result<()> {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
    let mut gradients = Gradients::default();
    let mut tape = Tape::recording(Precision::F32, &mut gradients, 1);
    let x = Traced::leaf(zeros(&[1, 2, 4])?, 0);
    let shape = one_head((2, 2), 4);
    let error = ops::attention(&mut tape, [&x, &x, &x], &[0, 0].into(), shape).unwrap_err().to_string();
    assert!(error.contains("must be different tensors"), "{error}");
    let x = Traced::constant(zeros(&[1, 2, 4])?);
    let error =
        ops::attention(&mut off(), [&x, &x, &x], &[0, 0].into(), AttentionShape { batch: 1, ..shape });
    assert!(error.is_ok(), "constants may be the same");
    let three = AttentionShape { queries: 3, keys: 3, ..shape };
    let x = Traced::constant(zeros(&[1, 3, 4])?);
    let error = ops::attention(&mut off(), [&x, &x, &x], &[0, 1, 0].into(), three).unwrap_err().to_string();
    assert!(error.contains("query 2 of sequence 0 starts at key 0, the one before at 1"), "{error}");
    let w = Traced::leaf(zeros(&[4, 4])?, 0);
    let y = ops::linear(&mut tape, None, &x, &w)?;
    let error = tape.seed(&y, &zeros(&[3, 4])?).unwrap_err().to_string();
    assert!(error.contains("a gradient of [3, 4] for a tensor of [1, 3, 4]"), "{error}");
    Ok(())
}
