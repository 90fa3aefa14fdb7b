//! Gradients of blocks against central finite differences in f64, and who gets a gradient at all.

use std::sync::mpsc::channel;

use anchor::{Anchor, Compute, FetchedMemory, Gradients, Precision};
use candle_core::DType;
use memory_bank::Block;

use crate::fixtures::*;

#[test]
fn block_gradients_are_those_of_finite_differences() {
    let (spec, batch) = (spec([4, 2]), Batch::random(4, 5, 6));
    let paths = [leaf(0), leaf(1), generic(), leaf(0)];
    let blocks = trained_blocks(&spec, &paths);
    let gradients = block_gradients(&anchor(), &batch, &memory(&blocks, &paths, &spec));

    let exact = Anchor::new(config(true), 7, CPU_F64).unwrap();
    let loss = |blocks: &[Block]| -> f64 {
        let memory = FetchedMemory::to_device(blocks, &paths, &spec, CPU_F64).unwrap();
        exact.loss(batch.input(), batch.targets(), &memory).unwrap().0
    };
    for (i, gradient) in gradients.iter().enumerate() {
        // 13 is coprime to the sizes, so the sample meets every matrix of every layer.
        let error = difference_error((&blocks, i), gradient, 13, loss);
        assert!(error < 1e-4, "{}: {error}", gradient.id);
    }
}

fn is_zero(gradient: &candle_core::Tensor) -> bool {
    values(gradient).iter().all(|&x| x == 0.0)
}

#[test]
fn every_parameter_and_every_touched_block_gets_a_gradient() {
    for (tied, dtype) in [(true, CPU), (false, CPU), (true, CPU_F64), (false, CPU_F64)] {
        let anchor = Anchor::new(config(tied), 7, dtype).unwrap();
        let (spec, batch, paths) = (spec([4, 2]), Batch::random(3, 6, 8), [leaf(0), leaf(3), generic()]);
        let memory = FetchedMemory::to_device(&trained_blocks(&spec, &paths), &paths, &spec, dtype).unwrap();
        let (gradients, blocks) = gradients(&anchor, &batch, &memory);
        for (slot, (name, parameter)) in anchor.parameters().iter().enumerate() {
            let gradient = gradients.get(slot).unwrap_or_else(|| panic!("{name} got no gradient"));
            assert_eq!(gradient.dims(), parameter.dims(), "{name}");
            assert!(!is_zero(gradient), "gradient of {name} is 0");
        }
        assert_eq!(blocks.len(), 6);
        let matrix_is_zero = |block: &Block| block.values.chunks(16).any(|row| row.iter().all(|&x| x == 0.0));
        assert!(!blocks.iter().any(matrix_is_zero), "every row of every matrix of a block is used");
    }
}

#[test]
fn at_the_start_only_the_output_of_memory_learns() {
    let (spec, batch, paths) = (spec([4, 2]), Batch::random(1, 6, 9), [leaf(1)]);
    let memory = memory(&fresh_blocks(&spec, &paths), &paths, &spec);
    for block in block_gradients(&anchor(), &batch, &memory) {
        let matrix = spec.width[usize::from(block.id.level)] * spec.d_model;
        for layer in block.values.chunks_exact(3 * matrix) {
            assert!(layer[..2 * matrix].iter().all(|&x| x == 0.0), "M3 = 0 passes nothing back");
            assert!(layer[2 * matrix..].iter().any(|&x| x != 0.0), "M3 learns");
        }
    }
}

#[test]
fn a_frozen_anchor_gets_no_gradient_and_its_blocks_the_same() {
    let (spec, batch, paths) = (spec([4, 2]), Batch::random(2, 6, 10), [leaf(0), generic()]);
    let memory = memory(&trained_blocks(&spec, &paths), &paths, &spec);
    let free = block_gradients(&anchor(), &batch, &memory);
    let frozen = anchor().freeze();
    assert_eq!(bits(&logits(&frozen, &batch, &memory)), bits(&logits(&anchor(), &batch, &memory)));
    let (gradients, blocks) = gradients(&frozen, &batch, &memory);
    for (slot, name) in frozen.parameters().keys().enumerate() {
        assert!(gradients.get(slot).is_none(), "{name} is frozen");
    }
    assert_eq!(blocks, free);
    assert_eq!(frozen.dtype(), DType::F32);
}

#[test]
fn frozen_memory_gets_no_gradient_and_the_anchor_the_same() {
    let (spec, batch, paths) = (spec([4, 2]), Batch::random(2, 6, 11), [leaf(0), generic()]);
    let blocks = trained_blocks(&spec, &paths);
    let (free, _) = gradients(&anchor(), &batch, &memory(&blocks, &paths, &spec));
    let (found, none) = gradients(&anchor(), &batch, &memory(&blocks, &paths, &spec).freeze());
    assert!(none.is_empty());
    for slot in 0..anchor().parameters().len() {
        assert_eq!(values(found.get(slot).unwrap()), values(free.get(slot).unwrap()));
    }
}

#[test]
fn recomputed_activations_give_the_gradients_that_kept_ones_give() {
    let (spec, batch, paths) = (spec([4, 2]), Batch::random(3, 7, 12), [leaf(0), leaf(3), leaf(0)]);
    let memory = memory(&trained_blocks(&spec, &paths), &paths, &spec);
    for precision in [Precision::F32, Precision::Bf16] {
        let both = [false, true].map(|checkpoint| {
            let (anchor, mut gradients) = (anchor(), Gradients::default());
            let work = (batch.input(), batch.targets());
            let compute = Compute { precision, checkpoint };
            let (loss, blocks) = anchor.loss_and_gradients(work, &memory, compute, &mut gradients).unwrap();
            let of_anchor: Vec<Vec<f32>> =
                (0..anchor.parameters().len()).map(|slot| values(gradients.get(slot).unwrap())).collect();
            (loss, blocks, of_anchor)
        });
        assert_eq!(both[0], both[1], "{precision:?}");
    }
}

#[test]
fn products_in_bf16_give_gradients_close_to_those_in_f32() {
    let (spec, batch, paths) = (spec([4, 2]), Batch::random(3, 7, 13), [leaf(0), leaf(3), generic()]);
    let memory = memory(&trained_blocks(&spec, &paths), &paths, &spec);
    let exact = block_gradients(&anchor(), &batch, &memory);
    let compute = Compute { precision: Precision::Bf16, checkpoint: false };
    let work = (batch.input(), batch.targets());
    let (_, blocks) = anchor().loss_and_gradients(work, &memory, compute, &mut Gradients::default()).unwrap();
    for (found, exact) in blocks.iter().zip(&exact) {
        let error = relative_error(&found.values, &exact.values);
        assert!(error > 0.0 && error < 3e-2, "{}: {error}", found.id);
    }
}

#[test]
fn gradients_that_leave_early_are_those_that_stay() {
    let (spec, batch, paths) = (spec([4, 2]), Batch::random(3, 7, 12), [leaf(0), leaf(3), leaf(0)]);
    let memory = memory(&trained_blocks(&spec, &paths), &paths, &spec);
    for (tied, checkpoint) in [(true, false), (true, true), (false, false)] {
        let anchor = Anchor::new(config(tied), 7, CPU).unwrap();
        let (work, compute) =
            ((batch.input(), batch.targets()), Compute { checkpoint, ..Compute::default() });
        let mut staying = Gradients::default();
        let (_, blocks) = anchor.loss_and_gradients(work, &memory, compute, &mut staying).unwrap();
        let (send, left) = channel();
        let mut leaving = Gradients::leaving_to(send);
        let (_, found) = anchor.loss_and_gradients(work, &memory, compute, &mut leaving).unwrap();
        assert_eq!(found, blocks);
        drop(leaving);
        let names: Vec<&String> = anchor.parameters().keys().collect();
        let mut order = vec![];
        for (slot, gradient) in left {
            assert_eq!(values(&gradient), values(staying.get(slot).unwrap()), "{}", names[slot]);
            order.push(names[slot].split('.').take(2).collect::<Vec<_>>().join("."));
        }
        assert_eq!(order.len(), names.len());
        order.dedup();
        let first: &[&str] = if tied { &[] } else { &["output"] };
        let rest = ["final_norm", "layers.1", "layers.0", "token_embedding"];
        assert_eq!(order, [first, &rest].concat());
    }
}
