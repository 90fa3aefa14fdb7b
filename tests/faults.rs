//! Jobs that a network or a scheduler does not treat well: certificates, and two jobs of one run.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Child;

use crate::jobs::{assert_same, process_of, up, wait_for_lines};
use crate::shards::{addresses, signal, two};
use crate::support::{Workdir, failure, files, half_written};

/// Makes an authority in `certs/` and certificates of these roles; each as the configuration names it.
fn issue(work: &Workdir, roles: &[&str; 2]) -> [String; 2] {
    work.ok(&["certs", "ca", "certs"]);
    roles.map(|role| {
        work.ok(&["certs", "issue", "certs", "--role", role, "--name", role, "--host", "127.0.0.1"]);
        format!("{{cert = \"certs/{role}.pem\", key = \"certs/{role}.key\", ca = \"certs/ca.pem\"}}")
    })
}

#[test]
fn workers_with_certificates_train_the_run_of_one_process() {
    let work = Workdir::new();
    work.ok(&["train", "run.toml", "--set", "train.micro_batch=2"]);
    let tls = issue(&work, &["worker", "shard"]).map(|files| format!("collective.tls={files}"));
    let settings = |tls| ["--set", "train.micro_batch=2", "--set", tls];
    for (shards, workers, dir) in [("0", "3", "run.dir=whole"), ("2", "2", "run.dir=sharded")] {
        work.ok(&[&up(shards, workers, dir)[..], &settings(&tls[0])].concat());
    }
    assert_same(&work, "whole", false);
    assert_same(&work, "sharded", true);
    let reason = "collective.tls: certs/shard.pem: the certificate is that of shard/shard, expected a worker";
    work.fails(&[&up("0", "2", "run.dir=wrong")[..], &settings(&tls[1])].concat(), &[reason]);
    assert!(!work.path("wrong/metrics.jsonl").exists());
}

#[test]
fn workers_that_meet_where_others_come_need_certificates() {
    let work = Workdir::new();
    let begin = |more: &[&str]| {
        let mut command = work.command(&[&["train", "run.toml"], more].concat());
        command.envs([("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "192.0.2.1")]);
        command.output().unwrap()
    };
    let reason =
        "collective.tls: expected certificates (or collective.insecure = true), since 192.0.2.1:29500";
    failure(&begin(&[]), &[reason, "found nothing"]);
    // Nobody has that address (RFC 5737), but now it is tried.
    let settings = ["--set", "collective.insecure=true", "--set", "collective.join_s=1"];
    failure(&begin(&settings), &["rank 1 cannot join the job at 192.0.2.1:29500: waited 1 s"]);
    assert!(!work.path("run").exists());
}

/// Processes of a job, its launcher first.
fn processes(job: &Child) -> Vec<u32> {
    let id = job.id();
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    [id].into_iter().chain(children.split_whitespace().map(|child| child.parse().unwrap())).collect()
}

/// What a run's folder holds but for logs and how workers are, which is each one's own word.
fn of_run(work: &Workdir) -> BTreeMap<PathBuf, Vec<u8>> {
    let is_own = |path: &Path| ["logs", "status", "tb"].iter().any(|name| path.starts_with(name));
    files(&work.path("again")).into_iter().filter(|(path, _)| !is_own(path)).collect()
}

/// Begins a job, holds it still once it has `lines` lines, as on a host that is cut off, lets the same job
/// train the run to its end, and lets the first one go on.
fn take_over(work: &Workdir, args: &[&str], (lines, on_shards): (usize, bool)) {
    let mut first = work.command(args).spawn().unwrap();
    wait_for_lines(&mut first, &work.path("again"), lines);
    let held = processes(&first);
    held.iter().for_each(|&process| signal(process, "-STOP"));
    // Where the second one is, the lock of the first is not seen.
    fs::remove_file(work.path("again/.lock")).unwrap();
    work.ok(args);
    assert_same(work, "again", on_shards);
    let before = of_run(work);
    held.iter().for_each(|&process| signal(process, "-CONT"));
    let output = first.wait_with_output().unwrap();
    failure(&output, &["again: attempt ", " was taken over by attempt "]);
    let after = of_run(work);
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>(), "{args:?}");
    let changed = before.iter().find(|(path, bytes)| after[*path] != **bytes);
    assert!(changed.is_none(), "{args:?}: {}", changed.unwrap().0.display());
    assert!(half_written(&work.path("again")).is_empty());
}

/// A job that was given up and started again elsewhere is not dead: it goes on when the cut heals. Then it
/// ends, and nothing of the second one's is touched.
#[test]
fn a_job_that_was_taken_over_ends_and_leaves_the_other_ones_bytes() {
    let work = Workdir::new();
    // In the file, since shards that are started by themselves read it too.
    let config = fs::read_to_string(work.path("run.toml")).unwrap();
    let config = config.replace("steps = 12", "steps = 60").replace("micro_batch = 4", "micro_batch = 2");
    fs::write(work.path("run.toml"), config).unwrap();
    work.ok(&["train", "run.toml"]);
    let alone = ["train", "run.toml", "--set", "run.dir=again"];
    take_over(&work, &alone, (5, false));
    for (shards, lines) in [("0", 9), ("2", 14)] {
        fs::remove_dir_all(work.path("again")).unwrap();
        take_over(&work, &up(shards, "2", "run.dir=again"), (lines, shards != "0"));
    }
    // Shards that both use.
    fs::remove_dir_all(work.path("again")).unwrap();
    let shards = two(&work, "again/bank");
    let shards = addresses(&shards);
    let store = ["--set", "shard.store.url=again/bank", "--set", &shards];
    take_over(&work, &[&alone[..], &store].concat(), (17, true));
}

/// Each worker and each shard may fail as often as `collective.retries` says: others do not use that up.
#[test]
fn who_fails_uses_up_what_it_is_allowed_and_nobody_elses() {
    let work = Workdir::new();
    // No checkpoint forgives.
    let settings = ["train.steps=60", "train.micro_batch=2", "train.save_every=0", "collective.retries=1"];
    let settings = settings.map(|setting| ["--set", setting]).concat();
    work.ok(&[&["train", "run.toml"], &settings[..]].concat());
    for (killed, is_last_straw) in
        [(&[("shard", 1), ("worker", 1), ("shard", 0)][..], false), (&[("worker", 1); 2], true)]
    {
        let mut job =
            work.command(&[&up("2", "2", "run.dir=again")[..], &settings].concat()).spawn().unwrap();
        let mut before = None;
        for &(kind, index) in killed {
            // Each attempt has a file of its own.
            let metrics = || fs::metadata(work.path("again/metrics.jsonl")).ok().map(|file| file.ino());
            while metrics() == before {
                assert!(job.try_wait().unwrap().is_none(), "the job has ended");
                std::thread::yield_now();
            }
            before = metrics();
            wait_for_lines(&mut job, &work.path("again"), 3);
            signal(process_of(&job, kind, index), "-KILL");
        }
        let output = job.wait_with_output().unwrap();
        if is_last_straw {
            // The launcher sees it, and so do the others: who is first says so.
            let launcher = "worker 1 ended with signal 9 once more, started again 1 times without progress";
            let other = "rank 1 failed 2 times since step 0, more than collective.retries allows";
            let error = failure(&output, &[]);
            assert!(error.contains(launcher) || error.contains(other), "{error}");
        } else {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            assert_same(&work, "again", true);
        }
        fs::remove_dir_all(work.path("again")).unwrap();
    }
}
