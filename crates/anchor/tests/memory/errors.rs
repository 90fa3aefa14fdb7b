//! Every error names what was expected and what was found.

use anchor::{Anchor, AnchorConfig, Error, FetchedMemory, Input, KvCache};
use memory_bank::BlockSpec;

use crate::fixtures::*;

#[test]
fn a_block_that_was_not_fetched() {
    let (spec, paths) = (spec([4, 2]), [leaf(0), leaf(3)]);
    let mut blocks = trained_blocks(&spec, &paths);
    blocks.retain(|block| (block.id.level, block.id.index) != (1, 3));
    let error = FetchedMemory::to_device(&blocks, &paths, &spec, CPU).err().unwrap();
    assert!(matches!(error, Error::BlockNotFetched { sequence: 1, n_blocks: 3, .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("level: 1, index: 3") && text.contains("sequence 1"), "{text}");
}

#[test]
fn a_block_of_another_length() {
    let (spec, paths) = (spec([4, 2]), [leaf(2)]);
    let mut blocks = trained_blocks(&spec, &paths);
    blocks[1].values.pop();
    let error = FetchedMemory::to_device(&blocks, &paths, &spec, CPU).err().unwrap().to_string();
    // 3 matrices · 2 layers · width 2 · 16
    assert!(error.contains("expected 192 values, found 191"), "{error}");
}

#[test]
fn memory_of_another_anchor() {
    let paths = [leaf(0)];
    let batch = Batch::random(1, 4, 1);
    for other in [BlockSpec { d_model: 8, ..spec([4, 2]) }, BlockSpec { n_layers: 3, ..spec([4, 2]) }] {
        let memory = memory(&trained_blocks(&other, &paths), &paths, &other);
        let error = anchor().hidden(batch.input(), &memory, None).unwrap_err().to_string();
        let found = format!("memory of {} layers and d_model {}", other.n_layers, other.d_model);
        assert_eq!(error, format!("{found} for an anchor of 2 and 16"));
    }
}

#[test]
fn memory_of_another_batch() {
    let (spec, paths) = (spec([4, 2]), [leaf(0), leaf(1), leaf(0)]);
    let memory = memory(&trained_blocks(&spec, &paths), &paths, &spec);
    let error = anchor().hidden(Batch::random(2, 4, 1).input(), &memory, None).unwrap_err().to_string();
    assert_eq!(error, "batch of 2 x 4 tokens: memory paths has 3 entries");
}

fn input_error(change: impl FnOnce(&mut Batch)) -> String {
    let mut batch = Batch::random(2, 4, 1);
    change(&mut batch);
    let input = Input { batch: 2, len: 4, ..batch.input() };
    anchor().loss(input, batch.targets(), &FetchedMemory::none()).unwrap_err().to_string()
}

#[test]
fn batches_whose_parts_disagree() {
    assert_eq!(input_error(|b| b.tokens.truncate(7)), "batch of 2 x 4 tokens: tokens has 7 entries");
    assert_eq!(input_error(|b| b.starts.push(0)), "batch of 2 x 4 tokens: document starts has 9 entries");
    let targets = input_error(|b| b.targets.truncate(6));
    assert!(targets.contains("6 targets for 8 rows"), "{targets}");
    let start = input_error(|b| b.starts[5] = 2);
    assert!(start.contains("query 1 of sequence 1 starts at key 2"), "{start}");
}

#[test]
fn tokens_and_positions_out_of_range() {
    let token = input_error(|b| b.tokens[3] = 23);
    assert!(token.contains("token 23 of a vocabulary of 23"), "{token}");
    let target = input_error(|b| b.targets[3] = 40);
    assert!(target.contains("target 40 of a vocabulary of 23"), "{target}");

    let (anchor, mut cache) = (anchor(), KvCache::default());
    let first = Batch::random(1, 30, 1);
    anchor.hidden(first.input(), &FetchedMemory::none(), Some(&mut cache)).unwrap();
    assert_eq!((cache.len(), cache.is_empty()), (30, false));
    let next = Batch::random(1, 3, 1);
    let error =
        anchor.hidden(next.input(), &FetchedMemory::none(), Some(&mut cache)).unwrap_err().to_string();
    assert!(error.contains("position 32 asked for, the table holds 32"), "{error}");
}

#[test]
fn a_configuration_of_no_anchor() {
    let error = Anchor::new(AnchorConfig { n_heads: 0, ..config(true) }, 1, CPU).err().unwrap().to_string();
    assert!(error.starts_with("anchor.n_heads: 0"), "{error}");
}
