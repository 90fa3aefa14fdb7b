//! Every kind of memory, in anchors of several forms: nothing at the start, gradients against finite differences, and
//! the decoder against the anchor.

use anchor::{
    Activation, Anchor, AnchorConfig, AttentionBias, AttentionForm, Compute, Decoder, DecoderOptions,
    FetchedMemory, Form, Gradients, KvCache, LayerSizes, LocalLayers, PathMemory, QkNorm,
};
use memory_bank::{Block, BlockDtype, BlockSpec, LoraOn, MemoryKind, MemoryLayers};

use crate::decoder::{decode, path_memories};
use crate::fixtures::*;
use crate::forms::anchor_of;

/// Three layers of the native form, and with shared keys, norms of heads and after, biases and windows; and of
/// different sizes without any norm of queries.
fn configs() -> Vec<AnchorConfig> {
    let native = AnchorConfig { n_layers: 3, n_heads: 4, head_width: 8, ..config(true) };
    let attention = AttentionForm {
        kv_heads: Some(2),
        qk_norm: QkNorm::Head,
        bias: AttentionBias::All,
        factor: Some(0.2),
        cap: Some(20.0),
    };
    let other = Form {
        attention,
        local: Some(LocalLayers { window: 4, layers: vec![0, 2], rope_base: Some(100.0) }),
        activation: Activation::GeluTanh,
        ffn_bias: true,
        post_norms: true,
        embedding_scale: Some(4.0),
        logit_cap: Some(30.0),
        ..Form::default()
    };
    let sizes = |n_heads, kv_heads, ffn_width| LayerSizes { n_heads, kv_heads, ffn_width };
    let uneven = Form {
        attention: AttentionForm { qk_norm: QkNorm::None, ..AttentionForm::default() },
        layers: vec![sizes(2, 1, 16), sizes(4, 2, 24), sizes(4, 4, 20)],
        ..Form::default()
    };
    let with = |form| AnchorConfig { form, ..native.clone() };
    vec![native.clone(), with(other), with(uneven)]
}

/// Memory of each kind for an anchor, in all of its layers and in some.
fn specs(config: &AnchorConfig) -> Vec<BlockSpec> {
    let layers = [MemoryLayers::Uniform, MemoryLayers::Late, MemoryLayers::List(vec![0, 2])];
    let of = |(kind, layers)| config.block_spec(kind, layers, (vec![4, 2], vec![2, 2]));
    let kinds = MemoryKind::ALL.into_iter();
    kinds.flat_map(|kind| layers.clone().map(|layers| (kind, layers))).map(of).collect()
}

fn name(spec: &BlockSpec) -> String {
    format!("{} in {} layers of {:?}", spec.kind, spec.layers, spec.inner)
}

#[test]
fn every_kind_leaves_the_anchor_to_the_bit_before_it_has_learnt() {
    for config in configs() {
        let anchor = anchor_of(config.clone(), CPU);
        let batch = Batch::random(3, 6, 1);
        let paths = [leaf(0), generic(), leaf(3)];
        let plain = logits(&anchor, &batch, &FetchedMemory::none());
        let (_, of_anchor) = losses_and_gradients(&anchor, &batch, &FetchedMemory::none());
        for spec in specs(&config) {
            let fresh = memory(&fresh_blocks(&spec, &paths), &paths, &spec);
            assert_eq!(bits(&logits(&anchor, &batch, &fresh)), bits(&plain), "{}", name(&spec));
            let (_, gradients) = losses_and_gradients(&anchor, &batch, &fresh.freeze());
            for (found, expected) in gradients.iter().zip(&of_anchor) {
                assert_eq!(found, expected, "gradients of the anchor, {}", name(&spec));
            }
            let trained = memory(&trained_blocks(&spec, &paths), &paths, &spec);
            let error = relative_error(&logits(&anchor, &batch, &trained), &plain);
            assert!(error > 1e-3, "{}: trained memory changes the scores by {error}", name(&spec));
        }
    }
}

/// The loss, and the gradient of every parameter of the anchor.
fn losses_and_gradients(anchor: &Anchor, batch: &Batch, memory: &FetchedMemory) -> (f64, Vec<Vec<f32>>) {
    let mut gradients = Gradients::default();
    let work = (batch.input(), batch.targets());
    let (loss, _) = anchor.loss_and_gradients(work, memory, Compute::default(), &mut gradients).unwrap();
    let of = |slot: usize| values(gradients.get(slot).expect("a gradient"));
    (loss, (0..anchor.parameters().len()).map(of).collect())
}

#[test]
fn the_decoder_leaves_the_anchor_to_the_bit_before_memory_has_learnt() {
    for config in configs() {
        let anchor = anchor_of(config.clone(), CPU);
        let decoder = Decoder::new(&anchor, DecoderOptions::default()).unwrap();
        let mut pages = decoder.pages(3 * 32);
        let batch = Batch::random(3, 9, 5);
        let none = PathMemory::default();
        let sequences: Vec<(&[u32], &PathMemory)> =
            batch.tokens.chunks_exact(9).map(|tokens| (tokens, &none)).collect();
        let plain = decode(&decoder, &mut pages, &sequences, |_, _| 2);
        for spec in specs(&config) {
            let paths = [leaf(3), generic(), leaf(2)];
            let memories = packed(&fresh_blocks(&spec, &paths), &paths, &spec);
            let sequences: Vec<(&[u32], &PathMemory)> = batch.tokens.chunks_exact(9).zip(&memories).collect();
            let found = decode(&decoder, &mut pages, &sequences, |_, _| 2);
            assert_eq!(found, plain, "{}", name(&spec));
        }
    }
}

fn packed(blocks: &[Block], paths: &[cluster_tree::ClusterPath], spec: &BlockSpec) -> Vec<PathMemory> {
    let pack = |id| {
        let block = blocks.iter().find(|block| block.id == id).unwrap();
        let values = memory_bank::Encoded::F32(block.values.clone());
        std::sync::Arc::new(anchor::PackedBlock::pack(id, &values, spec).unwrap())
    };
    paths.iter().map(|path| PathMemory::new(path.ids().map(pack).collect())).collect()
}

#[test]
fn gradients_of_every_kind_are_those_of_finite_differences() {
    for config in configs() {
        // Some layers are left out where they are alike.
        let layers =
            if config.form.is_native() { MemoryLayers::List(vec![0, 2]) } else { MemoryLayers::Uniform };
        for spec in specs(&config).into_iter().filter(|spec| spec.layers == layers) {
            let batch = Batch::random(3, 4, 6);
            let paths = [leaf(0), generic(), leaf(0)];
            let blocks = trained_blocks(&spec, &paths);
            let anchor = anchor_of(config.clone(), CPU);
            let gradients = block_gradients(&anchor, &batch, &memory(&blocks, &paths, &spec));
            let ids: Vec<_> = gradients.iter().map(|block| block.id).collect();
            assert_eq!(ids, anchor::unique_ids(&paths, &spec));

            let exact = anchor_of(config.clone(), CPU_F64);
            let loss = |blocks: &[Block]| -> f64 {
                let memory = FetchedMemory::to_device(blocks, &paths, &spec, CPU_F64).unwrap();
                exact.loss(batch.input(), batch.targets(), &memory).unwrap().0
            };
            for (i, gradient) in gradients.iter().enumerate().step_by(2) {
                let step = gradient.values.len().div_ceil(12) | 1;
                let error = difference_error((&blocks, i), gradient, step, loss);
                assert!(error < 1e-3, "{}: {}: {error}", name(&spec), gradient.id);
            }
        }
    }
}

#[test]
fn recomputed_activations_give_every_kind_the_gradients_that_kept_ones_give() {
    let config = configs().swap_remove(1);
    for spec in specs(&config) {
        let (batch, paths) = (Batch::random(3, 7, 12), [leaf(0), leaf(3), leaf(0)]);
        let memory = memory(&trained_blocks(&spec, &paths), &paths, &spec);
        let anchor = anchor_of(config.clone(), CPU);
        let both = [false, true].map(|checkpoint| {
            let work = (batch.input(), batch.targets());
            let compute = Compute { checkpoint, ..Compute::default() };
            anchor.loss_and_gradients(work, &memory, compute, &mut Gradients::default()).unwrap()
        });
        assert_eq!(both[0], both[1], "{}", name(&spec));
    }
}

#[test]
fn decoding_with_a_cache_gives_every_kind_the_hidden_states_of_the_whole() {
    for config in configs() {
        let anchor = anchor_of(config.clone(), CPU);
        for spec in specs(&config) {
            let (batch, paths) = (Batch::random(1, 9, 4), [leaf(3)]);
            let memory = memory(&trained_blocks(&spec, &paths), &paths, &spec);
            let whole = values(&anchor.hidden(batch.input(), &memory, None).unwrap());
            let (mut cache, mut pieces) = (KvCache::default(), vec![]);
            for positions in [0..4, 4..5, 5..9] {
                let piece = batch.slice(0, positions);
                let hidden = anchor.hidden(piece.input(), &memory, Some(&mut cache)).unwrap();
                pieces.extend(values(&hidden));
            }
            let error = relative_error(&pieces, &whole);
            assert!(error < 1e-5, "{}: {error}", name(&spec));
        }
    }
}

#[test]
fn the_decoder_scores_with_every_kind_as_the_anchor_does_however_blocks_are_held() {
    for config in configs() {
        let len = 25;
        let exact = anchor_of(config.clone(), CPU_F64);
        let decoder = Decoder::new(&anchor_of(config.clone(), CPU), DecoderOptions::default()).unwrap();
        let mut pages = decoder.pages(4 * 32);
        let batch = Batch::random(4, len, 5);
        let paths = [leaf(3), generic(), leaf(2), leaf(3)];
        for spec in specs(&config) {
            for dtype in [BlockDtype::F32, BlockDtype::Bf16, BlockDtype::Int8] {
                let (memories, blocks) = path_memories(&spec, &paths, dtype);
                let memory = FetchedMemory::to_device(&blocks, &paths, &spec, CPU_F64).unwrap();
                let expected = logits(&exact, &batch, &memory);
                let sequences: Vec<(&[u32], &PathMemory)> =
                    batch.tokens.chunks_exact(len).zip(&memories).collect();
                let found = decode(&decoder, &mut pages, &sequences, |i, step| 1 + (7 * i + 5 * step) % 12);
                let error = relative_error(&found.concat().concat(), &expected);
                assert!(error < 3e-6, "{}, {dtype}: {error}", name(&spec));
            }
        }
    }
}

#[test]
fn sequences_with_memory_of_several_kinds_have_the_bits_that_they_have_alone() {
    for config in configs() {
        let anchor = anchor_of(config.clone(), CPU);
        let decoder = Decoder::new(&anchor, DecoderOptions { weights: BlockDtype::Bf16 }).unwrap();
        let len = 20;
        let mut memories = vec![PathMemory::default()];
        for spec in specs(&config) {
            memories.extend(path_memories(&spec, &[leaf(3), leaf(2)], BlockDtype::Int8).0);
        }
        let batch = Batch::random(memories.len(), len, 9);
        let mut pages = decoder.pages(memories.len() * 32);
        let sequences: Vec<(&[u32], &PathMemory)> = batch.tokens.chunks_exact(len).zip(&memories).collect();
        let together = decode(&decoder, &mut pages, &sequences, |i, step| 1 + (3 * i + 11 * step) % 7);
        for (i, sequence) in sequences.iter().enumerate() {
            let alone = decode(&decoder, &mut pages, &[*sequence], |_, _| 9);
            assert_eq!(bits(&alone.concat().concat()), bits(&together[i].concat()), "sequence {i}");
        }
    }
}

#[test]
fn memory_for_layers_of_other_widths_is_refused() {
    let config = configs().swap_remove(1);
    let anchor = anchor_of(config.clone(), CPU);
    let other = AnchorConfig { n_heads: 2, ..config };
    let kind = MemoryKind::Lora { on: LoraOn::Vo };
    let spec = other.block_spec(kind, MemoryLayers::Uniform, (vec![4, 2], vec![2, 2]));
    let (batch, paths) = (Batch::random(1, 4, 1), [leaf(0)]);
    let blocks = trained_blocks(&spec, &paths);
    let error = anchor.hidden(batch.input(), &memory(&blocks, &paths, &spec), None).unwrap_err().to_string();
    let expected = "memory for a layer 0 of LayerWidths { query: 16, key_value: 16, head: 8, ffn: 24 }, \
                    the anchor's has LayerWidths { query: 32, key_value: 16, head: 8, ffn: 24 }";
    assert_eq!(error, expected);
    let ffn = other.block_spec(MemoryKind::Ffn, MemoryLayers::Uniform, (vec![4, 2], vec![2, 2]));
    assert!(anchor.hidden(batch.input(), &memory(&trained_blocks(&ffn, &paths), &paths, &ffn), None).is_ok());
}
