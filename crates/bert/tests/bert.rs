//! A tiny BERT against what sentence-transformers makes of it (tests/make_tiny_bert.py), and broken folders.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use bert::Bert;
use embed::Embedder;
use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

const FILES: [&str; 6] = [
    "1_Pooling/config.json",
    "config.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "tokenizer.json",
];

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

/// A copy of the folder, to be changed.
fn copy() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("1_Pooling")).unwrap();
    for file in FILES {
        fs::copy(data().join(file), folder.path().join(file)).unwrap();
    }
    folder
}

/// Changes a key of one of a folder's JSON files.
fn set(folder: &TempDir, file: &str, key: &str, value: Value) {
    let path = folder.path().join(file);
    let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    json[key] = value;
    fs::write(path, json.to_string()).unwrap();
}

fn reference() -> (Vec<String>, Vec<Value>) {
    let mut json: Value = serde_json::from_slice(&fs::read(data().join("reference.json")).unwrap()).unwrap();
    let texts = serde_json::from_value(json["texts"].take()).unwrap();
    (texts, serde_json::from_value(json["cases"].take()).unwrap())
}

fn embed(bert: &Bert, texts: &[String]) -> Vec<Vec<f32>> {
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    bert.embed(&texts).unwrap().chunks_exact(bert.dim()).map(<[f32]>::to_vec).collect()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn embeddings_are_those_of_sentence_transformers() {
    let (texts, cases) = reference();
    assert_eq!((texts.len(), cases.len()), (13, 5));
    for case in cases {
        let pooling = case["pooling"].as_str().unwrap();
        let folder = copy();
        set(&folder, "config.json", "hidden_act", case["activation"].clone());
        let switches = [("cls", "cls_token"), ("mean", "mean_tokens"), ("max", "max_tokens")];
        for (kind, name) in switches {
            let key = format!("pooling_mode_{name}");
            set(&folder, "1_Pooling/config.json", &key, json!(kind == pooling));
        }
        let expected: Vec<Vec<f32>> = serde_json::from_value(case["embeddings"].clone()).unwrap();
        let found = embed(&Bert::load(folder.path()).unwrap(), &texts);
        for ((found, expected), text) in found.iter().zip(&expected).zip(&texts) {
            let what = format!("{}, {pooling}: {text:?}", case["activation"]);
            assert!(1.0 - cosine(found, expected) < 1e-9, "{what}: {}", cosine(found, expected));
            // The cases differ by 1e-4 and more, so that none passes for another.
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 2e-6), "{what}: {found:?}");
        }
        // The newer way to name the pooling.
        let config = json!({"pooling_mode": pooling}).to_string();
        fs::write(folder.path().join("1_Pooling/config.json"), config).unwrap();
        assert_eq!(embed(&Bert::load(folder.path()).unwrap(), &texts), found);
    }
}

#[test]
fn a_text_gives_the_same_bits_in_any_company_and_on_any_number_of_threads() {
    let (texts, _) = reference();
    let bert = Bert::load(&data()).unwrap();
    let run = |texts: &[String], n_threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
        pool.install(|| embed(&bert, texts))
    };
    let all = run(&texts, 1);
    for (text, expected) in texts.iter().zip(&all) {
        assert_eq!(run(std::slice::from_ref(text), 1), std::slice::from_ref(expected), "{text:?} alone");
    }
    // Enough for several batches.
    let many: Vec<String> = (0..20).flat_map(|_| texts.iter().rev().cloned()).collect();
    let expected: Vec<Vec<f32>> = (0..20).flat_map(|_| all.iter().rev().cloned()).collect();
    for n_threads in [1, 2, 3] {
        assert!(run(&many, n_threads) == expected, "{n_threads} threads");
    }
    assert!(bert.embed(&[]).unwrap().is_empty());
}

/// The model file with each tensor changed, or left out.
type Change<'a> = &'a dyn Fn(&str, &TensorView) -> Option<(String, Dtype, Vec<usize>, Vec<u8>)>;

fn rewrite(folder: &TempDir, change: Change) {
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let changed: Vec<_> = tensors.iter().filter_map(|(name, tensor)| change(name, &tensor)).collect();
    let views: HashMap<&str, TensorView> = changed
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        })
        .collect();
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn floats(tensor: &TensorView) -> impl Iterator<Item = f32> {
    tensor.data().as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes))
}

#[test]
fn weights_may_be_halves_and_have_the_prefix_of_a_larger_model() {
    let (texts, _) = reference();
    let expected = embed(&Bert::load(&data()).unwrap(), &texts);
    let half = |x: f32, dtype| match dtype {
        Dtype::F16 => f16::from_f32(x).to_le_bytes(),
        _ => bf16::from_f32(x).to_le_bytes(),
    };
    for (dtype, least) in [(Dtype::F16, 0.99999), (Dtype::BF16, 0.999)] {
        let folder = copy();
        rewrite(&folder, &|name, tensor| {
            let bytes = floats(tensor).flat_map(|x| half(x, dtype)).collect();
            Some((format!("bert.{name}"), dtype, tensor.shape().to_vec(), bytes))
        });
        for (found, expected) in embed(&Bert::load(folder.path()).unwrap(), &texts).iter().zip(&expected) {
            assert!(cosine(found, expected) > least, "{dtype:?}: {}", cosine(found, expected));
        }
    }
}

#[test]
fn what_is_not_there_has_a_default() {
    let (texts, _) = reference();
    let whole = Bert::load(&data()).unwrap();
    let folder = copy();
    for file in ["1_Pooling/config.json", "modules.json"] {
        fs::remove_file(folder.path().join(file)).unwrap();
    }
    let bert = Bert::load(folder.path()).unwrap();
    assert_eq!(bert.fingerprint(), whole.fingerprint());
    assert_eq!(embed(&bert, &texts), embed(&whole, &texts));
    // Without a limit of its own a text may fill the model's 64 positions; three have more than 22 word pieces.
    fs::remove_file(folder.path().join("sentence_bert_config.json")).unwrap();
    let long = Bert::load(folder.path()).unwrap();
    assert_ne!(long.fingerprint(), whole.fingerprint());
    let (cut, uncut) = (embed(&whole, &texts), embed(&long, &texts));
    let differs: Vec<usize> = (0..texts.len()).filter(|&i| cut[i] != uncut[i]).collect();
    assert_eq!(differs, [9, 11, 12]);
}

/// The one line that loading a folder fails with, which ends in `expected` after the folder's name.
fn assert_fails(folder: &TempDir, expected: &str) {
    let error = Bert::load(folder.path()).err().expect(expected).to_string();
    let line = format!("{}/{expected}", folder.path().display());
    assert!(error.starts_with(&line), "expected {line}\nfound    {error}");
    assert!(!error.contains('\n'), "{error}");
}

#[test]
fn errors_name_the_file_the_key_and_what_was_expected() {
    for (file, key, value, expected) in [
        ("config.json", "model_type", json!("roberta"), "model_type is \"roberta\", expected \"bert\""),
        (
            "config.json",
            "hidden_act",
            json!("silu"),
            "hidden_act is \"silu\", expected \"gelu\", \"gelu_new\" or",
        ),
        ("config.json", "position_embedding_type", json!("relative_key"), "position_embedding_type is \"rel"),
        ("config.json", "num_attention_heads", json!(5), "hidden_size is 36, expected a multiple of num_att"),
        ("config.json", "num_attention_heads", json!(0), "num_attention_heads is 0, expected at least 1"),
        ("config.json", "hidden_size", json!("many"), "invalid type: string \"many\", expected usize"),
        (
            "sentence_bert_config.json",
            "max_seq_length",
            json!(65),
            "max_seq_length is 65, expected 3 to max_pos",
        ),
        (
            "1_Pooling/config.json",
            "pooling_mode",
            json!("lasttoken"),
            "pooling_mode is lasttoken, expected one of",
        ),
        ("1_Pooling/config.json", "pooling_mode_max_tokens", json!(true), "pooling_mode is m"),
    ] {
        let folder = copy();
        set(&folder, file, key, value);
        assert_fails(&folder, &format!("{file}: {expected}"));
    }
    let folder = copy();
    let dense = json!([{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]);
    fs::write(folder.path().join("modules.json"), dense.to_string()).unwrap();
    assert_fails(
        &folder,
        "modules.json: type is \"sentence_transformers.models.Dense\", expected Transformer, Pooling or",
    );
    // A module that is named must be there: without it the folder would be another embedder.
    let folder = copy();
    fs::remove_file(folder.path().join("1_Pooling/config.json")).unwrap();
    assert_fails(&folder, "1_Pooling/config.json: entity not found");
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        let folder = copy();
        let path = folder.path().join(file);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        assert_fails(&folder, &format!("{file}: "));
        fs::remove_file(path).unwrap();
        assert_fails(&folder, &format!("{file}: No such file"));
    }
}

#[test]
fn errors_of_tensors_and_tokenizers_say_what_was_found() {
    let name = "encoder.layer.1.intermediate.dense.weight";
    let whole = |name: &str, tensor: &TensorView| {
        (name.to_owned(), tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec())
    };
    let folder = copy();
    rewrite(&folder, &|other, tensor| (other != name).then(|| whole(other, tensor)));
    let expected = "is missing, expected F32, F16 or BF16 [80, 36]";
    assert_fails(&folder, &format!("model.safetensors: tensor {name:?} {expected}"));
    let folder = copy();
    rewrite(&folder, &|other, tensor| {
        let (same, dtype, shape, bytes) = whole(other, tensor);
        Some(if other == name { (same, dtype, vec![36, 80], bytes) } else { (same, dtype, shape, bytes) })
    });
    let expected = "is F32 [36, 80], expected F32, F16 or BF16 [80, 36]";
    assert_fails(&folder, &format!("model.safetensors: tensor {name:?} {expected}"));

    let folder = copy();
    set(&folder, "tokenizer.json", "post_processor", Value::Null);
    assert_fails(&folder, "tokenizer.json: not a tokenizer: puts [] around a text, expected [CLS] and [SEP]");
    let folder = copy();
    set(&folder, "config.json", "vocab_size", json!(200));
    assert_fails(
        &folder,
        "tokenizer.json: not a tokenizer: largest id is 247, expected one below the model's",
    );
}

#[test]
fn a_name_is_a_folder_or_a_hub_id() {
    assert_eq!(bert::folder(&data(), &bert::FILES).unwrap(), data());
    for name in ["/nowhere/at all", "minilm"] {
        let error = bert::open(Path::new(name)).err().unwrap().to_string();
        assert_eq!(error, format!("{name}: no folder here, and no hub id, expected a folder or owner/name"));
    }
}
