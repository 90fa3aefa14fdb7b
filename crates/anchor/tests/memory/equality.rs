//! What must be equal: to the bit where the same work is done, to rounding where it is done otherwise.

use anchor::{Anchor, FetchedMemory};

use crate::fixtures::*;

#[test]
fn a_fresh_bank_leaves_the_anchor_to_the_bit() {
    let (anchor, spec, batch) = (anchor(), spec([4, 2]), Batch::random(3, 6, 1));
    let plain = logits(&anchor, &batch, &FetchedMemory::none());
    let assignments = [
        vec![leaf(0), leaf(1), leaf(3)],
        vec![generic(), generic(), generic()],
        vec![leaf(2), generic(), leaf(2)],
    ];
    for paths in assignments {
        let blocks = fresh_blocks(&spec, &paths);
        assert!(blocks.iter().all(|block| block.values.iter().any(|&x| x != 0.0)), "M1 and M2 are random");
        let with_memory = logits(&anchor, &batch, &memory(&blocks, &paths, &spec));
        assert_eq!(bits(&with_memory), bits(&plain), "{paths:?}");
        let trained = logits(&anchor, &batch, &memory(&trained_blocks(&spec, &paths), &paths, &spec));
        assert!(relative_error(&trained, &plain) > 1e-2, "memory with M3 other than 0 changes the scores");
    }
}

#[test]
fn no_width_is_the_anchor_to_the_bit() {
    let (anchor, spec, batch) = (anchor(), spec([0, 0]), Batch::random(2, 5, 2));
    let paths = [leaf(0), generic()];
    assert_eq!(anchor::unique_ids(&paths, &spec), []);
    let plain = logits(&anchor, &batch, &FetchedMemory::none());
    assert_eq!(bits(&logits(&anchor, &batch, &memory(&[], &paths, &spec))), bits(&plain));
    assert!(block_gradients(&anchor, &batch, &memory(&[], &paths, &spec)).is_empty());
}

#[test]
fn a_level_without_width_has_no_blocks() {
    let (spec, paths) = (spec([0, 2]), [leaf(3), leaf(1), leaf(3), generic()]);
    let ids = anchor::unique_ids(&paths, &spec);
    let shown: Vec<String> = ids.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["level1/1", "level1/3", "level1/generic"]);
}

#[test]
fn sequences_that_share_blocks_have_the_losses_and_gradients_they_have_alone() {
    let (anchor, spec, batch) = (anchor(), spec([4, 2]), Batch::random(5, 6, 3));
    // The first and the fourth share all blocks without standing together; the second shares one level.
    let paths = [leaf(0), leaf(1), generic(), leaf(0), leaf(3)];
    let blocks = trained_blocks(&spec, &paths);
    let together = memory(&blocks, &paths, &spec);
    let losses_together = losses(&anchor, &batch, &together);
    let gradients = block_gradients(&anchor, &batch, &together);
    let ids = |blocks: &[memory_bank::Block]| blocks.iter().map(|block| block.id).collect::<Vec<_>>();
    assert_eq!(ids(&gradients), anchor::unique_ids(&paths, &spec), "each block once");

    let mut sums: Vec<Vec<f32>> = gradients.iter().map(|block| vec![0.0; block.values.len()]).collect();
    for (i, path) in paths.iter().enumerate() {
        let (alone, own) = (batch.sequence(i), memory(&blocks, std::slice::from_ref(path), &spec));
        let error = relative_error(&losses_together[i * 6..][..6], &losses(&anchor, &alone, &own));
        assert!(error < 1e-6, "sequence {i}: {error}");
        for block in block_gradients(&anchor, &alone, &own) {
            let place = gradients.iter().position(|other| other.id == block.id).unwrap();
            sums[place].iter_mut().zip(block.values).for_each(|(sum, x)| *sum += x);
        }
    }
    for (block, sum) in gradients.iter().zip(&sums) {
        let error = relative_error(&block.values, sum);
        assert!(error < 1e-5, "{}: {error}", block.id);
    }
}

#[test]
fn fused_f32_agrees_with_composed_f64() {
    for tied in [true, false] {
        let fused = Anchor::new(config(tied), 7, CPU).unwrap();
        let reference = Anchor::new(config(tied), 7, CPU_F64).unwrap();
        let (spec, batch, paths) = (spec([4, 2]), Batch::random(3, 8, 4), [leaf(0), leaf(3), generic()]);
        let blocks = trained_blocks(&spec, &paths);
        let exact = FetchedMemory::to_device(&blocks, &paths, &spec, CPU_F64).unwrap();
        let found = logits(&fused, &batch, &memory(&blocks, &paths, &spec));
        let expected = logits(&reference, &batch, &exact);
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4 && expected.iter().any(|x| x.abs() > 0.5), "tied {tied}: {worst}");
    }
}

#[test]
fn documents_of_a_sequence_do_not_see_each_other() {
    let (anchor, spec, paths) = (anchor(), spec([4, 2]), [leaf(2)]);
    let memory = memory(&trained_blocks(&spec, &paths), &paths, &spec);
    let mut packed = Batch::random(1, 9, 5);
    packed.starts[4..].fill(4);
    let found = losses(&anchor, &packed, &memory);
    let alone = [0..4, 4..9].map(|positions| losses(&anchor, &packed.slice(0, positions), &memory)).concat();
    assert!(relative_error(&found, &alone) < 1e-5, "{found:?} {alone:?}");
    packed.starts.fill(0);
    let unmasked = losses(&anchor, &packed, &memory);
    assert!(relative_error(&unmasked[4..], &alone[4..]) > 1e-3, "without the mask they would");
}
