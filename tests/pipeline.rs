//! The commands in the order in which they are used.

use std::collections::BTreeMap;
use std::fs;

use serde_json::Value;

use crate::support::{Workdir, checkpoints, half_written, metrics};

const STAGES: [&str; 4] = ["tokenise", "embed", "cluster", "pack"];

#[test]
fn a_second_prepare_has_nothing_to_do() {
    let work = Workdir::new();
    let (_, first) = work.ok(&["prepare", "run.toml"]);
    let modified = |name: &str| fs::metadata(work.path("prepared").join(name)).unwrap().modified().unwrap();
    let before = modified("train.pack");
    let (_, second) = work.ok(&["prepare", "run.toml"]);
    for stage in STAGES {
        assert!(!first.contains(&format!("{stage}: up to date")), "{first}");
        assert!(second.contains(&format!("{stage}: up to date")), "{second}");
    }
    assert_eq!(before, modified("train.pack"));

    // What a stage does not depend on leaves it alone.
    let (_, third) = work.ok(&["prepare", "run.toml", "--set", "tree.seed=2"]);
    let current = STAGES.map(|stage| third.contains(&format!("{stage}: up to date")));
    assert_eq!(current, [true, true, false, false], "{third}");
    assert!(half_written(&work.path("prepared")).is_empty());
}

#[test]
fn a_run_from_training_to_every_answer() {
    let work = Workdir::new();
    work.ok(&["train", "run.toml"]);
    let run = work.path("run");
    assert_eq!(
        checkpoints(&run).into_iter().collect::<Vec<_>>(),
        [("00000008".into(), true), ("00000012".into(), true)]
    );
    let lines = metrics(&run);
    assert_eq!(lines.len(), 12);
    let (first, last) = (lines[0]["loss"].as_f64().unwrap(), lines[11]["loss"].as_f64().unwrap());
    assert!(last < first, "the loss went from {first} to {last}");
    assert!(lines[11]["validation_loss"].is_f64());
    assert!(half_written(&run).is_empty());

    eval_has_every_key(&work);
    queries_answer(&work);

    // Trained already: the same command changes nothing.
    let before = fs::read(run.join("metrics.jsonl")).unwrap();
    work.ok(&["train", "run.toml"]);
    assert_eq!(before, fs::read(run.join("metrics.jsonl")).unwrap());
}

fn eval_has_every_key(work: &Workdir) {
    let (out, _) = work.ok(&["eval", "run", "--json"]);
    let summary: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    for memory in ["none", "generic", "fetched", "random"] {
        let loss = summary["loss"][memory].as_f64();
        assert!(loss.is_some_and(|loss| (0.0..10.0).contains(&loss)), "{memory}: {loss:?}");
        let buckets = summary["exact_match"][memory].as_array().unwrap();
        assert!(buckets.len() == 5 && buckets.iter().all(Value::is_f64), "{memory}: {buckets:?}");
    }
    // Of this run there is no such control: the key is there and says so.
    assert!(summary["loss"].as_object().unwrap().get("always_on").is_some_and(Value::is_null));
    assert_ne!(summary["loss"]["fetched"], summary["loss"]["random"]);
    for key in ["seconds", "peak_rss_mb", "tokens_per_s"] {
        assert!(summary[key].as_f64().is_some_and(|value| value > 0.0), "{key}: {}", summary[key]);
    }
    assert_eq!(summary["seeds"], serde_json::json!([1]));
}

#[test]
fn documents_route_to_the_leaf_they_are_packed_in() {
    let work = Workdir::new();
    work.ok(&["train", "run.toml", "--set", "corpus.window=512", "--set", "train.steps=2"]);
    let corpus = corpus::Corpus::open(&work.path("prepared")).unwrap();
    let mut leaves: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for window in corpus.train_windows() {
        let (leaf, document) = window.unwrap();
        leaves.entry(document).or_default().push(leaf);
    }
    let text = fs::read_to_string(work.path("facts/corpus.jsonl")).unwrap();
    let documents: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // A longer document is embedded window by window.
    let whole = leaves.iter().filter(|(_, leaves)| leaves.len() == 1).step_by(20);
    let mut n = 0;
    for (&document, leaves) in whole {
        let text = documents[document as usize]["text"].as_str().unwrap();
        let (route, _) = work.ok(&["route", "run", text]);
        let path = route.split_whitespace().next().unwrap();
        assert_eq!(path, format!("{}/{}", leaves[0] / 4, leaves[0]), "document {document}: {text}");
        n += 1;
    }
    assert!(n > 10, "only {n} documents of one window");
}

fn queries_answer(work: &Workdir) {
    let (route, _) = work.ok(&["route", "run", "The atomic number of gold is"]);
    let path = route.split_whitespace().next().unwrap();
    let indices: Vec<usize> = path.split('/').map(|index| index.parse().unwrap()).collect();
    assert!(indices.len() == 2 && indices[0] < 4 && indices[1] < 16, "{route}");

    let sample = |seed: &str| {
        let options = ["--seed", seed, "--temperature", "1", "--max-new-tokens", "24"];
        work.ok(&[&["generate", "run", "The capital of France is"], &options[..]].concat()).0
    };
    assert!(sample("3").starts_with("The capital of France is"));
    assert_eq!(sample("3"), sample("3"));
    assert_ne!(sample("3"), sample("4"));

    // One block has 2 layers × 3 matrices × 32 × width parameters; one fetch is one block a level.
    let fetched = 2 * 3 * 32 * (64 + 32);
    let (bank, _) = work.ok(&["bank", "inspect", "run"]);
    assert!(bank.contains(&format!("step 12, {fetched} parameters fetched")), "{bank}");
    let (check, _) = work.ok(&["check", "run.toml"]);
    assert!(check.contains(&format!("{fetched} parameters fetched")), "{check}");
    let (printed, _) = work.ok(&["config", "print", "run.toml", "--set", "train.seed=7"]);
    let resolved: toml::Table = toml::from_str(&printed).unwrap();
    assert_eq!(resolved["train"]["seed"].as_integer(), Some(7));
    assert_eq!(resolved["tree"]["beam"].as_integer(), Some(4));
}

#[test]
fn two_runs_of_one_configuration_are_the_same_for_any_number_of_cores() {
    let work = Workdir::new();
    work.ok(&["train", "run.toml"]);
    // The program counts the processors that it may run on.
    let mut one_core = std::process::Command::new("taskset");
    one_core.args(["-c", "0", env!("CARGO_BIN_EXE_anchorage"), "train", "run.toml"]);
    one_core.args(["--set", "run.dir=again", "--set", "corpus.prepared=prepared_again"]);
    let output = one_core.current_dir(work.path("")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (run, again) = (work.path("run"), work.path("again"));
    assert_eq!(metrics(&run), metrics(&again));
    let last = |run: &std::path::Path| crate::support::files(&run.join("checkpoints/00000012"));
    assert!(last(&run) == last(&again), "the checkpoints differ");
}
