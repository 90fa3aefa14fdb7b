//! Jobs of several processes on this machine: the bits of one, whoever is killed.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use serde_json::Value;

use crate::shards::signal;
use crate::support::{Workdir, files, metrics};

/// Between two looks at a job.
const LOOK: Duration = Duration::from_millis(5);
/// Micro-batches enough for three workers.
const MICRO: [&str; 2] = ["--set", "train.micro_batch=2"];
/// A run long enough to be disturbed.
const LONG: [&str; 4] = ["--set", "train.micro_batch=2", "--set", "train.steps=60"];

pub(crate) fn up<'a>(shards: &'a str, workers: &'a str, dir: &'a str) -> Vec<&'a str> {
    vec!["up", "run.toml", "--shards", shards, "--workers", workers, "--set", dir]
}

/// The run in `dir` is that in `run`, to the bit, wherever its bank is.
pub(crate) fn assert_same(work: &Workdir, dir: &str, on_shards: bool) {
    let [expected, found] = ["run", dir].map(|dir| metrics(&work.path(dir)));
    let other = expected.iter().zip(&found).find(|(expected, found)| expected != found);
    assert_eq!((other, found.len()), (None, expected.len()), "{dir}: other metrics");
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
pub(crate) fn process_of(job: &Child, kind: &str, index: usize) -> u32 {
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

pub(crate) fn wait_for_lines(job: &mut Child, dir: &Path, n: usize) {
    while !fs::read_to_string(dir.join("metrics.jsonl")).is_ok_and(|text| text.lines().count() >= n) {
        assert!(job.try_wait().unwrap().is_none(), "the job has ended before it had {n} lines");
        std::thread::park_timeout(LOOK);
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
    // Levels of which the workers keep copies show in no number either.
    for (i, (workers, levels)) in [("2", "[0]"), ("3", "[0, 1]"), ("1", "[1]")].into_iter().enumerate() {
        let (dir, levels) = (format!("copies-{i}"), format!("memory.replicated={levels}"));
        let set = format!("run.dir={dir}");
        work.ok(&[up("2", workers, &set), vec!["--set", &levels], MICRO.to_vec()].concat());
        assert_same(&work, &dir, true);
    }
    // The same gradients reach copies and shards, also rounded on their way.
    let rounded = ["--set", "memory.push_dtype=bf16"];
    work.ok(&[up("2", "2", "run.dir=sharded"), rounded.to_vec(), MICRO.to_vec()].concat());
    let copies = ["--set", "memory.replicated=[0, 1]"];
    work.ok(&[up("2", "2", "run.dir=copies"), rounded.to_vec(), copies.to_vec(), MICRO.to_vec()].concat());
    assert!(metrics(&work.path("sharded")) == metrics(&work.path("copies")));
    let (out, _) = work.ok(&["bank", "diff", "sharded/bank/bank", "copies/bank/bank"]);
    assert!(out.lines().skip(2).all(|line| line.split_whitespace().nth(4) == Some("0")), "{out}");
    // A run that is at its end is so for all workers.
    work.ok(&[up("2", "2", "run.dir=copies"), rounded.to_vec(), copies.to_vec(), MICRO.to_vec()].concat());
    work.ok(&[up("0", "3", "run.dir=run-0-3"), MICRO.to_vec()].concat());
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
        let mut job = work.command(&[up("2", "2", &set), LONG.to_vec()].concat()).spawn().unwrap();
        // Also before the first checkpoint.
        wait_for_lines(&mut job, &work.path(&dir), 1 + 6 * i);
        signal(process_of(&job, kind, index), "-KILL");
        let output = job.wait_with_output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{kind} {index}: {err}");
        assert!(err.contains(&format!("{kind} {index} ended with signal 9 and is started again")), "{err}");
        assert_same(&work, &dir, true);
    }
}

/// Rows on disk show in no number: not in a bank of one process, nor on a shard that goes back when a worker is
/// killed.
#[test]
fn a_bank_larger_than_the_memory_of_its_rows_is_the_one_in_memory() {
    let work = Workdir::new();
    // 5.7 MB of rows, of which a step may need 3.
    let sizes = ["--set", "memory.width=[64, 128]"];
    let rows = ["--set", r#"shard.offload={ dir = "rows", host_mib = 3 }"#];
    work.ok(&[&["train", "run.toml"], &sizes[..], &LONG[..]].concat());
    let own = ["train", "run.toml", "--set", "run.dir=own"];
    work.ok(&[&own[..], &sizes[..], &rows[..], &LONG[..]].concat());
    assert_same(&work, "own", false);
    let mut job = work
        .command(&[&up("1", "2", "run.dir=again")[..], &sizes[..], &rows[..], &LONG[..]].concat())
        .spawn()
        .unwrap();
    wait_for_lines(&mut job, &work.path("again"), 7);
    signal(process_of(&job, "worker", 1), "-KILL");
    let output = job.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_same(&work, "again", true);

    let small = ["train", "run.toml", "--set", "run.dir=small"];
    work.fails(
        &[&small[..], &sizes[..], &rows[..], &["--set", "shard.offload.host_mib=0"]].concat(),
        &["offload.host_mib is 0, expected at least ", " blocks of step 1"],
    );
    work.fails(
        &[&small[..], &sizes[..], &rows[..], &["--set", "shard.offload.dir=run.toml/rows"]].concat(),
        &["run.toml/rows: Not a directory"],
    );
    work.fails(
        &[&small[..], &rows[..1], &["shard.offload.dir=rows"]].concat(),
        &["missing field `host_mib`"],
    );
}

#[test]
fn a_job_that_is_interrupted_saves_and_goes_on_in_another_shape() {
    let work = Workdir::new();
    work.ok(&[&["train", "run.toml"], &LONG[..]].concat());
    let begin = |shards, workers| {
        let args = [up(shards, workers, "run.dir=again"), LONG.to_vec()].concat();
        work.command(&args).spawn().unwrap()
    };
    let interrupt = |job: Child, what: &str| {
        signal(job.id(), what);
        let output = job.wait_with_output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(75), "{err}");
        assert!(err.contains("saved and stopped at step"), "{err}");
    };
    let mut job = begin("1", "2");
    wait_for_lines(&mut job, &work.path("again"), 5);
    interrupt(job, "-INT");
    let steps = || fs::read_dir(work.path("again/checkpoints")).unwrap().count();
    assert!(steps() > 0);
    // Without shards, every worker with the whole bank, and with them again.
    for (shards, workers) in [("0", "2"), ("1", "3")] {
        let lines = metrics(&work.path("again")).len();
        let mut job = begin(shards, workers);
        wait_for_lines(&mut job, &work.path("again"), lines + 5);
        interrupt(job, "-TERM");
    }
    // Other shards, another worker and another placement: the checkpoint knows none of it.
    let copies = vec!["--set", "memory.replicated=[0]"];
    work.ok(&[up("2", "2", "run.dir=again"), copies, LONG.to_vec()].concat());
    assert_same(&work, "again", true);
}

/// The sizes that the paper gives (arXiv 2510.02375, tables of anchors and of memories), on any number of
/// machines; more of them move less each.
#[test]
fn the_papers_configurations_are_planned() {
    let work = Workdir::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let site = root.join("cluster/h100.toml").display().to_string();
    for (name, anchor, fetch, bank) in [
        ("160m", 163_510_016_u64, 18_063_360_u64, 4_624_220_160_u64),
        ("410m", 411_665_408, 49_545_216, 12_684_000_000),
        ("1.4b", 1_439_893_504, 153_354_240, 21_139_000_000),
    ] {
        let config = root.join(format!("configs/paper/{name}.toml")).display().to_string();
        let mut before = f64::INFINITY;
        for workers in ["8", "64", "512"] {
            let args =
                ["plan", &config, "--site", &site, "--workers", workers, "--shards", workers, "--json"];
            let (out, _) = work.ok(&args);
            let plan: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
            assert_eq!(plan["anchor_parameters"], anchor, "{name}");
            assert_eq!(plan["fetch_parameters"], fetch, "{name}");
            let found = plan["bank_parameters"].as_f64().unwrap();
            assert!((found / bank as f64 - 1.0).abs() < 1e-3, "{name}: {found}");
            let share = (plan["fetched_bytes"].as_f64().unwrap() + plan["pushed_bytes"].as_f64().unwrap())
                / plan["naive_bytes"].as_f64().unwrap();
            // The coarse levels are replicated (of the largest only the first: two are 116 GB with their
            // moments): a step moves a tenth of one path for each sequence, or less.
            let most = if (name, workers) == ("1.4b", "512") { 0.15 } else { 0.1 };
            assert!(share <= most, "{name} on {workers}: {share}");
            let step_s = plan["step_s"].as_f64().unwrap();
            assert!(step_s < before, "{name} on {workers}: {step_s} s, {before} s on fewer");
            before = step_s;
        }
    }
    work.fails(&["plan", "run.toml", "--site", "none.toml"], &["none.toml"]);
    work.fails(
        &["plan", "run.toml", "--site", &site, "--simulate", "5"],
        &["--simulate: expected a prepared corpus, found none in prepared"],
    );
}

/// What is planned is what a run moves: counted by the workers, within 5 %.
#[test]
fn a_plan_says_what_a_job_moves() {
    let work = Workdir::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let site = root.join("cluster/h100.toml").display().to_string();
    // Neither validates nor saves but at its end.
    let quiet = [
        "--set",
        "train.validate_sequences=2",
        "--set",
        "train.validate_every=0",
        "--set",
        "train.save_every=0",
    ];
    work.ok(&[up("2", "2", "run.dir=again"), LONG.to_vec(), quiet.to_vec()].concat());
    let moved = |what: &str| -> f64 {
        let of_worker = |rank: usize| {
            let log = fs::read_to_string(work.path(&format!("again/logs/worker-{rank}.log"))).unwrap();
            let line = log.lines().find(|line| line.contains("bytes of blocks fetched")).unwrap().to_owned();
            let words: Vec<&str> = line.split_whitespace().collect();
            let at = words.iter().position(|word| *word == what).unwrap();
            words[..at].iter().rev().find_map(|word| word.parse::<f64>().ok()).unwrap()
        };
        of_worker(0) + of_worker(1)
    };
    let plan = |more: &[&str]| -> Value {
        let args = [
            &["plan", "run.toml", "--site", &site, "--workers", "2", "--shards", "2", "--json"],
            &LONG[..],
            more,
        ]
        .concat();
        let (out, _) = work.ok(&args);
        serde_json::from_str(out.lines().last().unwrap()).unwrap()
    };
    let (simulated, expected) = (plan(&[&["--simulate", "60"], &quiet[..]].concat()), plan(&[]));
    for (key, what) in [("fetched_bytes", "fetched,"), ("pushed_bytes", "pushed,")] {
        let found = moved(what);
        for (name, plan, most) in [("simulated", &simulated, 0.05), ("expected", &expected, 0.15)] {
            let planned = 60.0 * plan[key].as_f64().unwrap();
            assert!((planned / found - 1.0).abs() < most, "{name} {key}: {planned} planned, {found} moved");
        }
    }
}

/// What policies that fetch less are planned to fetch is what runs of them fetch, with validations and saves.
#[test]
fn a_replay_says_what_runs_with_a_cache_and_with_copies_fetch() {
    let work = Workdir::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let site = root.join("cluster/h100.toml").display().to_string();
    // Some blocks fill a cache of a MiB.
    let busy = ["train.validate_every=3", "train.validate_sequences=32", "memory.width=[512,256]"];
    let busy = busy.map(|setting| ["--set", setting]).concat();
    work.ok(&[&["train", "run.toml"], &LONG[..], &busy].concat());
    let plan = |setting: &str| -> Value {
        let args = ["plan", "run.toml", "--site", &site, "--workers", "2", "--shards", "2", "--json"];
        let simulate = ["--simulate", "60", "--cache-mib", "1", "--set", setting];
        let (out, _) = work.ok(&[&args[..], &LONG, &busy, &simulate].concat());
        serde_json::from_str(out.lines().last().unwrap()).unwrap()
    };
    let settings =
        ["memory.cache_mib=0", "memory.cache_mib=1", "memory.cache_mib=256", "memory.replicated=[0]"];
    let mut all = vec![];
    for setting in settings {
        let (dir, own) = (format!("run.dir=run{}", all.len()), ["--set", setting]);
        work.ok(&[&up("2", "2", &dir)[..], &LONG, &busy, &own].concat());
        // Whatever is kept, the run is the same.
        assert_same(&work, &dir["run.dir=".len()..], true);
        let of_worker = |rank: usize| -> [u64; 2] {
            let path = work.path(&dir["run.dir=".len()..]).join(format!("logs/worker-{rank}.log"));
            let log = fs::read_to_string(path).unwrap();
            let (_, line) = log.rsplit_once(&format!("worker {rank}: ")).unwrap();
            let number = |text: &str| text.split_whitespace().next().unwrap().parse().unwrap();
            let unchanged = line.split_once("tried again; ").unwrap().1;
            [number(line), number(unchanged)]
        };
        let [[a, b], [c, d]] = [of_worker(0), of_worker(1)];
        let plan = plan(setting);
        let own = &plan["replayed"][0];
        for (key, found) in [("fetched_bytes", a + c), ("unchanged_bytes", b + d)] {
            let planned = own[key].as_f64().unwrap();
            let share = (planned - found as f64).abs() / (found as f64).max(1.0);
            assert!(share < 0.05, "{setting} {key}: {planned} planned, {found} moved");
        }
        // The first worker's lines add up to what it says in the end.
        let text = fs::read_to_string(work.path(&dir["run.dir=".len()..]).join("metrics.jsonl")).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let sum = |key: &str| lines.iter().map(|line| line["traffic"][key].as_u64().unwrap()).sum::<u64>();
        assert_eq!([sum("fetched_bytes"), sum("unchanged_bytes")], [a, b], "{setting}");
        all.push((a + c, own.clone()));
    }
    assert!(all[2].0 < all[1].0 && all[1].0 < all[0].0 && all[3].0 < all[2].0, "{all:?}");
    let rates = all[2].1["levels"].as_array().unwrap();
    assert!(rates.iter().all(|level| level["hit_rate"].as_f64() > Some(0.05)), "{rates:?}");
}

/// What a job tells while it runs, in the files that `top` shows and at the workers' endpoints, is what it does.
#[test]
fn a_job_tells_how_it_is() {
    let work = Workdir::new();
    let settings = ["--set", "observe.listen=127.0.0.1:0", "--set", "observe.peak_tflops=0.5"];
    let args = [up("2", "2", "run.dir=again"), LONG.to_vec(), settings.to_vec()].concat();
    let mut job = work.command(&args).spawn().unwrap();
    wait_for_lines(&mut job, &work.path("again"), 8);
    // While it is asked, the job waits for the one that is not.
    signal(process_of(&job, "worker", 0), "-STOP");
    let log = |rank: usize| fs::read_to_string(work.path(&format!("again/logs/worker-{rank}.log"))).unwrap();
    let ask = |rank: usize, path: &str| {
        let log = log(rank);
        let address = log.split("http://").nth(1).unwrap().split('/').next().unwrap();
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        text.split_once("\r\n\r\n").unwrap().1.to_owned()
    };
    let status: Value = serde_json::from_str(&ask(1, "/status")).unwrap();
    assert_eq!(
        (&status["rank"], &status["world_size"], &status["steps"]),
        (&1.into(), &2.into(), &60.into())
    );
    for key in ["mfu", "tokens_per_s", "seconds_left"] {
        assert!(status[key].as_f64() > Some(0.0), "{key} {status}");
    }
    let text = ask(1, "/metrics");
    for name in ["step", "loss", "mfu_ratio", "goodput_ratio", "tokens_seen", "rollbacks_total"] {
        assert!(text.contains(&format!("anchorage_worker_{name}{{rank=\"1\"}} ")), "{name}\n{text}");
    }
    assert!(text.contains("anchorage_worker_spent_seconds_total{rank=\"1\",cause=\"fetch\"} "), "{text}");
    signal(process_of(&job, "worker", 1), "-STOP");
    signal(process_of(&job, "worker", 0), "-CONT");
    // The first one asks the shards, once a second.
    let has_shards = || {
        let status: Value = serde_json::from_str(&ask(0, "/status")).unwrap();
        let shards = status["shards"].as_array().unwrap();
        shards.len() == 2 && shards.iter().all(|shard| shard["applied"].as_u64() > Some(0))
    };
    while !has_shards() {
        assert!(job.try_wait().unwrap().is_none(), "the job has ended");
        std::thread::park_timeout(LOOK);
    }
    signal(process_of(&job, "worker", 1), "-KILL");
    assert!(job.wait().unwrap().success());

    let (out, _) = work.ok(&["top", "again", "--json"]);
    let workers: Vec<Value> = serde_json::from_str(&out).unwrap();
    let last = metrics(&work.path("again")).pop().unwrap();
    for (rank, worker) in workers.iter().enumerate() {
        assert_eq!((&worker["rank"], &worker["state"]), (&rank.into(), &"done".into()));
        for key in ["step", "tokens_seen", "loss", "validation_loss", "gradient_norm"] {
            assert_eq!(worker[key], last[key], "{key}");
        }
        let goodput = worker["goodput"].as_f64().unwrap();
        assert!(goodput > 0.0 && goodput < 1.0, "{worker}");
        assert_eq!(worker["checkpoint"], 60);
        let spent = worker["spent"].as_object().unwrap();
        let total: f64 = spent.values().map(|ms| ms.as_f64().unwrap()).sum();
        let seconds = worker["seconds"].as_f64().unwrap();
        assert!(total > 0.0 && total / 1e3 < seconds, "{worker}");
    }
    assert_eq!(workers.len(), 2);
    let log = log(1);
    let (_, line) = log.rsplit_once("worker 1: ").unwrap();
    assert!(line.starts_with(&format!("{} bytes of blocks fetched", workers[1]["fetched_bytes"])), "{line}");
    assert!(workers[0]["fetched_bytes"].as_u64() > workers[1]["fetched_bytes"].as_u64());
    // The second one is another process since then.
    assert_eq!((&workers[0]["rollbacks"], &workers[1]["rollbacks"]), (&1.into(), &0.into()));
    assert_eq!(workers[0]["shards"].as_array().unwrap().len(), 2);
    let (out, _) = work.ok(&["top", "again"]);
    assert!(out.starts_with("again: step 60 of 60 (100.0 %), loss "), "{out}");
    work.fails(
        &["top", "none"],
        &["none/status: expected what workers tell while they train, found nothing"],
    );
}

/// One that does not answer may still be at work: it is called late, waited for, and nobody takes its place.
#[test]
fn a_worker_that_stops_for_a_while_comes_back_to_the_others() {
    let work = Workdir::new();
    work.ok(&[&["train", "run.toml"], &LONG[..]].concat());
    // On a busy machine a second may pass at any time.
    let patience = vec!["--set", "collective.patience_s=1", "--set", "collective.retries=1000"];
    let args = [up("1", "2", "run.dir=again"), LONG.to_vec(), patience].concat();
    let mut job = work.command(&args).spawn().unwrap();
    wait_for_lines(&mut job, &work.path("again"), 6);
    let stopped = process_of(&job, "worker", 1);
    signal(stopped, "-STOP");
    let log = work.path("again/logs/worker-0.log");
    // It may have been late before, or the first one, on a busy machine.
    while !fs::read_to_string(&log).unwrap().contains("has waited 1 s for it in") {
        if let Some(status) = job.try_wait().unwrap() {
            panic!("the job has ended: {status}, {}", fs::read_to_string(&log).unwrap());
        }
        std::thread::park_timeout(LOOK);
    }
    signal(stopped, "-CONT");
    let output = job.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{err}");
    assert!(!err.contains("started again"), "{err}");
    assert_same(&work, "again", true);
}
