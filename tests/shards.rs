//! A run whose memory bank is in shards of their own: real processes, which are killed and stopped.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Workdir, files, metrics};

/// A shard's process, killed when it is dropped.
pub(crate) struct Shard {
    child: Child,
    pub(crate) address: String,
}

impl Shard {
    /// Starts shard `index` of two that saves to `store`, and waits until it serves; `listen` may leave the
    /// port open.
    pub(crate) fn start(work: &Workdir, store: &str, index: usize, listen: &str) -> Self {
        let index = index.to_string();
        let args = ["shard", "run.toml", "--shard", &index, "--of", "2", "--listen", listen, "--log", "json"];
        let store = format!("shard.store.url={store}");
        let mut child =
            work.command(&[&args[..], &["--set", &store]].concat()).stdout(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let serving = lines.by_ref().map(Result::unwrap).find(|line| line.contains("\"serving\""));
        let serving: Value = serde_json::from_str(&serving.expect("the shard ended")).unwrap();
        // What it says later is read, so that it never waits for a reader.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address: serving["grpc"].as_str().unwrap().to_owned() }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        // A stopped process is killed too.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn two(work: &Workdir, store: &str) -> [Shard; 2] {
    [0, 1].map(|index| Shard::start(work, store, index, "127.0.0.1:0"))
}

pub(crate) fn signal(process: u32, signal: &str) {
    let status = Command::new("kill").args([signal, &process.to_string()]).status().unwrap();
    assert!(status.success());
}

/// Arguments that train the run in `dir` on shards.
pub(crate) fn train<'a>(dir: &'a str, shards: &'a str) -> [&'a str; 6] {
    ["train", "run.toml", "--set", dir, "--set", shards]
}

pub(crate) fn addresses(shards: &[Shard; 2]) -> String {
    format!("memory.shards=[{:?}, {:?}]", shards[0].address, shards[1].address)
}

/// The run in `dir` is that of `run`: metrics and anchor to the byte, and the bank of the store that of
/// the folder to the bit.
pub(crate) fn assert_same(work: &Workdir, dir: &str, bank: &str) {
    assert_eq!(metrics(&work.path("run")), metrics(&work.path(dir)));
    let last = |dir: &str| files(&work.path(dir).join("checkpoints/00000012"));
    let (expected, found) = (last("run"), last(dir));
    for name in ["anchor.safetensors", "optimizer.safetensors", "state.json", "DONE"] {
        assert!(expected[Path::new(name)] == found[Path::new(name)], "{name}: other bytes");
    }
    let (out, _) = work.ok(&["bank", "diff", "run", bank]);
    for line in out.lines().skip(2) {
        let columns: Vec<&str> = line.split_whitespace().collect();
        assert_eq!((columns[1], columns[2], columns[4]), ("0", "0", "0"), "{out}");
        assert_ne!(columns[3], "0", "{out}");
    }
}

fn wait_for_lines(work: &Workdir, dir: &str, n: usize) {
    let path = work.path(dir).join("metrics.jsonl");
    while !fs::read_to_string(&path).is_ok_and(|text| text.lines().count() >= n) {
        std::thread::yield_now();
    }
}

#[test]
fn a_run_on_shards_is_that_of_one_process() {
    let work = Workdir::new();
    work.ok(&["train", "run.toml"]);
    let shards = two(&work, "store");
    let text = addresses(&shards);
    work.ok(&train("run.dir=again", &text));
    assert_same(&work, "again", "store/bank");
    // The bank is at step 12; a run that begins needs one at its beginning.
    let message =
        "shard 0 of memory.shards: expected step 0 and nothing pushed, for a run that begins, found step 12";
    work.fails(&train("run.dir=third", &text), &[message]);
    // Nor is it its own the second time: the other run's checkpoints stay.
    work.fails(&train("run.dir=third", &text), &[message]);
    let (verified, _) = work.ok(&["bank", "verify", "store/bank/00000012"]);
    assert!(verified.contains("whole at step 12"), "{verified}");
    // Read from where it is stored, it tells the same.
    let losses = |args: &[&str]| -> (Value, String) {
        let (out, err) = work.ok(&[&["eval", "--json"], args].concat());
        let told: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
        (told["loss"].clone(), err)
    };
    let tiers = ["--set", "memory.placement.store=store", "--set", "memory.placement.ram_mib=64"];
    let (found, err) = losses(&[&["again"], &tiers[..]].concat());
    assert_eq!(found, losses(&["run"]).0);
    assert!(err.contains("memory of level 0: ") && err.contains(" % in RAM or on disk\n"), "{err}");
    let (out, _) = work.ok(&[&["generate", "again", "The"], &tiers[..]].concat());
    assert_eq!(out, work.ok(&["generate", "run", "The"]).0);
    let (out, _) = work.ok(&["bank", "inspect", "store/bank"]);
    assert!(out.contains("step 12,"), "{out}");
    work.ok(&["bank", "reshard", "store/bank", "--to", "other/bank", "--shards", "5"]);
    let (out, _) = work.ok(&["bank", "diff", "store/bank", "other/bank"]);
    assert!(out.starts_with("step 12 against step 12"), "{out}");
    work.ok(&["bank", "export", "other/bank", "bank.safetensors"]);
    let bytes = fs::read(work.path("bank.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.tensor("level0").unwrap().shape(), [5, 2, 3, 64, 32]);
    assert_eq!(tensors.tensor("level1").unwrap().shape(), [17, 2, 3, 32, 32]);
}

#[test]
fn a_shard_that_is_killed_costs_the_steps_since_the_last_checkpoint() {
    let work = Workdir::new();
    work.ok(&["train", "run.toml"]);
    let mut shards = two(&work, "store");
    let text = addresses(&shards);
    let args = train("run.dir=again", &text);
    let worker = work.command(&args).spawn().unwrap();
    wait_for_lines(&work, "again", 6);
    signal(shards[1].id(), "-KILL");
    let address = shards[1].address.clone();
    drop(std::mem::replace(&mut shards[1], Shard::start(&work, "store", 0, "127.0.0.1:0")));
    shards[1] = Shard::start(&work, "store", 1, &address);
    let output = worker.wait_with_output().unwrap();
    if !output.status.success() {
        // The replacement is at a checkpoint, and the worker is not: it says so and ends.
        crate::support::failure(&output, &["shard"]);
    }
    work.ok(&args);
    assert_same(&work, "again", "store/bank");
}

#[test]
fn a_shard_that_stops_for_a_while_is_waited_for() {
    let work = Workdir::new();
    work.ok(&["train", "run.toml"]);
    let shards = two(&work, "store");
    let text = addresses(&shards);
    let worker = work.command(&train("run.dir=again", &text)).spawn().unwrap();
    wait_for_lines(&work, "again", 2);
    signal(shards[0].id(), "-STOP");
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(500) {
        std::thread::yield_now();
    }
    signal(shards[0].id(), "-CONT");
    let output = worker.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_same(&work, "again", "store/bank");
}

#[test]
fn certificates_say_who_serves_and_who_trains() {
    let work = Workdir::new();
    work.ok(&["train", "run.toml"]);
    work.ok(&["certs", "ca", "certs"]);
    work.ok(&["certs", "issue", "certs", "--role", "shard", "--name", "s0", "--host", "127.0.0.1"]);
    work.ok(&["certs", "issue", "certs", "--role", "worker", "--name", "w0"]);
    work.ok(&["certs", "issue", "certs", "--role", "reader", "--name", "r0"]);
    let files = |name: &str| {
        format!("cert = \"certs/{name}.pem\"\nkey = \"certs/{name}.key\"\nca = \"certs/ca.pem\"\n")
    };
    let config = fs::read_to_string(work.path("run.toml")).unwrap();
    let with = |shard: &str, memory: &str| {
        let tls = format!("[shard.serve.tls]\n{}[memory.tls]\n{}", files(shard), files(memory));
        fs::write(work.path("run.toml"), format!("{config}\n{tls}")).unwrap();
    };

    with("w0", "w0");
    let start = ["shard", "run.toml", "--listen", "127.0.0.1:0"];
    work.fails(&start, &["certs/w0.pem: the server is ", "w0, expected a shard"]);
    with("s0", "r0");
    let shards = two(&work, "store");
    let text = addresses(&shards);
    work.fails(&train("run.dir=again", &text), &["PermissionDenied"]);
    with("s0", "w0");
    work.ok(&train("run.dir=again", &text));
    assert_same(&work, "again", "store/bank");
}
