//! The operations of LoRA and KV memory.

use candle_core::{DType, Device, Tensor};
use ops::{Activation, FfnLora, FfnPart, KvMemoryShape, KvPart, LoraPart, Precision, Run, Tape, Traced};

use crate::case::{self, Case};

fn run(block: usize, first_row: usize, n_rows: usize) -> Run {
    Run { block, first_row, n_rows }
}

fn off() -> Tape<'static> {
    Tape::off(Precision::F32)
}

/// Two parts over 75 rows from `blocks`: of the first, block 2 serves two runs and the rows 30..35 use none, and a run
/// begins at an odd row; of the second, one block serves rows that the first cuts.
fn parts(blocks: &[Traced]) -> Vec<LoraPart> {
    let runs = vec![run(2, 0, 20), run(0, 20, 10), run(2, 35, 33), run(1, 68, 7)];
    let few = vec![run(0, 11, 60)];
    vec![
        LoraPart { blocks: blocks[..3].to_vec(), runs },
        LoraPart { blocks: blocks[3..4].to_vec(), runs: few },
    ]
}

#[test]
fn lora_of_one_block_and_of_several_ranks() {
    let op = |tape: &mut Tape, x: &[Traced]| {
        let part = LoraPart { blocks: vec![x[2].clone()], runs: vec![run(0, 0, 300)] };
        ops::lora(tape, &x[0], &x[1], &[part], 2.0)
    };
    let shapes = vec![vec![3, 100, 9], vec![3, 100, 6], vec![4 * 15]];
    Case { shapes, n_activations: 2, op: &op }.check("one block");

    let op = |tape: &mut Tape, x: &[Traced]| ops::lora(tape, &x[0], &x[1], &parts(&x[2..]), 2.0);
    for (i, o) in [(6, 9), (40, 33)] {
        let block = |r: usize| vec![r * (i + o)];
        let shapes = vec![vec![3, 25, o], vec![3, 25, i], block(5), block(5), block(5), block(2)];
        Case { shapes, n_activations: 2, op: &op }.check("many blocks");
    }
}

#[test]
fn lora_leaves_the_rows_that_it_does_not_serve() {
    let op = |tape: &mut Tape, x: &[Traced]| {
        let part = LoraPart { blocks: vec![x[2].clone()], runs: vec![run(0, 3, 4)] };
        ops::lora(tape, &x[0], &x[1], &[part], 0.5)
    };
    Case { shapes: vec![vec![9, 4], vec![9, 6], vec![2 * 10]], n_activations: 2, op: &op }.check("some rows");
}

#[test]
fn lora_refuses_runs_that_overlap_and_blocks_of_other_sizes() {
    let zeros = |shape: &[usize]| Traced::constant(Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap());
    let (base, x) = (zeros(&[4, 3]), zeros(&[4, 2]));
    let error = |blocks: Vec<Traced>, runs: &[Run]| {
        let part = LoraPart { blocks, runs: runs.to_vec() };
        ops::lora(&mut off(), &base, &x, &[part], 2.0).unwrap_err().to_string()
    };
    let overlap = error(vec![zeros(&[10])], &[run(0, 0, 3), run(0, 2, 2)]);
    assert!(overlap.contains("lora: Run") && overlap.contains("rows below 3 being taken"), "{overlap}");
    let size = error(vec![zeros(&[10]), zeros(&[15])], &[run(0, 0, 1)]);
    assert!(size.contains("lora: a block of [15] for a layer from 2 to 3"), "{size}");
    let size = error(vec![zeros(&[9])], &[run(0, 0, 1)]);
    assert!(size.contains("lora: a block of [9] for a layer from 2 to 3"), "{size}");
}

#[test]
fn an_ffn_with_lora_on_all_of_its_matrices() {
    let ffn = |block: &Traced, blocks: &[Traced]| FfnLora {
        block: block.clone(),
        bias: blocks.get(12).cloned(),
        activation: if blocks.len() > 12 { Activation::GeluTanh } else { Activation::Silu },
        gate: parts(&blocks[..4]),
        up: parts(&blocks[4..8]),
        down: parts(&blocks[8..12]),
        alpha: 2.0,
    };
    let with_base =
        |tape: &mut Tape, x: &[Traced]| ops::gated_ffn_lora(tape, Some(&x[0]), &x[1], &ffn(&x[2], &x[3..]));
    let without =
        |tape: &mut Tape, x: &[Traced]| ops::gated_ffn_lora(tape, None, &x[0], &ffn(&x[1], &x[2..]));
    for (d, f) in [(6, 11), (34, 40)] {
        let x = vec![3, 25, d];
        let block = |r: usize| vec![r * (d + f)];
        let mut shapes = vec![x.clone(), x, vec![3, f, d]];
        (0..3).for_each(|_| shapes.extend([block(5), block(5), block(5), block(2)]));
        let biased = [&shapes[1..], &[vec![2 * f]]].concat();
        Case { shapes: biased, n_activations: 1, op: &without }.check("ffn with lora and a bias");
        Case { shapes, n_activations: 2, op: &with_base }.check("ffn with lora on a base");
    }
}

fn numbers(shape: &[usize], seed: usize) -> Traced {
    let values = case::values(shape.iter().product(), seed, 0.9);
    Traced::constant(Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap())
}

/// A pair of matrices as it begins: B is 0.
fn fresh(r: usize, (i, o): (usize, usize)) -> Traced {
    let a = case::values(r * i, 3, 0.9);
    let block: Vec<f32> = a.into_iter().map(|x| x as f32).chain(vec![0.0; r * o]).collect();
    Traced::constant(Tensor::from_vec(block, r * (i + o), &Device::Cpu).unwrap())
}

fn bits(y: &Traced) -> Vec<u32> {
    let values: Vec<f32> = y.value().flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn lora_that_was_never_trained_changes_no_bit() {
    for precision in [Precision::F32, Precision::Bf16] {
        for (n, d, f) in [(2, 33, 70), (75, 64, 200), (150, 256, 300)] {
            let (base, x, ffn) = (numbers(&[n, d], 1), numbers(&[n, d], 2), numbers(&[3, f, d], 4));
            let part = |sizes| vec![LoraPart { blocks: vec![fresh(5, sizes)], runs: vec![run(0, 0, n)] }];
            let y = ops::lora(&mut Tape::off(precision), &base, &x, &part((d, d)), 2.0).unwrap();
            assert_eq!(bits(&y), bits(&base));
            for bias in [None, Some(numbers(&[2 * f], 5))] {
                let lora = FfnLora {
                    block: ffn.clone(),
                    bias: bias.clone(),
                    activation: Activation::Silu,
                    gate: part((d, f)),
                    up: part((d, f)),
                    down: part((f, d)),
                    alpha: 2.0,
                };
                let found = ops::gated_ffn_lora(&mut Tape::off(precision), Some(&base), &x, &lora);
                let parts = vec![FfnPart { bias, ..FfnPart::everywhere(ffn.clone(), n) }];
                let plain =
                    ops::gated_ffn(&mut Tape::off(precision), Some(&base), &x, Activation::Silu, parts);
                assert_eq!(bits(&found.unwrap()), bits(&plain.unwrap()), "{n} rows in {precision:?}");
            }
        }
    }
}

fn kv_shape(heads: usize, kv_heads: usize, head_width: usize) -> KvMemoryShape {
    KvMemoryShape { heads, kv_heads, head_width, scale: 1.0 / (head_width as f32).sqrt() }
}

#[test]
fn kv_memory_of_blocks_of_several_sizes() {
    for (heads, kv_heads, k) in [(3, 3, 5), (4, 2, 8), (4, 1, 40)] {
        let shape = kv_shape(heads, kv_heads, k);
        let op = |tape: &mut Tape, x: &[Traced]| {
            let kv = |part: LoraPart| KvPart { blocks: part.blocks, runs: part.runs };
            let parts: Vec<KvPart> = parts(&x[2..]).into_iter().map(kv).collect();
            ops::kv_memory(tape, &x[0], &x[1], &parts, shape)
        };
        let (rows, block) = (vec![3, 25, heads * k], |r: usize| vec![2, r, kv_heads * k]);
        let shapes = vec![rows.clone(), rows, block(5), block(5), block(5), block(3)];
        Case { shapes, n_activations: 2, op: &op }.check("kv memory");
    }
    // More scores than a backward pass holds at a time, and pairs of more than a panel.
    let op = |tape: &mut Tape, x: &[Traced]| {
        let runs = vec![run(0, 0, 200), run(1, 201, 299)];
        let part = KvPart { blocks: x[2..4].to_vec(), runs };
        ops::kv_memory(tape, &x[0], &x[1], &[part], kv_shape(64, 2, 2))
    };
    let shapes = vec![vec![500, 128], vec![500, 128], vec![2, 70, 4], vec![2, 70, 4]];
    Case { shapes, n_activations: 2, op: &op }.check("much kv memory");
}

#[test]
fn kv_memory_whose_values_are_0_changes_no_bit() {
    let (base, q) = (numbers(&[75, 32], 1), numbers(&[75, 32], 2));
    let keys = case::values(7 * 16, 3, 0.9).into_iter().map(|x| x as f32);
    let block: Vec<f32> = keys.chain(vec![0.0; 7 * 16]).collect();
    let block = Traced::constant(Tensor::from_vec(block, (2, 7, 16), &Device::Cpu).unwrap());
    let part = KvPart { blocks: vec![block], runs: vec![run(0, 0, 75)] };
    let y = ops::kv_memory(&mut off(), &base, &q, &[part], kv_shape(4, 2, 8)).unwrap();
    assert_eq!(bits(&y), bits(&base));
}

#[test]
fn kv_memory_refuses_heads_and_blocks_that_do_not_fit() {
    let (q, block) = (numbers(&[4, 6], 1), numbers(&[2, 3, 4], 2));
    let error = |shape, runs: Vec<Run>| {
        let part = KvPart { blocks: vec![block.clone()], runs };
        ops::kv_memory(&mut off(), &q, &q, &[part], shape).unwrap_err().to_string()
    };
    let heads = error(kv_shape(3, 2, 2), vec![run(0, 0, 4)]);
    assert!(heads.contains("heads: 3, kv_heads: 2") && heads.contains("q [4, 6]"), "{heads}");
    let width = error(kv_shape(3, 3, 2), vec![run(0, 0, 4)]);
    assert!(width.contains("kv memory: a block of [2, 3, 4] for"), "{width}");
    let rows = error(KvMemoryShape { kv_heads: 2, ..kv_shape(6, 6, 1) }, vec![run(0, 0, 5)]);
    assert!(rows.contains("a block of [2, 3, 4]"), "{rows}");
}
