//! Jobs that each train a subtree of the bank and know nothing of each other.

use std::fs;

use crate::support::{Workdir, files};

const FROZEN: [&str; 6] =
    ["--set", "train.phase=frozen", "--set", "anchor.init=anchor", "--set", "train.batch_size=16"];

fn with_anchor() -> Workdir {
    let work = Workdir::new();
    work.ok(&["train", "run.toml", "--set", "run.dir=anchor", "--set", "train.phase=anchor"]);
    work
}

fn merge<'a>(from: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [&["merge", "run.toml", "--set", "run.dir=merged"], &FROZEN[..], more, &["--from"], from].concat()
}

/// Together they are the run of one process, to the byte.
#[test]
fn jobs_of_subtrees_make_the_run_of_one_process() {
    let work = with_anchor();
    work.ok(&[&["train", "run.toml"], &FROZEN[..]].concat());
    let dirs: Vec<String> = ["0", "1", "2", "3", "generic"]
        .into_iter()
        .map(|subtree| {
            let dir = format!("part-{subtree}");
            let (set_dir, set) = (format!("run.dir={dir}"), format!("train.subtree={subtree}"));
            let command: &[&str] = match subtree {
                "1" => &["up", "run.toml", "--workers", "3"],
                _ => &["train", "run.toml"],
            };
            work.ok(&[command, &["--set", &set_dir, "--set", &set], &FROZEN].concat());
            dir
        })
        .collect();
    let dirs: Vec<&str> = dirs.iter().map(String::as_str).collect();
    let twice = [&dirs[..], &["part-2"]].concat();
    for (from, more, expected) in [
        (&dirs[..3], &[][..], "expected a job of every subtree, found none of 3, generic"),
        (&twice, &[], "train.subtree = 2: expected one job, found two"),
        (&["run"], &[], "run/config.toml: expected train.subtree, found a run of all"),
        (&dirs, &["--set", "train.seed=2"], "train.seed: expected 2 as in the whole run, found 1"),
        (&dirs, &["--set", "train.subtree=1"], "train.subtree: expected none"),
    ] {
        work.fails(&merge(from, more), &[expected]);
        assert!(!work.path("merged").exists());
    }
    let (out, _) = work.ok(&merge(&dirs, &[]));
    assert!(out.starts_with("merged: step 12, "), "{out}");
    let [expected, found] = ["run", "merged"].map(|dir| files(&work.path(dir).join("checkpoints/00000012")));
    assert!(expected.keys().eq(found.keys()), "{:?} {:?}", expected.keys(), found.keys());
    for (path, bytes) in expected {
        assert!(found[&path] == bytes, "{} differs", path.display());
    }
    assert!(!work.path("merged/merge.tmp").exists());
    // It is a run like any other.
    work.ok(&["eval", "merged"]);
    work.fails(&merge(&dirs, &[]), &["merged: expected a run that has not begun, found one at step 12"]);
    // The jobs' own losses and tokens are those of their parts.
    let tokens = |dir: &str| -> u64 {
        let text = fs::read_to_string(work.path(dir).join("checkpoints/00000012/state.json")).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["tokens_seen"].as_u64().unwrap()
    };
    assert!(dirs.iter().all(|dir| tokens(dir) > 0 && tokens(dir) < tokens("run")));
}

#[test]
fn a_subtree_is_one_of_a_frozen_run() {
    let work = Workdir::new();
    work.fails(
        &["train", "run.toml", "--set", "train.subtree=1"],
        &["subtree", "none, unless train.phase is \"frozen\""],
    );
    let frozen = [&["train", "run.toml"], &FROZEN[..]].concat();
    work.fails(
        &[&frozen[..], &["--set", "train.subtree=4"]].concat(),
        &["train.subtree: expected a cluster below 4 (tree.branching) or \"generic\", found 4"],
    );
    work.fails(&[&frozen[..], &["--set", "train.subtree=leaf"]].concat(), &["train.subtree=leaf"]);
}

/// Which data a run meets is decided by its configuration alone, and not by who computes what.
#[test]
fn sequences_of_a_window_are_dealt_out_the_same_for_any_number_of_workers() {
    let work = Workdir::new();
    let local = ["--set", "train.locality_window=3", "--set", "train.micro_batch=2"];
    work.ok(&[&["train", "run.toml"], &local[..]].concat());
    let up = ["up", "run.toml", "--workers", "3", "--shards", "2", "--set", "run.dir=again"];
    work.ok(&[&up[..], &local].concat());
    crate::jobs::assert_same(&work, "again", true);
    work.fails(
        &["train", "run.toml", "--set", "train.locality_window=0"],
        &["locality_window", "at least 1", "0"],
    );
}
