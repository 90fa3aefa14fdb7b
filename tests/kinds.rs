//! A run with each kind of memory, from training to every answer.

use serde_json::{Value, json};

use crate::serving::Served;
use crate::support::{Workdir, metrics};

/// Kinds, their layers, and the parameters of a layer for each unit of width, of an anchor of d_model 32 with 2 heads
/// of 16 and an FFN of 64.
const KINDS: [(&str, &str, usize, usize); 5] = [
    ("ffn", "late", 1, 3 * 32),
    ("lora_qk", "uniform", 2, 2 * (32 + 32)),
    ("lora_vo", "[0]", 1, 2 * (32 + 32)),
    ("lora_ffn", "uniform", 2, 3 * (32 + 64)),
    ("kv", "uniform", 2, 2 * 32),
];

#[test]
fn a_run_with_memory_of_each_kind() {
    let work = Workdir::new();
    for (kind, layers, n_layers, unit) in KINDS {
        let sets =
            [format!("run.dir={kind}"), format!("memory.kind={kind}"), format!("memory.layers={layers}")];
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        work.ok(&[&["train", "run.toml"], &sets[..]].concat());
        let lines = metrics(&work.path(kind));
        let loss = |i: usize| lines[i]["loss"].as_f64().unwrap();
        assert!(lines.len() == 12 && loss(11) < loss(0), "{kind}: {} to {}", loss(0), loss(11));

        let fetched = format!("{} parameters fetched", n_layers * unit * (64 + 32));
        let (bank, _) = work.ok(&["bank", "inspect", kind]);
        assert!(bank.contains(&format!("step 12, {fetched}")), "{kind}: {bank}");
        assert!(bank.contains(&format!("\nkind {kind}, layers {layers}\n")), "{kind}: {bank}");
        let (check, _) = work.ok(&[&["check", "run.toml"], &sets[..]].concat());
        assert!(check.contains(&fetched), "{kind}: {check}");

        let (out, _) = work.ok(&["eval", kind, "--json"]);
        let summary: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
        let scored = |memory: &str| summary["loss"][memory].as_f64().unwrap();
        assert!(scored("fetched") < 10.0 && scored("fetched") != scored("none"), "{kind}: {summary}");
        assert_ne!(scored("fetched"), scored("random"), "{kind}");

        // What is served is what `generate` says, and memory has a part in it.
        let prompt = "The element";
        let args = ["generate", kind, prompt, "--max-new-tokens", "8", "--temperature", "0"];
        let (text, _) = work.ok(&args);
        let served = Served::start(&work, kind);
        let reply = served.complete(&json!({"prompt": prompt, "max_tokens": 8, "temperature": 0}));
        assert_eq!(format!("{prompt}{}\n", reply["choices"][0]["text"].as_str().unwrap()), text, "{kind}");
        let score = |memory: &str| {
            let body =
                json!({"prompt": prompt, "max_tokens": 0, "echo": true, "logprobs": 1, "memory": memory});
            served.complete(&body)["choices"][0]["logprobs"]["token_logprobs"].clone()
        };
        assert_ne!(score("auto"), score("off"), "{kind}");
    }
}

#[test]
fn a_run_is_not_taken_for_one_of_another_kind_or_of_other_layers() {
    let work = Workdir::new();
    work.ok(&["train", "run.toml", "--set", "train.steps=4", "--set", "memory.kind=kv"]);
    let set = ["--set", "memory.kind=lora_vo", "--set", "memory.layers=[1]"];
    let (described, _) = work.ok(&[&["bank", "describe", "run.toml"], &set[..]].concat());
    let described: toml::Table = toml::from_str(&described).unwrap();
    let spec = &described["bank"]["spec"];
    assert_eq!((&spec["kind"], &spec["layers"]), (&"lora_vo".into(), &vec![1].into()));
    assert_eq!(spec["inner"].as_array().map(Vec::len), Some(1));

    let more = ["train", "run.toml", "--set", "train.steps=6"];
    work.fails(&more, &["memory.kind"]);
    let set = ["--set", "memory.kind=kv", "--set", "memory.layers=late"];
    work.fails(&[&more[..], &set[..]].concat(), &["memory.layers"]);
    work.fails(
        &["check", "run.toml", "--set", "memory.layers=[0, 2]"],
        &["memory.layers: expected at least one layer, ascending, below 2, found [0, 2]"],
    );
    work.fails(
        &["check", "run.toml", "--set", "memory.kind=lora"],
        &["memory.kind: expected one of ffn, lora_qk, lora_vo, lora_ffn, kv, found \"lora\""],
    );
}
