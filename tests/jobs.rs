//! Jobs of several processes on this machine: the bits of one, whoever is killed.

use std::fs;
use std::path::Path;
use std::process::Child;

use crate::shards::signal;
use crate::support::{Workdir, files, metrics};

/// Micro-batches enough for three workers.
const MICRO: [&str; 2] = ["--set", "train.micro_batch=2"];
/// A run long enough to be disturbed.
const LONG: [&str; 4] = ["--set", "train.micro_batch=2", "--set", "train.steps=60"];

fn up<'a>(shards: &'a str, workers: &'a str, dir: &'a str) -> Vec<&'a str> {
    vec!["up", "run.toml", "--shards", shards, "--workers", workers, "--set", dir]
}

/// The run in `dir` is that in `run`, to the bit, wherever its bank is.
fn assert_same(work: &Workdir, dir: &str, on_shards: bool) {
    assert!(metrics(&work.path("run")) == metrics(&work.path(dir)), "{dir}: other metrics");
    let checkpoints = |dir: &str| work.path(dir).join("checkpoints");
    let newest =
        fs::read_dir(checkpoints("run")).unwrap().map(|entry| entry.unwrap().file_name()).max().unwrap();
    let [expected, found] = ["run", dir].map(|dir| files(&checkpoints(dir).join(&newest)));
    for (path, bytes) in expected {
        let in_bank = path.starts_with("memory");
        if !(in_bank && on_shards) {
            assert!(found[&path] == bytes, "{dir}: {} differs", path.display());
        }
    }
    if on_shards {
        let (out, _) = work.ok(&["bank", "diff", "run", &format!("{dir}/bank/bank")]);
        for line in out.lines().skip(2) {
            let columns: Vec<&str> = line.split_whitespace().collect();
            assert_eq!((columns[1], columns[2], columns[4]), ("0", "0", "0"), "{out}");
            assert_ne!(columns[3], "0", "{out}");
        }
    }
}

/// The processes of a job that is up: of the shard or the worker `index`.
fn process_of(job: &Child, kind: &str, index: usize) -> u32 {
    let job = job.id();
    let children = fs::read_to_string(format!("/proc/{job}/task/{job}/children")).unwrap();
    let is_meant = |process: &&str| {
        let read = |what: &str| fs::read_to_string(format!("/proc/{process}/{what}")).unwrap_or_default();
        match kind {
            "shard" => read("cmdline").contains(&format!("\0--shard\0{index}\0")),
            _ => read("environ").split('\0').any(|variable| variable == format!("RANK={index}")),
        }
    };
    children.split_whitespace().find(is_meant).expect("a process of the job").parse().unwrap()
}

fn wait_for_lines(dir: &Path, n: usize) {
    while !fs::read_to_string(dir.join("metrics.jsonl")).is_ok_and(|text| text.lines().count() >= n) {
        std::thread::yield_now();
    }
}

#[test]
fn a_job_of_any_shape_is_the_run_of_one_process() {
    let work = Workdir::new();
    work.ok(&[&["train", "run.toml"], &MICRO[..]].concat());
    for (shards, workers) in [("0", "2"), ("0", "3"), ("1", "1"), ("1", "3"), ("3", "2")] {
        let dir = format!("run-{shards}-{workers}");
        let set = format!("run.dir={dir}");
        let (_, err) = work.ok(&[up(shards, workers, &set), MICRO.to_vec()].concat());
        assert!(err.contains("12 steps, loss "), "{err}");
        assert_same(&work, &dir, shards != "0");
        assert!(work.path(&dir).join("logs/worker-0.log").exists());
    }
    work.fails(&["up", "run.toml", "--workers", "0"], &["--workers: expected at least 1, found 0"]);
    let many = [up("0", "5", "run.dir=many"), MICRO.to_vec()].concat();
    work.fails(
        &many,
        &["worker ", "train.micro_batch: expected at most 1, so that each of 5 workers has one"],
    );
}

#[test]
fn a_job_goes_on_whoever_is_killed() {
    let work = Workdir::new();
    work.ok(&[&["train", "run.toml"], &LONG[..]].concat());
    for (i, (kind, index)) in
        [("shard", 1), ("worker", 1), ("worker", 0), ("shard", 0)].into_iter().enumerate()
    {
        let dir = format!("killed-{i}");
        let set = format!("run.dir={dir}");
        let job = work.command(&[up("2", "2", &set), LONG.to_vec()].concat()).spawn().unwrap();
        // Also before the first checkpoint.
        wait_for_lines(&work.path(&dir), 1 + 6 * i);
        signal(process_of(&job, kind, index), "-KILL");
        let output = job.wait_with_output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{kind} {index}: {err}");
        assert!(err.contains(&format!("{kind} {index} ended with signal 9 and is started again")), "{err}");
        assert_same(&work, &dir, true);
    }
}

#[test]
fn a_job_that_is_interrupted_saves_and_goes_on_in_another_shape() {
    let work = Workdir::new();
    work.ok(&[&["train", "run.toml"], &LONG[..]].concat());
    let begin = |workers| {
        let args = [up("1", workers, "run.dir=again"), LONG.to_vec()].concat();
        let job = work.command(&args).spawn().unwrap();
        job
    };
    let interrupt = |job: Child, what: &str| {
        signal(job.id(), what);
        let output = job.wait_with_output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(75), "{err}");
        assert!(err.contains("saved and stopped at step"), "{err}");
    };
    let job = begin("2");
    wait_for_lines(&work.path("again"), 5);
    interrupt(job, "-INT");
    let steps = || fs::read_dir(work.path("again/checkpoints")).unwrap().count();
    assert!(steps() > 0);
    let lines = metrics(&work.path("again")).len();
    let job = begin("3");
    wait_for_lines(&work.path("again"), lines + 5);
    interrupt(job, "-TERM");
    work.ok(&[up("2", "1", "run.dir=again"), LONG.to_vec()].concat());
    assert_same(&work, "again", true);
}
