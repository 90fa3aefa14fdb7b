//! The static embedder on folders built here: types, weights, mapping, errors.

use std::fs;
use std::path::Path;

use embed::{Embedder, Error, Static};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView};

const WORDS: [&str; 5] = ["[UNK]", "[CLS]", "red", "fox", "hen"];
/// A vector of two dimensions per word; the unknown token's would show.
const TABLE: [[f64; 2]; 5] = [[100.0, -100.0], [50.0, 50.0], [3.0, 0.0], [0.0, 4.0], [-1.0, 0.0]];

/// A word-level tokenizer that adds [CLS], truncates to two tokens and pads, if asked to.
fn tokenizer() -> serde_json::Value {
    let vocab: serde_json::Map<String, serde_json::Value> =
        WORDS.iter().enumerate().map(|(id, word)| (word.to_string(), id.into())).collect();
    serde_json::json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null,
                    "pad_id": 1, "pad_type_id": 0, "pad_token": "[CLS]"},
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"]}}},
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    })
}

struct Tensor {
    name: &'static str,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn tensor(name: &'static str, dtype: Dtype, shape: &[usize], values: &[f64]) -> Tensor {
    let encode = |&value: &f64| match dtype {
        Dtype::F64 => value.to_le_bytes().to_vec(),
        Dtype::F32 => (value as f32).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f64(value).to_le_bytes().to_vec(),
        Dtype::BF16 => bf16::from_f64(value).to_le_bytes().to_vec(),
        Dtype::I8 => (value as i8).to_le_bytes().to_vec(),
        Dtype::I32 => (value as i32).to_le_bytes().to_vec(),
        Dtype::I64 => (value as i64).to_le_bytes().to_vec(),
        other => panic!("no test uses {other}"),
    };
    Tensor { name, dtype, shape: shape.to_vec(), bytes: values.iter().flat_map(encode).collect() }
}

fn table(name: &'static str, dtype: Dtype) -> Tensor {
    tensor(name, dtype, &[5, 2], TABLE.as_flattened())
}

fn write(folder: &Path, tensors: &[Tensor]) {
    let views = tensors.iter().map(|tensor| {
        (tensor.name, TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap())
    });
    fs::write(folder.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    fs::write(folder.join("tokenizer.json"), tokenizer().to_string()).unwrap();
}

fn assert_near(found: &[f32], wanted: &[f64]) {
    assert_eq!(found.len(), wanted.len());
    assert!(found.iter().zip(wanted).all(|(&a, b)| (f64::from(a) - b).abs() < 1e-6), "{found:?} {wanted:?}");
}

#[test]
fn a_row_is_the_direction_of_the_mean_of_the_known_tokens() {
    let folder = tempfile::tempdir().unwrap();
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::I8] {
        write(folder.path(), &[table("embeddings", dtype)]);
        let embedder = Static::load(folder.path()).unwrap();
        assert_eq!(embedder.dim(), 2);
        // Unknown words, truncation, padding and [CLS] would each show.
        let rows = embedder.embed(&["Red owl fox", "fox", "red red red red fox fox fox"]).unwrap();
        assert_near(&rows, &[0.6, 0.8, 0.0, 1.0, 0.5f64.sqrt(), 0.5f64.sqrt()]);
    }
}

#[test]
fn weights_scale_tokens_and_a_mapping_shares_rows() {
    let folder = tempfile::tempdir().unwrap();
    for (weights, mapping) in [(Dtype::F64, Dtype::I64), (Dtype::F32, Dtype::I32), (Dtype::F16, Dtype::I64)] {
        write(
            folder.path(),
            &[
                tensor("embeddings", Dtype::F32, &[3, 2], &[9.0, 9.0, 1.0, 0.0, 0.0, 1.0]),
                tensor("weights", weights, &[5], &[1.0, 1.0, 3.0, 2.0, 2.0]),
                tensor("mapping", mapping, &[5], &[0.0, 0.0, 1.0, 2.0, 2.0]),
            ],
        );
        let rows = Static::load(folder.path()).unwrap().embed(&["red fox hen"]).unwrap();
        assert_near(&rows, &[0.6, 0.8]);
    }
}

#[test]
fn the_only_matrix_is_the_table_whatever_its_name() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &[table("embedding.weight", Dtype::F32), tensor("x", Dtype::F32, &[1], &[1.0])]);
    assert_near(&Static::load(folder.path()).unwrap().embed(&["red fox"]).unwrap(), &[0.6, 0.8]);
    write(folder.path(), &[table("a", Dtype::F32), table("b", Dtype::F32)]);
    let error = Static::load(folder.path()).err().unwrap().to_string();
    assert!(error.contains(r#"tensor "embeddings" is missing"#), "{error}");
}

#[test]
fn the_fingerprint_follows_both_files() {
    let folder = tempfile::tempdir().unwrap();
    let print = || Static::load(folder.path()).unwrap().fingerprint().to_owned();
    write(folder.path(), &[table("embeddings", Dtype::F32)]);
    let first = print();
    assert_eq!(first.len(), 64);
    assert_eq!(print(), first);
    fs::write(folder.path().join("tokenizer.json"), tokenizer().to_string().replace("Lowercase", "NFC"))
        .unwrap();
    let other_tokenizer = print();
    write(folder.path(), &[table("embeddings", Dtype::F16)]);
    let other_table = print();
    assert!(first != other_tokenizer && first != other_table && other_tokenizer != other_table);
}

#[test]
fn texts_without_a_direction_get_the_first_axis() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &[table("embeddings", Dtype::F32)]);
    let embedder = Static::load(folder.path()).unwrap();
    for text in ["", "owl newt", "red hen hen hen"] {
        let rows = embedder.embed(&["red", text]).unwrap();
        let axis: Vec<f32> = (0..embedder.dim()).map(|i| if i == 0 { 1.0 } else { 0.0 }).collect();
        assert_eq!(rows[embedder.dim()..], axis, "{text:?}");
    }
}

#[test]
fn tensors_that_do_not_fit_are_errors_that_name_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let good = || table("embeddings", Dtype::F32);
    let cases: Vec<(Vec<Tensor>, &str)> = vec![
        (
            vec![tensor("embeddings", Dtype::F32, &[4, 2], &[1.0; 8])],
            "is F32 [4, 2], expected F32, F16, BF16 or I8 [5, dim] for 5 tokens",
        ),
        (vec![tensor("embeddings", Dtype::F32, &[10], &[1.0; 10])], "is F32 [10], expected"),
        (vec![tensor("embeddings", Dtype::F32, &[5, 0], &[])], "is F32 [5, 0], expected"),
        (vec![table("embeddings", Dtype::I32)], "is I32 [5, 2], expected"),
        (
            vec![good(), tensor("weights", Dtype::F32, &[4], &[1.0; 4])],
            r#"tensor "weights" is F32 [4], expected F64, F32, F16 or BF16 [5]"#,
        ),
        (
            vec![good(), tensor("mapping", Dtype::F32, &[5], &[1.0; 5])],
            r#"tensor "mapping" is F32 [5], expected I64 or I32 [5]"#,
        ),
        (
            vec![good(), tensor("mapping", Dtype::I64, &[5], &[0.0, 1.0, 5.0, 0.0, 0.0])],
            r#"tensor "mapping" holds 5 at row 2, expected a row below 5"#,
        ),
        (
            vec![good(), tensor("mapping", Dtype::I64, &[5], &[0.0, 1.0, 0.0, 0.0, -1.0])],
            r#"tensor "mapping" holds -1 at row 4, expected a row below 5"#,
        ),
        (
            vec![good(), tensor("weights", Dtype::F32, &[5], &[1.0, f64::NAN, 1.0, 1.0, 1.0])],
            r#"tensor "weights" holds NaN at row 1, expected finite numbers"#,
        ),
        (
            vec![tensor(
                "embeddings",
                Dtype::F16,
                &[5, 2],
                &[1.0, 1.0, 1.0, 1.0, 1.0, 1e9, 1.0, 1.0, 1.0, 1.0],
            )],
            r#"tensor "embeddings" holds inf at row 2, expected finite numbers"#,
        ),
    ];
    for (tensors, wanted) in cases {
        write(folder.path(), &tensors);
        let error = Static::load(folder.path()).err().unwrap().to_string();
        assert!(error.contains("model.safetensors: tensor") && error.contains(wanted), "{error}");
    }
}

#[test]
fn missing_and_broken_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.safetensors");
    let missing =
        |path: &Path| matches!(Static::load(folder.path()), Err(Error::Io { path: p, .. }) if p == path);
    assert!(missing(&model));
    write(folder.path(), &[table("embeddings", Dtype::F32)]);
    let whole = fs::read(&model).unwrap();
    fs::write(&model, &whole[..whole.len() - 1]).unwrap();
    assert!(matches!(Static::load(folder.path()), Err(Error::Format { .. })));
    fs::write(&model, &whole).unwrap();
    let tokenizer = folder.path().join("tokenizer.json");
    fs::write(&tokenizer, "{}").unwrap();
    assert!(matches!(Static::load(folder.path()), Err(Error::Tokenizer { .. })));
    fs::remove_file(&tokenizer).unwrap();
    assert!(missing(&tokenizer));
}
