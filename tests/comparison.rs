//! The quickstart and the controls of an evaluation.

use std::fs;

use serde_json::Value;

use crate::support::Workdir;

/// The sizes of `support::CONFIG` for the runs of the quickstart.
const SMALL: [&str; 20] = [
    "corpus.vocab_size=320",
    "corpus.tokenizer_sample_mib=1",
    "corpus.window=64",
    "corpus.seq_len=64",
    "embed.dim=64",
    "tree.branching=[4, 4]",
    "anchor.d_model=32",
    "anchor.n_layers=2",
    "anchor.n_heads=2",
    "anchor.head_width=16",
    "anchor.ffn_width=64",
    "anchor.max_seq_len=128",
    "memory.width=[64, 32]",
    "train.steps=6",
    "train.batch_size=8",
    "train.micro_batch=4",
    "train.warmup_steps=2",
    "eval.questions_per_bucket=2",
    "eval.batch=8",
    "eval.max_answer_tokens=4",
];

fn quickstart(work: &Workdir, more: &[&str]) -> (Value, String) {
    let sets = SMALL.iter().flat_map(|setting| ["--set", setting]);
    let args: Vec<&str> =
        ["quickstart", "--dir", "q", "--json"].into_iter().chain(sets).chain(more.iter().copied()).collect();
    let (out, err) = work.ok(&args);
    (serde_json::from_str(out.lines().last().unwrap()).unwrap(), out + &err)
}

#[test]
fn quickstart_ends_with_every_figure_and_repeats() {
    let work = Workdir::new();
    fs::create_dir_all(work.path("q/seed1")).unwrap();
    fs::rename(work.path("facts"), work.path("q/seed1/data")).unwrap();
    let (summary, text) = quickstart(&work, &[]);
    for memory in ["none", "generic", "always_on", "fetched", "random"] {
        let loss = summary["loss"][memory].as_f64().unwrap();
        let [low, high] = [0, 1].map(|i| summary["intervals"]["loss"][memory][i].as_f64().unwrap());
        assert!(
            low <= loss && loss <= high && (0.0..10.0).contains(&low),
            "{memory}: {loss} [{low}, {high}]"
        );
        assert_eq!(summary["exact_match"][memory].as_array().unwrap().len(), 5);
        assert!(text.contains(&format!("\n{memory} ")), "no row {memory} in\n{text}");
    }
    let equal =
        |key: &str, a: &str, b: &str| assert_eq!(summary[key][a], summary[key][b], "{key} of {a}, {b}");
    equal("parameters", "always_on", "fetched");
    equal("tokens", "none", "fetched");
    equal("tokens", "always_on", "fetched");
    let loss = |memory: &str| summary["loss"][memory].as_f64().unwrap();
    let difference = summary["loss_difference"]["fetched - always_on"][0].as_f64().unwrap();
    assert!((difference - (loss("fetched") - loss("always_on"))).abs() < 1e-9, "{difference}");

    let page = fs::read_to_string(work.path("q/seed1/memory/report.html")).unwrap();
    for part in ["Held-out text", "Recall by frequency", "Recall in a new wording", "always-on", "<svg"] {
        assert!(page.contains(part), "no {part} on the page");
    }

    let (again, text) = quickstart(&work, &[]);
    assert_eq!(text.matches("trained already").count(), 4, "{text}");
    for key in ["loss", "exact_match", "exact_match_held_out", "intervals", "choice", "purity_by_level"] {
        assert_eq!(summary[key], again[key], "{key}");
    }
    let refused = ["quickstart", "--dir", "q", "--set", "train.seed=3"];
    work.fails(&refused, &["--set train.seed: expected a key that --dir, --seed and --seeds do not decide"]);
}

#[test]
fn a_control_is_what_it_is_named_for() {
    let work = Workdir::new();
    work.ok(&["train", "run.toml"]);
    let eval = |setting: &str| ["eval", "run", "--set", setting].map(str::to_owned);
    let fails = |setting: &str, parts: &[&str]| {
        work.fails(&eval(setting).each_ref().map(String::as_str), parts);
    };
    fails("eval.none=run", &["eval.none: run: expected train.phase = \"anchor\", found Joint, Fetched"]);
    fails("eval.always_on=run", &["eval.always_on: run: expected train.assign = \"always_on\""]);
    fails("eval.none=nowhere", &["eval.none", "nowhere: expected a run folder"]);
    fails("train.steps=3", &["expected a key of [eval]"]);

    let none = ["train", "run.toml", "--set", "run.dir=none", "--set", "train.phase=anchor"];
    let other = [&none[..], &["--set", "corpus.prepared=other", "--set", "tree.seed=2"]].concat();
    work.ok(&other);
    fails("eval.none=none", &["eval.none: none is of another corpus", "the corpus differs in tree"]);
    fs::remove_dir_all(work.path("none")).unwrap();
    work.ok(&none);
    let (table, _) = work.ok(&eval("eval.none=none").each_ref().map(String::as_str));
    assert!(!table.contains("its memory taken away"), "{table}");
    assert!(work.ok(&["eval", "run"]).0.contains("none: this run's anchor with its memory taken away"));

    // What is only reported may change after the training, and stays.
    work.ok(&["train", "run.toml", "--set", "eval.none=none"]);
    assert!(!work.ok(&["eval", "run"]).0.contains("its memory taken away"));
}
