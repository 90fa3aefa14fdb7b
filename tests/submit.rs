//! Runs as jobs of Slurm, as far as it goes without one: the script, the run's folder, and what is asked of Slurm's
//! programs, of which shell scripts take the place. `tests/slurm/run` has a real one.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::support::Workdir;

const SITE: &str = r#"[slurm]
time = "01:00:00"
lead_s = 60
ports = [20000, 29999]

[slurm.worker]
per_node = 4
cpus = 2
gpus = 1

[slurm.shard]
per_node = 2
cpus = 1
"#;

/// A corpus, a site, and programs of Slurm that note how they were called in `calls` and answer from `answers/`.
fn workdir() -> Workdir {
    let mut work = Workdir::new();
    fs::write(work.path("site.toml"), SITE).unwrap();
    fs::create_dir(work.path("bin")).unwrap();
    fs::create_dir(work.path("answers")).unwrap();
    let folder = work.path("").display().to_string();
    for program in ["sbatch", "scontrol", "scancel"] {
        let path = work.path("bin").join(program);
        let script = format!(
            "#!/bin/sh\necho {program} \"$@\" in \"$PWD\" >> {folder}/calls\n\
             if [ -e {folder}/answers/{program}.error ]; then cat {folder}/answers/{program}.error >&2; exit 1; fi\n\
             cat {folder}/answers/{program} 2>/dev/null; exit 0\n"
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let path = format!("{}:{}", work.path("bin").display(), std::env::var("PATH").unwrap());
    work.environment.push(("PATH", path));
    answer(&work, "sbatch", "12\n");
    work
}

fn answer(work: &Workdir, program: &str, text: &str) {
    fs::write(work.path("answers").join(program), text).unwrap();
}

fn calls(work: &Workdir) -> Vec<String> {
    let text = fs::read_to_string(work.path("calls")).unwrap_or_default();
    let _ = fs::remove_file(work.path("calls"));
    text.lines().map(|line| line.split(" in ").next().unwrap().to_owned()).collect()
}

const SUBMIT: [&str; 10] = [
    "submit",
    "run.toml",
    "--site",
    "site.toml",
    "--workers",
    "2",
    "--set",
    "train.micro_batch=2",
    "--set",
    "collective.insecure=true",
];
const SHARDS: [&str; 4] = ["--shards", "2", "--set", "shard.serve.insecure=true"];

#[test]
fn a_run_is_submitted_once_and_asked_after() {
    let work = workdir();
    let all = [&SUBMIT[..], &SHARDS].concat();
    let (script, _) = work.ok(&[&all[..], &["--dry-run"]].concat());
    assert!(!work.path("run").exists() && calls(&work).is_empty());
    let syntax = Command::new("bash").args(["-n", "-c", &script]).output().unwrap();
    assert!(syntax.status.success(), "{}", String::from_utf8_lossy(&syntax.stderr));

    assert_eq!(work.ok(&all).0, "12\n");
    let run = work.path("run").canonicalize().unwrap();
    let noted = fs::read_to_string(work.path("calls")).unwrap();
    assert_eq!(noted, format!("sbatch --parsable {0}/job/script.sh in {0}\n", run.display()));
    calls(&work);
    assert_eq!(fs::read_to_string(run.join("job/script.sh")).unwrap(), script);
    assert!(run.join("logs").is_dir(), "Slurm opens the log");
    // What all processes of the job read, however often it starts.
    let (printed, _) = work.ok(&["config", "print", "run/job/config.toml"]);
    assert!(
        printed.contains("micro_batch = 2") && printed.contains(&format!("url = \"{}/bank\"", run.display()))
    );

    let state = |state: &str, nodes: &str| {
        format!(
            "JobId=12 JobState={state} Reason=None Restarts=1 RunTime=00:00:05 TimeLimit=01:00:00 NodeList={nodes}\n"
        )
    };
    answer(&work, "scontrol", &state("RUNNING", "n[0-1]"));
    work.fails(&all, &["run: job 12 of this run is RUNNING: `anchorage job cancel "]);
    assert_eq!(calls(&work), ["scontrol show job --oneliner 12"]);
    let (out, _) = work.ok(&["job", "status", "run"]);
    assert_eq!(out, "job 12: RUNNING on n[0-1], 00:00:05 of 01:00:00, queued again 1 times\nno step yet\n");
    calls(&work);
    work.ok(&["job", "requeue", "run"]);
    assert_eq!(calls(&work), ["scontrol show job --oneliner 12", "scancel --batch --signal=USR1 12"]);
    work.ok(&["job", "cancel", "run"]);
    assert_eq!(calls(&work), ["scontrol show job --oneliner 12", "scancel 12"]);
    answer(&work, "scontrol", &state("PENDING", "(null)"));
    work.ok(&["job", "requeue", "run"]);
    assert_eq!(calls(&work), ["scontrol show job --oneliner 12", "scontrol requeue 12"]);

    // Over, or forgotten: the next one goes on.
    answer(&work, "scontrol", &state("CANCELLED", "(null)"));
    work.fails(&["job", "cancel", "run"], &["job 12: expected one that waits or runs, found it CANCELLED"]);
    answer(&work, "sbatch", "13;other\n");
    assert_eq!(work.ok(&all).0, "13\n");
    fs::write(work.path("answers/scontrol.error"), "slurm_load_jobs error: Invalid job id specified\n")
        .unwrap();
    assert_eq!(work.ok(&["job", "status", "run"]).0, "job 13: over, and forgotten by Slurm\nno step yet\n");
    work.fails(&["job", "cancel", "run"], &["job 13: expected one that waits or runs, found none"]);
    assert_eq!(work.ok(&all).0, "13\n");
}

#[test]
fn a_jobs_logs_are_shown() {
    let work = workdir();
    work.ok(&SUBMIT);
    fs::write(work.path("run/logs/job.log"), "one\ntwo\nthree\n").unwrap();
    fs::write(work.path("run/logs/worker-0.log"), "four\n").unwrap();
    let (out, _) = work.ok(&["job", "logs", "run", "--lines", "2"]);
    assert_eq!(out, "==> job <==\ntwo\nthree\n==> worker-0 <==\nfour\n");
    let (out, _) = work.ok(&["job", "logs", "run", "worker-0"]);
    assert_eq!(out, "==> worker-0 <==\nfour\n");
    work.fails(
        &["job", "logs", "run", "worker-1"],
        &["run/logs: expected a log worker-1.log, found job, worker-0"],
    );
}

#[test]
fn what_cannot_be_submitted_is_told_and_nothing_is_written() {
    let work = workdir();
    work.fails(
        &[&SUBMIT[..], &["--shards", "2"]].concat(),
        &["shard.serve.tls: expected certificates", "found none"],
    );
    work.fails(
        &[&SUBMIT[..], &["--set", "collective.insecure=false"]].concat(),
        &["collective.tls: expected certificates", "found none"],
    );
    work.fails(
        &[&SUBMIT[..], &["--set", "train.micro_batch=8"]].concat(),
        &["train.micro_batch: expected at least 2 micro-batches, one for each worker, found 1"],
    );
    work.fails(
        &[&SUBMIT[..], &["--shards", "5", "--set", "shard.serve.insecure=true"]].concat(),
        &["site.toml: slurm.shard.per_node: expected at least 5, for 5 shards on 1 nodes, found 2"],
    );
    let site = |from: &str, to: &str| fs::write(work.path("site.toml"), SITE.replace(from, to)).unwrap();
    site("lead_s", "leads");
    work.fails(&SUBMIT, &["site.toml: line 3: unknown key `leads`, did you mean `lead_s`?"]);
    fs::write(work.path("site.toml"), format!("{SITE}[slurms]\n")).unwrap();
    work.fails(&SUBMIT, &["site.toml: line 14: unknown key `slurms`, did you mean `slurm`?"]);
    site("lead_s = 60", "lead_s = 4000");
    work.fails(
        &SUBMIT,
        &["site.toml: slurm.lead_s: expected from 1 to below the limit of 3600 s, found 4000"],
    );
    site("ports = [20000, 29999]", "ports = [20000, 20001]");
    work.fails(
        &[&SUBMIT[..], &SHARDS].concat(),
        &["site.toml: slurm.ports: expected at least 3, found 20000 to 20001"],
    );
    fs::write(work.path("site.toml"), "").unwrap();
    work.fails(&SUBMIT, &["site.toml: expected a section [slurm] or [kubernetes], found neither"]);
    let plan = ["plan", "run.toml", "--site", "site.toml"];
    work.fails(&plan, &["site.toml: expected a section [worker] with speeds and prices, found none"]);
    assert!(!work.path("run").exists() && calls(&work).is_empty());

    fs::write(work.path("site.toml"), SITE).unwrap();
    let refusal =
        "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: y\n";
    fs::write(work.path("answers/sbatch.error"), refusal).unwrap();
    work.fails(&SUBMIT, &["sbatch: invalid partition specified: x; Batch job submission failed: y"]);
    work.fails(&["job", "status", "run"], &["run: expected a run that was submitted, found no job"]);
    fs::remove_file(work.path("answers/sbatch.error")).unwrap();
    fs::remove_file(work.path("bin/sbatch")).unwrap();
    let mut bare = work.command(&SUBMIT);
    let output = bare.env("PATH", work.path("bin")).output().unwrap();
    crate::support::failure(&output, &["sbatch: not found; is this a machine of a site with Slurm?"]);
}
