//! LoRA and KV memory of a decoder that generates, against what the tape computes, and row by row to the bit.

use candle_core::{Device, Tensor};
use ops::decode::{Held, KvRun, KvWeights, LoraRun, LoraWeights, Place, add_kv_memory, add_lora};
use ops::{KvMemoryShape, KvPart, LoraPart, Precision, Run, Tape, Traced};

use crate::case;

fn numbers(n: usize, seed: usize) -> Vec<f32> {
    case::values(n, seed, 0.9).into_iter().map(|x| x as f32).collect()
}

/// As f64, for the reference.
fn reference(values: &[f32], shape: &[usize]) -> Traced {
    let values: Vec<f64> = values.iter().map(|&x| f64::from(x)).collect();
    Traced::constant(Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
}

fn values_of(y: &Traced) -> Vec<f64> {
    y.value().flatten_all().unwrap().to_vec1().unwrap()
}

fn close(found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((f64::from(*found) - expected).abs() < tolerance, "element {i}: {found}, {expected}");
    }
}

fn bf16(x: f32) -> u16 {
    half::bf16::from_f32(x).to_bits()
}

fn widened(values: &[u16]) -> Vec<f32> {
    values.iter().map(|&x| half::bf16::from_bits(x).to_f32()).collect()
}

/// Integers in rows with a scale each, and the numbers that they are.
fn int8(values: &[f32], row: usize) -> (Vec<i8>, Vec<f32>, Vec<f32>) {
    let scales: Vec<f32> = (0..values.len() / row).map(|i| 0.004 + 0.001 * (i % 5) as f32).collect();
    let integers: Vec<i8> = values.iter().map(|x| (x * 127.0) as i8).collect();
    let exact = integers.iter().enumerate().map(|(i, &x)| f32::from(x) * scales[i / row]).collect();
    (integers, scales, exact)
}

#[test]
fn lora_adds_what_the_tape_adds() {
    let (n, i, o, place) = (7, 70, 45, Place { column: 3, row: 60 });
    let (x, base) = (numbers(n * i, 1), numbers(n * place.row, 2));
    let blocks = [numbers(5 * (i + o), 3), numbers(5 * (i + o), 4)];
    let bits = blocks.clone().map(|block| block.into_iter().map(bf16).collect::<Vec<u16>>());
    let held = [
        (blocks.clone(), blocks.clone().map(|block| LoraWeights::new(&block, (i, o), Held::F32))),
        (bits.clone().map(|b| widened(&b)), bits.map(|b| LoraWeights::of_bf16(&b, (i, o)))),
    ];
    for (exact, weights) in held {
        let part = LoraPart {
            blocks: exact.iter().map(|block| reference(block, &[block.len()])).collect(),
            runs: vec![Run { block: 0, first_row: 0, n_rows: 2 }, Run { block: 1, first_row: 3, n_rows: 4 }],
        };
        let zeros = reference(&vec![0.0; n * o], &[n, o]);
        let tape = &mut Tape::off(Precision::F32);
        let added = ops::lora(tape, &zeros, &reference(&x, &[n, i]), &[part], 2.0).unwrap();
        let mut expected: Vec<f64> = base.iter().map(|&x| f64::from(x)).collect();
        for (to, added) in expected.chunks_exact_mut(place.row).zip(values_of(&added).chunks_exact(o)) {
            to[place.column..].iter_mut().zip(added).for_each(|(to, added)| *to += added);
        }
        let run = |block: usize, rows| LoraRun { weights: &weights[block], rows };
        let mut found = base.clone();
        add_lora(&x, (&mut found, place), 2.0, &[run(0, 0..2), run(1, 3..7)]);
        close(&found, &expected, 2e-5);
        let mut alone = base.clone();
        for (block, row) in [(0, 0), (0, 1), (1, 3), (1, 4), (1, 5), (1, 6)] {
            add_lora(&x, (&mut alone, place), 2.0, &[run(block, row..row + 1)]);
        }
        assert_eq!(alone, found, "rows alone and among others");
    }
}

#[test]
fn kv_memory_adds_what_the_tape_adds() {
    for (heads, kv_heads, k) in [(2, 2, 8), (6, 2, 40)] {
        let shape = KvMemoryShape { heads, kv_heads, head_width: k, scale: 0.3 };
        let (n, d, width) = (43, heads * k, kv_heads * k);
        let (q, base) = (numbers(n * d, 1), numbers(n * d, 2));
        let blocks = [numbers(2 * 40 * width, 3), numbers(2 * 5 * width, 4), numbers(2 * 5 * width, 5)];
        let bits = blocks.clone().map(|block| block.into_iter().map(bf16).collect::<Vec<u16>>());
        let mut held = vec![
            (blocks.clone(), blocks.clone().map(|block| KvWeights::new(&block, (width, k), Held::F32))),
            (bits.clone().map(|b| widened(&b)), bits.map(|b| KvWeights::of_bf16(&b, (width, k)))),
        ];
        for row in [k, width] {
            let quantised = blocks.clone().map(|block| int8(&block, row));
            let exact = quantised.clone().map(|(_, _, exact)| exact);
            let of = |(integers, scales, _): (Vec<i8>, Vec<f32>, _)| {
                KvWeights::of_int8(&integers, (&scales, row), (width, k))
            };
            held.push((exact, quantised.map(of)));
        }
        for (exact, weights) in held {
            let block = |i: usize| reference(&exact[i], &[2, exact[i].len() / 2 / width, width]);
            let run = |block, first_row, n_rows| Run { block, first_row, n_rows };
            let parts = [
                KvPart { blocks: vec![block(0)], runs: vec![run(0, 0, 36)] },
                KvPart { blocks: vec![block(1), block(2)], runs: vec![run(0, 0, 35), run(1, 38, 5)] },
            ];
            let (base_64, q_64) = (reference(&base, &[n, d]), reference(&q, &[n, d]));
            let tape = &mut Tape::off(Precision::F32);
            let expected = values_of(&ops::kv_memory(tape, &base_64, &q_64, &parts, shape).unwrap());
            let run = |blocks: &[usize], rows| KvRun {
                weights: blocks.iter().map(|&block| &weights[block]).collect(),
                rows,
            };
            let mut found = base.clone();
            add_kv_memory(
                &q,
                &mut found,
                shape,
                &[run(&[0, 1], 0..35), run(&[0], 35..36), run(&[2], 38..43)],
            );
            close(&found, &expected, 2e-5);
            let mut alone = base.clone();
            (0..35).for_each(|row| add_kv_memory(&q, &mut alone, shape, &[run(&[0, 1], row..row + 1)]));
            add_kv_memory(&q, &mut alone, shape, &[run(&[0], 35..36)]);
            (38..43).for_each(|row| add_kv_memory(&q, &mut alone, shape, &[run(&[2], row..row + 1)]));
            assert_eq!(alone, found, "rows alone and among others");
        }
    }
}
