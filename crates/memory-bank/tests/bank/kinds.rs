//! Kinds of memory other than that in every FFN: sizes, layers, initial weights and files.

use memory_bank::{
    Block, BlockDtype, BlockSpec, BlockStore, Encoded, LayerWidths, LocalBank, LoraMatrix, LoraOn,
    MemoryKind, MemoryLayers, MemoryPart, Precision, Step, export, init_block, inspect,
};
use safetensors::SafeTensors;

use crate::support::{id, options, run, spec};

const QK: MemoryKind = MemoryKind::Lora { on: LoraOn::Qk };
const VO: MemoryKind = MemoryKind::Lora { on: LoraOn::Vo };
const LORA_FFN: MemoryKind = MemoryKind::Lora { on: LoraOn::Ffn };

/// The 160M anchor of arXiv 2510.02375: 35 layers, d 512, 12 heads of 32, an FFN of 2,048.
fn paper(kind: MemoryKind) -> BlockSpec {
    let inner = match kind {
        MemoryKind::Ffn => vec![],
        _ => vec![LayerWidths { query: 384, key_value: 384, head: 32, ffn: 2048 }],
    };
    BlockSpec { kind, inner, ..BlockSpec::ffn(35, 512, vec![256, 64, 16, 0], vec![16; 4]) }
}

/// An anchor of 4 layers with half as many heads of keys, its layers of two widths.
fn uneven(kind: MemoryKind) -> BlockSpec {
    let narrow = LayerWidths { query: 12, key_value: 6, head: 6, ffn: 20 };
    let wide = LayerWidths { query: 24, key_value: 12, head: 6, ffn: 40 };
    let inner = vec![narrow, narrow, wide, wide];
    BlockSpec { kind, inner, ..BlockSpec::ffn(4, 10, vec![2, 3], vec![2, 2]) }
}

#[test]
fn units_are_those_of_the_paper() {
    let (l, d, a, f) = (35, 512, 384, 2048);
    for (kind, unit) in [
        (MemoryKind::Ffn, 3 * l * d),
        (QK, 2 * l * (d + a)),
        (VO, 2 * l * (d + a)),
        (LORA_FFN, 3 * l * (d + f)),
        (MemoryKind::Kv, 2 * l * a),
    ] {
        let spec = paper(kind);
        spec.validate().unwrap();
        assert_eq!(spec.unit(), unit, "{kind}");
        assert_eq!(spec.fetch_len(), unit * (256 + 64 + 16), "{kind}");
        assert_eq!(spec.bank_len(), unit * (16 * 256 + 256 * 64 + 4096 * 16), "{kind}");
    }
}

#[test]
fn fewer_heads_of_keys_make_smaller_memory_and_layers_may_differ() {
    let unit = |kind| uneven(kind).unit();
    assert_eq!(unit(QK), 2 * ((10 + 12) + (10 + 6)) + 2 * ((10 + 24) + (10 + 12)));
    assert_eq!(unit(VO), 2 * ((10 + 6) + (12 + 10)) + 2 * ((10 + 12) + (24 + 10)));
    assert_eq!(unit(LORA_FFN), 2 * 3 * (10 + 20) + 2 * 3 * (10 + 40));
    assert_eq!(unit(MemoryKind::Kv), 2 * 2 * 6 + 2 * 2 * 12);
}

#[test]
fn the_layers_with_memory_are_all_a_third_or_a_list() {
    let layers = |layers: MemoryLayers, n| -> Vec<usize> {
        let spec = BlockSpec { layers, ..BlockSpec::ffn(n, 2, vec![1], vec![2]) };
        spec.validate().unwrap();
        assert_eq!(spec.unit(), 3 * 2 * spec.n_memory_layers() as u64);
        spec.memory_layers().collect()
    };
    assert_eq!(layers(MemoryLayers::Uniform, 3), [0, 1, 2]);
    assert_eq!(layers(MemoryLayers::Early, 35), (0..12).collect::<Vec<_>>());
    assert_eq!(layers(MemoryLayers::Middle, 35), (11..23).collect::<Vec<_>>());
    assert_eq!(layers(MemoryLayers::Late, 35), (23..35).collect::<Vec<_>>());
    assert_eq!(layers(MemoryLayers::Late, 24), (16..24).collect::<Vec<_>>());
    assert_eq!([MemoryLayers::Early, MemoryLayers::Late].map(|third| layers(third, 2)), [[0], [1]]);
    assert_eq!(layers(MemoryLayers::Middle, 1), [0]);
    assert_eq!(layers(MemoryLayers::List(vec![0, 3]), 4), [0, 3]);
    for (list, found) in [(vec![], "[]"), (vec![1, 1], "[1, 1]"), (vec![2, 0], "[2, 0]"), (vec![4], "[4]")] {
        let spec = BlockSpec { layers: MemoryLayers::List(list), ..uneven(MemoryKind::Kv) };
        let error = spec.validate().unwrap_err().to_string();
        assert_eq!(error, format!("layers is {found}, expected at least one layer, ascending, below 4"));
    }
}

#[test]
fn widths_within_layers_are_those_that_the_kind_needs() {
    let error = |spec: BlockSpec| spec.validate().unwrap_err().to_string();
    let widths = LayerWidths { query: 12, key_value: 6, head: 6, ffn: 20 };
    let with = |inner| BlockSpec { inner, ..uneven(QK) };
    assert_eq!(error(with(vec![])), "inner is of 0 layers, expected 1 or 4 with kind lora_qk");
    assert_eq!(error(with(vec![widths; 3])), "inner is of 3 layers, expected 1 or 4 with kind lora_qk");
    let ffn = BlockSpec { kind: MemoryKind::Ffn, ..uneven(QK) };
    assert_eq!(error(ffn), "inner is of 4 layers, expected none with kind ffn");
    let narrow = error(with(vec![LayerWidths { ffn: 0, ..widths }]));
    let expected = "expected widths of at least 1, those of queries and keys of whole heads";
    assert!(narrow.ends_with(&format!("ffn: 0 }}, {expected}")), "{narrow}");
    for wrong in [LayerWidths { key_value: 5, ..widths }, LayerWidths { key_value: 24, ..widths }] {
        assert!(error(with(vec![wrong])).ends_with(expected), "{wrong:?}");
    }
    let huge = LayerWidths { query: usize::MAX, key_value: usize::MAX, head: usize::MAX, ..widths };
    assert!(error(with(vec![huge])).contains("2^60 parameters"));
    let many = BlockSpec { n_layers: usize::MAX, ..with(vec![widths]) };
    assert!(error(many).contains("2^60 parameters"));
}

#[test]
fn parts_lie_one_after_another() {
    for kind in MemoryKind::ALL {
        let spec = if kind == MemoryKind::Ffn { paper(kind) } else { uneven(kind) };
        let spec = BlockSpec { layers: MemoryLayers::Late, ..spec };
        for level in 0..2 {
            let parts = spec.parts(level);
            assert_eq!(parts.len(), spec.n_memory_layers() * kind.parts().len());
            let mut end = 0;
            for part in &parts {
                assert_eq!(part.range.start, end, "{kind}");
                end = part.range.end;
            }
            assert_eq!(end, spec.block_len(level), "{kind}");
            assert_eq!(spec.block_shape(level).iter().product::<usize>(), end, "{kind}");
            assert!(end.is_multiple_of(spec.row_len()), "{kind}: rows of {}", spec.row_len());
        }
    }
    let parts = uneven(VO).parts(1);
    assert_eq!((parts[4].layer, parts[4].part), (2, MemoryPart::Lora(LoraMatrix::Value)));
    assert_eq!((parts[5].layer, parts[5].range.len()), (2, 3 * (24 + 10)));
    assert_eq!(paper(MemoryKind::Kv).block_shape(1), [35, 2, 64, 384]);
    assert_eq!(paper(QK).block_shape(1), [35, 64 * 2 * (512 + 384)]);
    assert_eq!(uneven(MemoryKind::Kv).block_shape(0), [144]);
    let rows = [paper(QK).row_len(), paper(LORA_FFN).row_len(), paper(MemoryKind::Kv).row_len()];
    assert_eq!(rows, [128, 512, 384]);
}

#[test]
fn what_ffn_memory_in_every_layer_is_written_as_has_not_changed() {
    let text = r#"{"kind":"ffn","n_layers":2,"d_model":5,"width":[3,0,2],"branching":[2,3,2]}"#;
    assert_eq!(serde_json::to_string(&spec()).unwrap(), text);
    assert_eq!(serde_json::from_str::<BlockSpec>(text).unwrap(), spec());
    assert_eq!(spec().hash(), "9ffd534c81802290021f1b69ad3d372728008a7252fd8d5a5922eb0a0e708376");
    let listed = BlockSpec { layers: MemoryLayers::List(vec![0, 1]), ..spec() };
    assert_eq!(listed.hash(), spec().hash(), "these are all layers");
}

#[test]
fn other_kinds_and_layers_are_written_and_hashed() {
    let spec = BlockSpec { layers: MemoryLayers::Late, ..uneven(QK) };
    let text = serde_json::to_string(&spec).unwrap();
    assert!(text.starts_with(r#"{"kind":"lora_qk","n_layers":4,"d_model":10,"#), "{text}");
    assert!(
        text.contains(r#""layers":"late","inner":[{"query":12,"key_value":6,"head":6,"ffn":20},"#),
        "{text}"
    );
    assert_eq!(serde_json::from_str::<BlockSpec>(&text).unwrap(), spec);
    let listed = BlockSpec { layers: MemoryLayers::List(vec![2, 3]), ..spec.clone() };
    assert!(serde_json::to_string(&listed).unwrap().contains(r#""layers":[2,3]"#));
    assert_eq!(listed.hash(), spec.hash());
    let others = [
        uneven(QK),
        uneven(VO),
        BlockSpec { layers: MemoryLayers::Early, ..uneven(QK) },
        BlockSpec { inner: vec![spec.inner_of(0)], ..spec.clone() },
    ];
    others.iter().for_each(|other| assert_ne!(other.hash(), spec.hash(), "{other:?}"));
    let error = |text: &str| serde_json::from_str::<BlockSpec>(text).unwrap_err().to_string();
    let wrong = error(&text.replace("lora_qk", "lora"));
    assert!(wrong.contains("kind is lora, expected one of ffn, lora_qk, lora_vo, lora_ffn, kv"), "{wrong}");
    let wrong = error(&text.replace("late", "deep"));
    assert!(wrong.contains("layers is deep, expected uniform, early, middle, late or a list"), "{wrong}");
}

#[test]
fn every_kind_begins_by_adding_nothing() {
    for kind in [QK, VO, LORA_FFN, MemoryKind::Kv] {
        let spec = uneven(kind);
        for (level, id) in [(0, id(0, 1)), (1, id(1, 3))] {
            let block = init_block(&spec, 7, id);
            assert_eq!(block, init_block(&spec, 7, id));
            assert_ne!(block, init_block(&spec, 8, id));
            for part in spec.parts(level) {
                let values = &block[part.range.clone()];
                let widths = spec.inner_of(part.layer);
                let (n_started, bound) = match part.part {
                    MemoryPart::Lora(matrix) => {
                        let (from, _) = matrix.widths(10, widths);
                        (spec.width[level] * from, 1.0 / (from as f32).sqrt())
                    }
                    _ => (values.len() / 2, 3.0 / (widths.key_value as f32).sqrt()),
                };
                let (started, zero) = values.split_at(n_started);
                assert!(started.iter().all(|value| *value != 0.0 && value.abs() <= bound), "{part:?}");
                assert!(zero.iter().all(|value| value.to_bits() == 0), "{part:?}");
            }
        }
    }
}

#[test]
fn the_matrices_a_of_lora_memory_are_uniform() {
    let block = init_block(&paper(VO), 1, id(0, 1));
    let part = &paper(VO).parts(0)[0];
    let values = &block[part.range.clone()][..256 * 512];
    let scaled: Vec<f64> = values.iter().map(|&value| f64::from(value) * 512f64.sqrt()).collect();
    let n = scaled.len() as f64; // 131,072 numbers, uniform in ±1
    let mean = scaled.iter().sum::<f64>() / n;
    let variance = scaled.iter().map(|x| x * x).sum::<f64>() / n;
    assert!(mean.abs() < 0.01 && (variance - 1.0 / 3.0).abs() < 0.005, "{mean}, {variance}");
    assert!(scaled.iter().all(|x| x.abs() <= 1.0) && scaled.iter().any(|x| x.abs() > 0.999));
}

#[test]
fn a_bank_of_another_kind_is_saved_inspected_exported_and_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let spec = BlockSpec { layers: MemoryLayers::Late, ..uneven(VO) };
    run(async {
        let bank = LocalBank::create(spec.clone(), options(1, folder.path())).unwrap();
        let of = id(0, 1);
        let gradient = Block { id: of, values: vec![0.5; spec.block_len(0)] };
        bank.push(Step(1), 0, vec![gradient]).await.unwrap();
        bank.save(Step(1)).await.unwrap();
        let memory = folder.path().join("00000001/memory");
        let resumed = LocalBank::resume(&memory, spec.clone(), options(1, folder.path())).unwrap();
        let fetched = |bank: LocalBank| async move { bank.fetch(Step(1), &[of]).await.unwrap() };
        let block = fetched(bank).await;
        assert_eq!(block, fetched(resumed).await);

        let level = &inspect(&memory).unwrap().levels[0];
        let added: f64 = spec
            .parts(0)
            .iter()
            .map(|part| {
                let MemoryPart::Lora(matrix) = part.part else { panic!("{part:?}") };
                let (from, _) = matrix.widths(10, spec.inner_of(part.layer));
                let b = &block[0].values[part.range.clone()][2 * from..];
                b.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>()
            })
            .sum();
        assert!((level.m3_norm - added.sqrt()).abs() < 1e-6 && added > 0.0, "{} {added}", level.m3_norm);

        let checkpoint = memory_bank::Checkpoint::open_folder(&memory).await.unwrap();
        let file = folder.path().join("bank.safetensors");
        export(&checkpoint, &file, Precision::F32).await.unwrap();
        let bytes = std::fs::read(&file).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(tensors.tensor("level0").unwrap().shape(), [3, spec.block_len(0)]);

        let other = BlockSpec { layers: MemoryLayers::Early, ..spec };
        let error = LocalBank::resume(&memory, other, options(1, folder.path())).err().unwrap().to_string();
        assert!(error.contains("Late") && error.contains("Early"), "{error}");
    });
}

#[test]
fn int8_rows_of_other_kinds_divide_all_of_their_matrices() {
    let spec = uneven(MemoryKind::Kv);
    assert_eq!(spec.row_len(), 6);
    let block = Block { id: id(0, 1), values: init_block(&spec, 3, id(0, 1)) };
    let encoded = Encoded::encode(BlockDtype::Int8, spec.row_len(), &block).unwrap();
    assert_eq!(encoded.bytes(), BlockDtype::Int8.block_bytes(&spec, 0));
    for (found, exact) in encoded.decode().iter().zip(&block.values) {
        assert!((found - exact).abs() < 0.01, "{found} for {exact}");
    }
}
