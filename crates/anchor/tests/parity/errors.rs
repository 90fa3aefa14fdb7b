//! Folders that cannot be read, each told by one line.

use std::collections::BTreeMap;
use std::path::Path;

use anchor::hf;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

use crate::reference::*;

/// What reading says, without the folder.
fn message(folder: &Path) -> String {
    let error = hf::read(folder, CPU).map(|_| ()).unwrap_err().to_string();
    assert!(!error.contains('\n'), "one line: {error}");
    error.replace(&format!("{}/", folder.display()), "")
}

/// What reading a checkpoint says whose settings were changed.
fn with_settings(family: &str, change: impl FnOnce(&mut Value)) -> String {
    let folder = copy(family, "config.json");
    let path = folder.path().join("config.json");
    let mut settings: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut settings);
    std::fs::write(&path, settings.to_string()).unwrap();
    message(folder.path())
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// What reading a checkpoint says whose tensors were changed.
fn with_tensors(family: &str, change: impl FnOnce(&mut Tensors)) -> String {
    let folder = copy(family, "config.json");
    rewrite(&folder.path().join("model.safetensors"), change);
    message(folder.path())
}

fn rewrite(path: &Path, change: impl FnOnce(&mut Tensors)) {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let one = |(name, view): (&str, TensorView)| {
        (name.to_string(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    let mut all: Tensors = tensors.iter().map(one).collect();
    change(&mut all);
    let views = all.iter().map(|(name, (dtype, shape, data))| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn settings_that_are_not_supported() {
    let set = |key: &'static str, value: Value| move |settings: &mut Value| settings[key] = value;
    let found = [
        with_settings("llama2", set("model_type", json!("gpt2"))),
        with_settings("llama2", set("hidden_act", json!("relu2"))),
        with_settings("llama2", set("rope_parameters", json!({"rope_type": "yarn", "rope_theta": 1e4}))),
        with_settings("llama2", set("partial_rotary_factor", json!(0.5))),
        with_settings("llama2", set("vocab_size", json!(-3))),
        with_settings("llama2", set("num_hidden_layers", Value::Null)),
        with_settings("llama2", set("num_key_value_heads", json!(3))),
        with_settings("gemma2", set("use_bidirectional_attention", json!(true))),
        with_settings("gemma2", set("layer_types", json!(["chunked_attention", "full_attention"]))),
        with_settings("gemma3", set("attn_logit_softcapping", json!(50.0))),
        with_settings("gemma3_nested", set("model_type", json!("llava"))),
        with_settings("openelm", set("ffn_with_glu", json!(false))),
        with_settings("openelm", set("num_kv_heads", json!([1, 1]))),
        with_settings("qwen3", set("model_type", json!("olmoe"))),
    ];
    let expected = [
        "config.json: model_type: expected one of llama, mistral, qwen2, qwen3, gemma2, gemma3_text, olmoe, openelm, \
         found \"gpt2\"",
        "config.json: hidden_act: expected silu, gelu or gelu_pytorch_tanh, found \"relu2\"",
        "config.json: rope_type: expected default, linear or llama3, found \"yarn\"",
        "config.json: partial_rotary_factor: expected 1.0, found 0.5",
        "config.json: vocab_size: expected a whole number above 0, found -3",
        "config.json: num_hidden_layers: expected a whole number above 0, found null",
        "anchor.n_heads: 4 of layer 0 cannot share 3 heads of keys, or its FFN has no width",
        "config.json: use_bidirectional_attention: expected false, found true",
        "config.json: layer_types: expected sliding_attention or full_attention for 2 layers, \
         found [\"chunked_attention\",\"full_attention\"]",
        "config.json: attn_logit_softcapping: expected null, found 50.0",
        "config.json: model_type: expected \"gemma3\", found \"llava\"",
        "config.json: ffn_with_glu: expected true, found false",
        "config.json: num_kv_heads: expected 3 numbers, one a layer, found [1,1]",
        "config.json: num_experts: expected 1, found 64",
    ];
    assert_eq!(found, expected);
}

#[test]
fn tensors_that_are_missing_misshapen_too_many_or_of_other_numbers() {
    let query = "model.layers.1.self_attn.q_proj.weight";
    let found = [
        with_tensors("llama2", |all| drop(all.remove(query))),
        with_tensors("llama2", |all| all.get_mut(query).unwrap().1 = vec![16, 64]),
        with_tensors("llama2", |all| {
            let tensor = all[query].clone();
            all.insert("model.layers.1.self_attn.q_proj.bias".into(), tensor);
        }),
        with_tensors("llama2", |all| {
            let tensor = all.get_mut(query).unwrap();
            (tensor.0, tensor.2) = (Dtype::I32, tensor.2.clone());
        }),
        // The output is tied to the embedding, and not the same.
        with_tensors("llama3", |all| {
            let mut tensor = all["model.embed_tokens.weight"].clone();
            tensor.2[0] ^= 1;
            all.insert("lm_head.weight".into(), tensor);
        }),
        with_settings("llama2", |settings| settings["attention_bias"] = json!(true)),
        with_settings("llama2", |settings| settings["intermediate_size"] = json!(41)),
        with_settings("openelm", |settings| settings["num_query_heads"] = json!([2, 3, 6])),
    ];
    let expected = [
        "model.safetensors: tensor model.layers.1.self_attn.q_proj.weight is missing",
        "model.safetensors: tensor model.layers.1.self_attn.q_proj.weight: expected shape [32, 32], found [16, 64]",
        "model.safetensors: tensor model.layers.1.self_attn.q_proj.bias is not part of this anchor",
        "model.safetensors: tensor model.layers.1.self_attn.q_proj.weight: expected numbers in F32, BF16 or F16, \
         found I32",
        "model.safetensors: tensor lm_head.weight is not part of this anchor",
        "model.safetensors: tensor model.layers.0.self_attn.q_proj.bias is missing",
        "model.safetensors: tensor model.layers.0.mlp.gate_proj.weight: expected shape [41, 32], found [40, 32]",
        "model.safetensors: tensor transformer.layers.2.attn.qkv_proj.weight: expected shape [80, 32], found [64, 32]",
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_part_of_a_model_of_images_says_little_of_itself() {
    let folder = copy("gemma3_nested", "config.json");
    let path = folder.path().join("config.json");
    let mut settings: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    settings.as_object_mut().unwrap().remove("tie_word_embeddings");
    let text = settings["text_config"].as_object_mut().unwrap();
    let said = ["hidden_size", "intermediate_size", "layer_types", "num_hidden_layers", "sliding_window"];
    text.retain(|key, _| said.contains(&key.as_str()));
    std::fs::write(&path, settings.to_string()).unwrap();
    let config = hf::describe(folder.path()).unwrap().config;
    assert_eq!((config.d_model, config.n_layers, config.ffn_width), (32, 2, 40));
    assert_eq!((config.vocab_size, config.head_width, config.max_seq_len), (262_208, 256, 131_072));
    assert!(config.tied_embeddings);
    assert_eq!((config.rope_base, config.form.local.unwrap().rope_base), (1e6, Some(1e4)));
}

#[test]
fn what_older_files_hold_beside_is_left_alone() {
    let folder = copy("llama3", "config.json");
    rewrite(&folder.path().join("model.safetensors"), |all| {
        let embedding = all["model.embed_tokens.weight"].clone();
        all.insert("lm_head.weight".into(), embedding);
        let table = (Dtype::F32, vec![2], vec![0; 8]);
        all.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), table);
    });
    assert_eq!(read(folder.path()).config(), read(&crate::reference::folder("llama3")).config());
}

#[test]
fn files_that_are_not_there_or_not_whole() {
    let without = |family: &str, file: &str| {
        let folder = copy(family, "config.json");
        std::fs::remove_file(folder.path().join(file)).unwrap();
        message(folder.path())
    };
    let with = |file: &str, content: &[u8]| {
        let folder = copy("mistral", "config.json");
        std::fs::write(folder.path().join(file), content).unwrap();
        message(folder.path())
    };
    assert!(without("llama2", "config.json").starts_with("config.json: No such file"));
    let found = without("llama2", "model.safetensors");
    assert!(
        found.ends_with("expected model.safetensors or model.safetensors.index.json, found neither"),
        "{found}"
    );
    let found = without("mistral", "model-00002-of-00002.safetensors");
    assert!(found.starts_with("model-00002-of-00002.safetensors: No such file"), "{found}");
    let index = "model.safetensors.index.json";
    let found = [
        with("config.json", b"[]"),
        with(index, b"{}"),
        with(index, br#"{"weight_map": {"a": "../a"}}"#),
        with(index, br#"{"weight_map": {"a": "model-00001-of-00002.safetensors"}}"#),
    ];
    let expected = [
        "config.json: expected an object",
        "model.safetensors.index.json: weight_map: expected an object",
        "model.safetensors.index.json: weight_map: tensor a: expected a file beside it, found \"../a\"",
    ];
    assert_eq!(found[..3], expected);
    assert!(found[3].starts_with("model.safetensors.index.json: tensor model.layers."), "{}", found[3]);
    let bytes = std::fs::read(folder("mistral").join("model-00001-of-00002.safetensors")).unwrap();
    let found = with("model-00001-of-00002.safetensors", &bytes[..bytes.len() - 1]);
    assert!(found.starts_with("model-00001-of-00002.safetensors: "), "{found}");
    let both = with(
        "model-00001-of-00002.safetensors",
        &std::fs::read(folder("mistral").join("model-00002-of-00002.safetensors")).unwrap(),
    );
    assert!(both.contains("tensor ") && both.contains(" is in "), "{both}");
}

#[test]
fn a_folder_says_its_tokens_and_its_other_files() {
    let folder = copy("llama3", "config.json");
    let about = hf::describe(folder.path()).unwrap();
    assert_eq!(about.tokens, hf::SpecialTokens { bos: Some(1), eos: vec![2, 3], pad: Some(0) });
    assert_eq!((about.tokenizer, about.chat_template), (None, None));
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("generation_config.json", r#"{"eos_token_id": [7, 9]}"#);
    write("tokenizer.json", "{}");
    write("tokenizer_config.json", r#"{"chat_template": "x"}"#);
    let about = hf::describe(folder.path()).unwrap();
    assert_eq!(about.tokens, hf::SpecialTokens { bos: Some(1), eos: vec![7, 9], pad: Some(0) });
    assert_eq!(about.tokenizer, Some(folder.path().join("tokenizer.json")));
    assert_eq!(about.chat_template, Some(folder.path().join("tokenizer_config.json")));
    write("chat_template.jinja", "x");
    let about = hf::describe(folder.path()).unwrap();
    assert_eq!(about.chat_template, Some(folder.path().join("chat_template.jinja")));
}
