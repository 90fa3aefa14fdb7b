//! Checkpoints that a run begins with and is written as, and memory that is added to them.

use std::fs;

use serde_json::Value;

use crate::kill::killed;
use crate::support::{Workdir, files};

/// A checkpoint trained before on a part of the facts.
const BEFORE: &str = r#"[run]
dir = "before"

[corpus]
prepared = "prepared-before"
files = ["known.jsonl"]
id_key = "id"
label_key = "label"
vocab_size = 320
tokenizer_sample_mib = 1
window = 64
seq_len = 64
validation_permille = 100

[embed]
dim = 64

[tree]
branching = [2, 2]

[anchor]
d_model = 32
n_layers = 2
n_heads = 2
head_width = 16
ffn_width = 64
max_seq_len = 128
qk_norm = "head"

[train]
phase = "anchor"
steps = 8
batch_size = 8
warmup_steps = 2
"#;

/// What is added to it: the rest of the facts.
const ADDED: &str = r#"[run]
dir = "added"

[corpus]
prepared = "prepared"
files = ["new.jsonl"]
id_key = "id"
label_key = "label"
window = 64
seq_len = 64
validation_permille = 100

[embed]
dim = 64

[tree]
branching = [2, 2]

[anchor]
checkpoint = "model"

[memory]
width = [16, 8]

[train]
phase = "frozen"
steps = 6
batch_size = 8
warmup_steps = 2
save_every = 3

[eval]
questions_per_bucket = 2
batch = 8
max_answer_tokens = 4
"#;

const POSTHOC: &str = r#"
[posthoc]
seeds = 2
replay = ["known.jsonl"]
kept = ["facts/validation.jsonl"]
questions = "facts/questions.jsonl"
n_questions = 20
lora_rank = 4

[posthoc.card]
learned = "new facts"
"#;

/// A folder with a trained run `before` and the model folder `model` that it was exported to.
fn with_model() -> Workdir {
    let work = Workdir::new();
    let text = fs::read_to_string(work.path("facts/corpus.jsonl")).unwrap();
    let of = |parity: usize| -> String {
        text.lines()
            .enumerate()
            .filter(|(i, _)| i % 2 == parity)
            .map(|(_, line)| format!("{line}\n"))
            .collect()
    };
    fs::write(work.path("known.jsonl"), of(0)).unwrap();
    fs::write(work.path("new.jsonl"), of(1)).unwrap();
    fs::write(work.path("before.toml"), BEFORE).unwrap();
    fs::write(work.path("added.toml"), ADDED).unwrap();
    fs::write(work.path("posthoc.toml"), ADDED.to_owned() + POSTHOC).unwrap();
    work.ok(&["train", "before.toml"]);
    let (out, _) = work.ok(&["export", "before", "model"]);
    assert!(out.starts_with("model: qwen3, ") && out.contains("tokenizer.json"), "{out}");
    work
}

fn json(work: &Workdir, name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(work.path(name)).unwrap()).unwrap()
}

#[test]
fn a_checkpoint_has_its_sizes_tokenizer_and_weights() {
    let work = with_model();
    let (out, _) = work.ok(&["check", "added.toml"]);
    assert!(out.contains("of model (qwen3 of transformers)"), "{out}");
    work.ok(&[
        "plan",
        "added.toml",
        "--site",
        concat!(env!("CARGO_MANIFEST_DIR"), "/../../cluster/h100.toml"),
    ]);
    work.ok(&["train", "added.toml"]);
    let same = |a: &str, b: &str| fs::read(work.path(a)).unwrap() == fs::read(work.path(b)).unwrap();
    assert!(same("added/tokenizer.json", "before/tokenizer.json"));
    // A frozen anchor is one file, whichever checkpoint it is read from.
    let inode = |step: u64| {
        let file = work.path(&format!("added/checkpoints/{step:08}/anchor.safetensors"));
        std::os::unix::fs::MetadataExt::ino(&fs::metadata(file).unwrap())
    };
    assert_eq!(inode(3), inode(6));
    // What it was trained from is not needed any more.
    fs::rename(work.path("model"), work.path("moved")).unwrap();
    let config = fs::read_to_string(work.path("added/config.toml")).unwrap();
    assert!(config.contains("[anchor.sizes]") && config.contains("qk_norm = \"head\""), "{config}");
    work.ok(&["eval", "added"]);
    work.ok(&["generate", "added", "The capital of", "--max-new-tokens", "4"]);
    // The frozen anchor is the checkpoint, whichever way it is read.
    work.ok(&["export", "added", "again"]);
    assert!(same("again/model.safetensors", "moved/model.safetensors"));
    assert!(same("again/config.json", "moved/config.json"));
    let run = ["train", "added.toml", "--set", "anchor.checkpoint=before", "--set", "run.dir=of-run"];
    work.ok(&run);
    work.ok(&["eval", "of-run"]);
}

#[test]
fn a_checkpoint_that_does_not_fit_is_refused() {
    let work = with_model();
    let fails = |set: &[&str], parts: &[&str]| {
        let sets = set.iter().flat_map(|setting| ["--set", setting]);
        work.fails(&["train", "added.toml"].into_iter().chain(sets).collect::<Vec<_>>(), parts);
    };
    fails(&["anchor.d_model=64"], &["anchor.checkpoint: expected no sizes beside it in [anchor]"]);
    fails(&["anchor.init=before"], &["anchor.init: expected nothing beside anchor.checkpoint, found before"]);
    fails(&["anchor.checkpoint=facts"], &["expected a model folder (config.json)", "found a folder without"]);
    fails(&["anchor.checkpoint=gone"], &["anchor.checkpoint: gone: expected", "found nothing there"]);
    fails(&["train.phase=joint"], &["anchor.checkpoint: expected nothing (train.phase = \"joint\""]);
    fails(&["corpus.seq_len=256", "corpus.window=256"], &["positions of anchor.checkpoint", "found 128"]);
    // A small one of transformers, whose folder has no tokenizer.
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../anchor/tests/checkpoints/llama2");
    let set = format!("anchor.checkpoint={tiny}");
    fails(
        &[&set],
        &["corpus.tokenizer: expected a tokenizer.json, since anchor.checkpoint", "found nothing"],
    );
    fails(
        &[&set, "corpus.tokenizer=model/tokenizer.json"],
        &["expected at most the 48 tokens of", "found 320"],
    );
    work.fails(
        &["posthoc", "posthoc.toml", "--set", "posthoc.card.colour=blue"],
        &["posthoc.card.colour: expected one of license, base_model"],
    );
    work.fails(&["posthoc", "added.toml"], &["expected a section [posthoc], found none"]);
    // A native anchor has a form that no family holds, unless its heads are as wide as the model together.
    let native = ["train", "before.toml", "--set", "anchor.qk_norm=full", "--set", "anchor.n_heads=1"];
    work.ok(&[&native[..], &["--set", "run.dir=native", "--set", "train.steps=2"]].concat());
    work.fails(&["export", "native", "nowhere"], &["no family of transformers holds this anchor", "qk_norm"]);
}

#[test]
fn memory_is_added_and_compared_and_handed_over() {
    let work = with_model();
    // One that is killed goes on.
    let half = work.path("added/seed1/generic/checkpoints/00000003/DONE");
    killed(&work, &["posthoc", "posthoc.toml"], || half.exists());
    let (out, err) = work.ok(&["posthoc", "posthoc.toml"]);
    assert!(err.contains("memory: trained already"), "{err}");
    let study = json(&work, "added/posthoc.json");
    let methods: Vec<&str> =
        study["methods"].as_array().unwrap().iter().map(|row| row["method"].as_str().unwrap()).collect();
    assert_eq!(methods, ["before", "memory", "generic", "lora", "full", "replay"]);
    for row in study["methods"].as_array().unwrap() {
        let name = row["method"].as_str().unwrap();
        assert!(out.contains(&format!("\n{name} ")), "no row {name} in\n{out}");
        for side in ["learned", "kept"] {
            let perplexity = row[side]["perplexity"]["mean"].as_f64().unwrap();
            assert!(perplexity > 1.0 && perplexity < 1000.0, "{name}, {side}: {perplexity}");
            assert_eq!(row[side]["change"].is_null(), name == "before", "{name}, {side}");
            let seeds = row[side]["by_seed"].as_array().unwrap().len();
            assert_eq!(seeds, if name == "before" { 1 } else { 2 }, "{name}");
        }
    }
    let of = |i: usize, key: &str| study["methods"][i][key].as_u64().unwrap();
    assert_eq!(of(1, "used"), of(2, "used"), "the control has as many parameters as a fetch");
    assert_eq!((of(1, "tokens"), of(2, "tokens")), (of(4, "tokens"), of(3, "tokens")));
    assert!(of(3, "trained") < of(4, "trained"));
    let page = fs::read_to_string(work.path("added/posthoc.html")).unwrap();
    for part in ["Memory took the perplexity of new facts from", "Gain and damage", "By frequency", "<svg"] {
        assert!(page.contains(part), "no {part} on the page");
    }
    let figures = |name: &str| {
        let mut methods = json(&work, name)["methods"].clone();
        let rows = methods.as_array_mut().unwrap().iter_mut().map(|row| row.as_object_mut().unwrap());
        rows.for_each(|row| drop(row.remove("tokens_per_s")));
        methods
    };
    let found = figures("added/posthoc.json");
    // The same command again trains and measures nothing, and finds the same; other questions are asked.
    let (_, err) = work.ok(&["posthoc", "posthoc.toml"]);
    assert_eq!(err.matches("trained already").count(), 10, "{err}");
    assert_eq!(err.matches("measured already").count(), 11, "{err}");
    assert_eq!(figures("added/posthoc.json"), found);
    let (_, err) = work.ok(&["posthoc", "posthoc.toml", "--set", "eval.questions_per_bucket=1"]);
    assert_eq!(err.matches("measured already").count(), 0, "{err}");
    let whole = ["--set", "run.dir=whole", "--set", "posthoc.methods=[\"memory\", \"replay\"]"];
    work.ok(&[&["posthoc", "posthoc.toml"], &whole[..]].concat());
    assert_eq!(figures("whole/posthoc.json")[1], found[1]);
    assert_eq!(figures("whole/posthoc.json")[2], found[5]);

    let card = fs::read_to_string(work.path("added/hand-over/README.md")).unwrap();
    for part in ["license: \"not stated\"", "base_model: \"model\"", "| full fine-tuning |", "new facts"] {
        assert!(card.contains(part), "no {part} in\n{card}");
    }
    let bank = fs::read(work.path("added/hand-over/bank.safetensors")).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bank).unwrap();
    let spec: Value = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["spec"]).unwrap();
    assert_eq!(spec, json(&work, "added/hand-over/spec.json"));
    assert_eq!((&spec["kind"], &spec["n_layers"]), (&"ffn".into(), &2.into()));
    work.ok(&["bank", "export", "added/seed1/memory", "handed", "--hand-over"]);
    let [one, other] = ["added/hand-over", "handed"].map(|dir| files(&work.path(dir)));
    assert_eq!(one.len(), other.len());
    for (path, bytes) in one.iter().filter(|(path, _)| !path.ends_with("README.md")) {
        assert!(other[path] == *bytes, "{} differs", path.display());
    }
}

#[test]
fn subtrees_of_a_bank_on_a_checkpoint_make_one_run() {
    let work = with_model();
    let part = |subtree: &str| {
        let sets = [format!("run.dir=part-{subtree}"), format!("train.subtree={subtree}")];
        work.ok(&["train", "added.toml", "--set", &sets[0], "--set", &sets[1]]);
    };
    work.ok(&["train", "added.toml"]);
    ["0", "1", "generic"].into_iter().for_each(part);
    let parts = ["--from", "part-0", "part-1", "part-generic"];
    work.ok(&[&["merge", "added.toml", "--set", "run.dir=merged"], &parts[..]].concat());
    let [expected, found] =
        ["added", "merged"].map(|dir| files(&work.path(dir).join("checkpoints/00000006")));
    assert!(expected == found, "{:?} {:?}", expected.keys(), found.keys());
}
