//! `anchorage submit` to a Kubernetes cluster: what it is given, and what is refused before.

use std::fs;

use crate::support::Workdir;

const SITE: &str = r#"
[kubernetes]
image = "example.com/anchorage:1"
volume = "runs"
worker = { cpu = "4", memory = "8Gi", certificate = "workers", token = "token" }
shard = { cpu = "2", memory = "16Gi", certificate = "shards", token = "tokens" }
"#;

const SUBMIT: [&str; 8] = ["submit", "run.toml", "--site", "site.toml", "--workers", "2", "--shards", "2"];

fn workdir(site: &str) -> Workdir {
    let work = Workdir::new();
    fs::write(work.path("site.toml"), site).unwrap();
    work
}

/// The text under a key of a manifest, whose lines begin with blanks.
fn literal(yaml: &str, key: &str) -> String {
    let after = yaml.split(&format!("  {key}: |\n")).nth(1).unwrap();
    let lines = after.lines().take_while(|line| line.starts_with("    ") || line.is_empty());
    lines.map(|line| format!("{}\n", line.strip_prefix("    ").unwrap_or_default())).collect()
}

#[test]
fn a_dry_run_prints_what_the_cluster_would_be_given() {
    let work = workdir(SITE);
    let (yaml, _) = work.ok(&[&SUBMIT[..], &["--set", "train.seed=7", "--dry-run"]].concat());
    let kinds: Vec<&str> = yaml.lines().filter_map(|line| line.strip_prefix("kind: ")).collect();
    assert_eq!(kinds, ["JobSet", "ConfigMap", "Service", "StatefulSet", "PodDisruptionBudget"]);
    assert!(!work.path("run").exists() && !work.path("prepared").exists());
    // Pods read a configuration that is one, with all that was set, where they are.
    let config = literal(&yaml, "run.toml");
    fs::write(work.path("pod.toml"), &config).unwrap();
    assert_eq!(work.ok(&["config", "print", "pod.toml"]).0, config);
    for expected in [
        "seed = 7\n",
        "shards = [\"run-shard-0.run-shard.default.svc:7070\", \"run-shard-1.run-shard.default.svc:7070\"]\n",
        "url = \"/work/run/bank\"\n",
        "tokens = \"/etc/anchorage-token/tokens\"\n",
        "token_file = \"/etc/anchorage-token/token\"\n",
        "[collective.tls]\ncert = \"/etc/anchorage-tls/tls.crt\"\n",
        "[memory.tls]\ncert = \"/etc/anchorage-tls/tls.crt\"\n",
        "[shard.serve.tls]\ncert = \"/etc/anchorage-tls/tls.crt\"\n",
    ] {
        assert!(config.contains(expected), "no {expected}in\n{config}");
    }
    // Checkpoints of the bank elsewhere: shards only read the volume.
    let is_read = |yaml: &str| yaml.contains("mountPath: /work\n          readOnly: true\n");
    let (elsewhere, _) =
        work.ok(&[&SUBMIT[..], &["--set", "shard.store.url=s3://b/banks", "--dry-run"]].concat());
    assert_eq!((is_read(&yaml), is_read(&elsewhere)), (false, true));
}

#[test]
fn what_no_cluster_can_run_is_refused_before_anything_is_done() {
    let work = workdir(SITE);
    let refused = |site: &str, more: &[&str], parts: &[&str]| {
        fs::write(work.path("site.toml"), site).unwrap();
        work.fails(&[&SUBMIT[..], more].concat(), parts);
        assert!(!work.path("run").exists());
    };
    refused(
        &SITE.replace("certificate = \"shards\", ", ""),
        &[],
        &["site.toml: kubernetes.shard.certificate: expected one beside the workers', found nothing"],
    );
    refused(
        &SITE.replace("volume", "volumes"),
        &[],
        &["site.toml: line 4: unknown key `volumes`, did you mean `volume`?"],
    );
    refused(
        &SITE.replace("8Gi", "8GB"),
        &[],
        &["site.toml: JobSet run: ", "memory: expected a quantity", "found \"8GB\""],
    );
    refused("", &[], &["site.toml: expected a section [slurm] or [kubernetes], found neither"]);
    let elsewhere = ["--set", "run.dir=/home/me/run"];
    refused(SITE, &elsewhere, &["run.dir: expected a folder on the cluster's volume", "found /home/me/run"]);
    let outside = ["--set", "corpus.prepared=../prepared"];
    refused(
        SITE,
        &outside,
        &["corpus.prepared: expected a folder on the cluster's volume", "found ../prepared"],
    );
    let secret = ["--set", "corpus.store.aws_secret_access_key=x"];
    refused(SITE, &secret, &["corpus.store.aws_secret_access_key: expected no credentials"]);
    refused(
        SITE,
        &["--set", "train.micro_batch=8"],
        &["train.micro_batch: expected at least 2 micro-batches"],
    );
    let without_feature = !cfg!(feature = "kubernetes");
    if without_feature {
        refused(SITE, &[], &["built without the feature `kubernetes`", "kubectl apply -f -"]);
    }
}

#[test]
fn a_shard_waits_for_the_corpus() {
    let work = Workdir::new();
    let set = ["--set", "collective.join_s=1"];
    work.fails(
        &[&["shard", "run.toml", "--shard", "0", "--of", "1"], &set[..]].concat(),
        &["prepared: waited 1 s (collective.join_s) for the corpus to be prepared"],
    );
}
