//! The program is killed (SIGKILL) at its worst moments; the same command then ends with the same bytes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{Workdir, checkpoints, files, half_written, metrics};

/// Runs the command and kills it as soon as `now` holds. Whether it was still at work then.
pub(crate) fn killed(work: &Workdir, args: &[&str], mut now: impl FnMut() -> bool) -> bool {
    let mut child = work.command(args).spawn().unwrap();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{args:?}: {status}");
            return false;
        }
        if now() {
            child.kill().unwrap();
            return child.wait().unwrap().code().is_none();
        }
        std::thread::yield_now();
    }
}

/// What a run leaves, the clock aside.
fn outcome(run: &Path) -> (Vec<serde_json::Value>, BTreeMap<PathBuf, Vec<u8>>) {
    let last = run.join("checkpoints/00000012");
    let files = files(&last);
    for name in ["anchor.safetensors", "optimizer.safetensors", "memory/values.safetensors", "DONE"] {
        assert!(files.contains_key(Path::new(name)), "{}: no {name}", last.display());
    }
    (metrics(run), files)
}

fn assert_same_files(expected: &BTreeMap<PathBuf, Vec<u8>>, found: &BTreeMap<PathBuf, Vec<u8>>) {
    assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
    for (name, bytes) in expected {
        assert!(found[name] == *bytes, "{}: other bytes", name.display());
    }
}

fn assert_same(whole: &Path, resumed: &Path) {
    let (expected, found) = (outcome(whole), outcome(resumed));
    assert_eq!(expected.0, found.0);
    assert_same_files(&expected.1, &found.1);
    assert!(half_written(resumed).is_empty(), "{:?}", half_written(resumed));
}

#[test]
fn prepare_goes_on_after_each_kill() {
    let work = Workdir::new();
    work.ok(&["prepare", "run.toml"]);
    let args = ["prepare", "run.toml", "--set", "corpus.prepared=again"];
    let again = work.path("again");
    let mut n_killed = 0;
    // Each is the first sign of the next piece of work.
    let signs =
        ["tokenizer.json", "tokens.bin.tmp", "tokens.bin", "embedder.safetensors", "tree.safetensors"];
    for sign in signs {
        let sign = again.join(sign);
        n_killed += usize::from(killed(&work, &args, || sign.exists()));
    }
    assert!(n_killed >= 2, "only {n_killed} of {} kills came in time", signs.len());
    work.ok(&args);
    let (mut expected, mut found) = (files(&work.path("prepared")), files(&again));
    for files in [&mut expected, &mut found] {
        assert!(files.remove(Path::new(".lock")).is_some());
    }
    assert_same_files(&expected, &found);
}

#[test]
fn training_goes_on_to_the_same_bytes_after_a_kill_between_checkpoints() {
    let work = Workdir::new();
    work.ok(&["train", "run.toml"]);
    let args = ["train", "run.toml", "--set", "run.dir=again"];
    let again = work.path("again");
    // Past a checkpoint (4 or 8), so that lines and steps after it are done twice.
    let after = |n: usize| {
        let path = again.join("metrics.jsonl");
        move || fs::read_to_string(&path).is_ok_and(|text| text.lines().count() >= n)
    };
    let n_killed = [2, 6, 10].into_iter().filter(|&n| killed(&work, &args, after(n))).count();
    assert!(n_killed >= 1, "no kill came in time");
    work.ok(&args);
    assert_same(&work.path("run"), &again);
}

#[test]
fn a_kill_within_a_checkpoint_leaves_one_that_does_not_count() {
    let work = Workdir::new();
    work.ok(&["train", "run.toml"]);
    let args = ["train", "run.toml", "--set", "run.dir=again"];
    let again = work.path("again");
    // What is being written is in the folder of its attempt.
    let torn = || {
        let Ok(attempts) = fs::read_dir(again.join("attempts")) else { return false };
        attempts.flatten().any(|attempt| fs::read_dir(attempt.path()).is_ok_and(|saves| saves.count() > 0))
    };
    // The moment is short: a run whose kill came late begins anew.
    let caught = (0..50).any(|_| {
        if again.exists() {
            fs::remove_dir_all(&again).unwrap();
        }
        killed(&work, &args, torn) && torn()
    });
    assert!(caught, "no kill came within a checkpoint");
    if !checkpoints(&again).values().any(|whole| *whole) {
        work.fails(&["eval", "again"], &["again/checkpoints: no whole checkpoint"]);
    }
    work.ok(&args);
    assert_same(&work.path("run"), &again);
    assert!(!torn(), "what the killed one left is removed");
}
