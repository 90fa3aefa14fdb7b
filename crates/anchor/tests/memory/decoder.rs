//! The decoder of packed weights against the anchor in f64, and against itself in other company.

use std::sync::Arc;

use anchor::{
    Anchor, AnchorConfig, Decoder, DecoderOptions, FetchedMemory, KvPages, PackedBlock, PathMemory, Scores,
    Segment, SequenceCache,
};
use cluster_tree::ClusterPath;
use memory_bank::{Block, BlockDtype, BlockSpec, Encoded};

use crate::fixtures::*;

/// Longer than three pages, and heads that are not whole panels.
fn wide(head_width: usize) -> AnchorConfig {
    AnchorConfig { head_width, max_seq_len: 150, ..config(head_width.is_multiple_of(4)) }
}

/// A block as a cache holds it, and the numbers that it then has.
fn encoded(block: &Block, dtype: BlockDtype, spec: &BlockSpec) -> (PackedBlock, Block) {
    let encoded = Encoded::encode(dtype, spec.d_model, block).unwrap();
    let packed = PackedBlock::pack(block.id, &encoded, spec).unwrap();
    (packed, Block { id: block.id, values: encoded.decode() })
}

/// The memory of each path, with blocks shared, and the decoded blocks.
pub(crate) fn path_memories(
    spec: &BlockSpec,
    paths: &[ClusterPath],
    dtype: BlockDtype,
) -> (Vec<PathMemory>, Vec<Block>) {
    let blocks = trained_blocks(spec, paths);
    let (packed, decoded): (Vec<_>, Vec<_>) = blocks.iter().map(|block| encoded(block, dtype, spec)).unzip();
    let packed: Vec<Arc<PackedBlock>> = packed.into_iter().map(Arc::new).collect();
    let of = |path: &ClusterPath| {
        let with_memory = path.ids().filter(|id| spec.width[usize::from(id.level)] > 0);
        let block = |id| Arc::clone(packed.iter().find(|block| block.id() == id).unwrap());
        PathMemory::new(with_memory.map(block).collect())
    };
    (paths.iter().map(of).collect(), decoded)
}

/// One sequence that is decoded.
struct Running<'a> {
    tokens: &'a [u32],
    memory: &'a PathMemory,
    cache: SequenceCache,
    scores: Vec<Vec<f32>>,
}

/// Steps through all sequences, of which `share(i, step)` tokens of sequence i go into each step, and returns the
/// scores of every token.
pub(crate) fn decode(
    decoder: &Decoder,
    pages: &mut KvPages,
    sequences: &[(&[u32], &PathMemory)],
    share: impl Fn(usize, usize) -> usize,
) -> Vec<Vec<Vec<f32>>> {
    let mut running: Vec<Running> = sequences
        .iter()
        .map(|&(tokens, memory)| {
            let cache = pages.reserve(tokens.len()).unwrap();
            Running { tokens, memory, cache, scores: vec![] }
        })
        .collect();
    for step in 0.. {
        if running.iter().all(|one| one.cache.len() == one.tokens.len()) {
            break;
        }
        let mut segments = vec![];
        let mut taken = vec![];
        for (i, one) in running.iter_mut().enumerate() {
            let begin = one.cache.len();
            let end = one.tokens.len().min(begin + share(i, step));
            if begin < end {
                let (tokens, memory) = (&one.tokens[begin..end], one.memory);
                segments.push(Segment { tokens, cache: &mut one.cache, memory, scores: Scores::All });
                taken.push((i, end - begin));
            }
        }
        let logits = decoder.step(pages, &mut segments).unwrap();
        let mut row = 0;
        for (i, n) in taken {
            running[i].scores.extend((row..row + n).map(|row| logits.row(row).to_vec()));
            row += n;
        }
        assert_eq!(logits.n_rows(), row);
    }
    running
        .into_iter()
        .map(|one| {
            pages.release(one.cache);
            one.scores
        })
        .collect()
}

#[test]
fn scores_are_those_of_the_anchor_in_f64_however_blocks_are_held() {
    for head_width in [6, 40, 64] {
        let (config, spec, len) = (wide(head_width), spec([4, 2]), 107);
        let exact = Anchor::new(config.clone(), 7, CPU_F64).unwrap();
        let anchor = Anchor::new(config, 7, CPU).unwrap();
        let decoder = Decoder::new(&anchor, DecoderOptions::default()).unwrap();
        let mut pages = decoder.pages(3 * 128);
        let batch = Batch::random(3, len, 5);
        let paths = [leaf(3), generic(), leaf(2)];
        for dtype in [BlockDtype::F32, BlockDtype::Bf16, BlockDtype::Int8] {
            let (memories, blocks) = path_memories(&spec, &paths, dtype);
            let memory = FetchedMemory::to_device(&blocks, &paths, &spec, CPU_F64).unwrap();
            let expected = logits(&exact, &batch, &memory);
            let sequences: Vec<(&[u32], &PathMemory)> =
                batch.tokens.chunks_exact(len).zip(&memories).collect();
            let found = decode(&decoder, &mut pages, &sequences, |i, step| 1 + (7 * i + 5 * step) % 40);
            let error = relative_error(&found.concat().concat(), &expected);
            assert!(error < 2e-6, "heads of {head_width}, {dtype}: {error}");
        }
        assert_eq!(pages.n_free(), pages.n_pages());
    }
}

#[test]
fn a_sequence_has_the_same_bits_alone_in_company_and_however_it_is_cut() {
    let (anchor, spec) = (Anchor::new(wide(40), 7, CPU).unwrap(), spec([4, 2]));
    let decoder = Decoder::new(&anchor, DecoderOptions { weights: BlockDtype::Bf16 }).unwrap();
    let len = 140;
    let batch = Batch::random(6, len, 9);
    // Shared blocks that stand apart, two with one leaf, one without memory.
    let paths = [leaf(3), leaf(0), leaf(3), generic(), leaf(2)];
    let (mut memories, _) = path_memories(&spec, &paths, BlockDtype::Int8);
    memories.insert(1, PathMemory::default());
    let mut pages = decoder.pages(6 * 160);
    let sequences: Vec<(&[u32], &PathMemory)> = batch.tokens.chunks_exact(len).zip(&memories).collect();
    let together = decode(&decoder, &mut pages, &sequences, |_, _| 1);
    // Pages that others have used before; whole prompts; pieces that change; one that begins when others are done.
    let shares: [fn(usize, usize) -> usize; 3] = [
        |_, _| 200,
        |i, step| 1 + (3 * i + 11 * step) % 70,
        |i, step| if i == 4 && step < 3 { 0 } else { 64 },
    ];
    for (n, share) in shares.into_iter().enumerate() {
        let again = decode(&decoder, &mut pages, &sequences, share);
        for (i, (again, once)) in again.iter().zip(&together).enumerate() {
            assert_eq!(bits(&again.concat()), bits(&once.concat()), "sequence {i}, cut {n}");
        }
    }
    for (i, sequence) in sequences.iter().enumerate() {
        let alone = decode(&decoder, &mut pages, &[*sequence], |_, _| 50);
        assert_eq!(bits(&alone.concat().concat()), bits(&together[i].concat()), "sequence {i} alone");
    }
}

#[test]
fn what_a_step_cannot_do_is_told_and_appends_nothing() {
    let anchor = anchor();
    let decoder = Decoder::new(&anchor, DecoderOptions::default()).unwrap();
    let mut pages = decoder.pages(64);
    assert_eq!((pages.n_pages(), pages.n_free()), (2, 2));
    let mut cache = pages.reserve(33).unwrap();
    assert!(pages.reserve(1).is_none(), "both pages are taken");
    let none = PathMemory::default();
    let other = BlockSpec { n_layers: 3, ..spec([4, 2]) };
    let (of_others, _) = path_memories(&other, &[leaf(0)], BlockDtype::F32);
    let mut message = |tokens: &[u32], memory: &PathMemory| {
        let mut segment = [Segment { tokens, cache: &mut cache, memory, scores: Scores::Last }];
        decoder.step(&mut pages, &mut segment).map(|_| ()).unwrap_err().to_string()
    };
    let found = [
        message(&[], &none),
        message(&[1; 33], &none),
        message(&[0, VOCAB as u32], &none),
        message(&[1], &of_others[0]),
    ];
    let expected = [
        "segment 0 of a step: expected at least one token, found none",
        "segment 0 of a step: expected positions of the anchor and room for them, found 33, of 32 and 64",
        "segment 0 of a step: expected tokens of the vocabulary, found 23 of 23",
        "memory of 3 layers and d_model 16 for an anchor of 2 and 16",
    ];
    assert_eq!(found, expected);
    assert!(cache.is_empty());
    let int8 = Decoder::new(&anchor, DecoderOptions { weights: BlockDtype::Int8 });
    assert_eq!(
        int8.map(|_| ()).unwrap_err().to_string(),
        "decoder: expected weights held as f32 or bf16, found int8"
    );
}
