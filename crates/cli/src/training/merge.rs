//! `anchorage merge`: the jobs that each trained a subtree become the run that they are parts of.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use cluster_tree::ClusterTree;
use memory_bank::Step;
use shard_host::StoreSection;
use train::{Attempt, Checkpoints, Generic, Subtree, TrainState};

use super::folder::{belongings, copy_belongings, difference, write_config};
use super::parts::{Start, own_bank};
use crate::ConfigArgs;
use crate::config::Config;
use crate::run::write_whole;
use crate::shards;

#[derive(Args)]
pub(crate) struct MergeArgs {
    /// Of the whole run, without train.subtree.
    #[command(flatten)]
    config: ConfigArgs,
    /// Folders of the jobs: one for each cluster of the coarsest level, and that of the generic path.
    #[arg(long, required = true, num_args = 1..)]
    from: Vec<PathBuf>,
}

const ANCHOR: &str = "anchor.safetensors";

/// What has trained a subtree.
struct Job {
    subtree: Subtree,
    state: TrainState,
    /// Its newest checkpoint.
    checkpoint: PathBuf,
}

/// Makes the run's folder, with a checkpoint of the step that all jobs have come to.
pub(crate) fn merge(args: &MergeArgs) -> Result<()> {
    let config = Config::load(&args.config.config, &args.config.set)?;
    let dir = &config.run.dir;
    if let Some(subtree) = config.train.subtree {
        bail!("train.subtree: expected none in the run of all subtrees, found {subtree}");
    }
    if let Some(step) = Checkpoints::of(dir).latest()? {
        bail!("{}: expected a run that has not begun, found one at step {step}", dir.display());
    }
    let mut jobs: Vec<Job> = vec![];
    for from in &args.from {
        let job = Job::open(from, &config)?;
        if let Some(first) = jobs.first() {
            job.check_beside(first)?;
        }
        jobs.push(job);
    }
    let [first, ..] = &jobs[..] else { bail!("--from: expected the folders of jobs, found none") };
    let tree = ClusterTree::load(&args.from[0].join("tree.safetensors"))?;
    check_whole(&config, &tree, &jobs)?;
    let step = first.state.step;
    fs::create_dir_all(dir).with_context(|| format!("{}", dir.display()))?;
    let held = atomic_file::lock(dir).with_context(|| format!("{}", dir.display()))?;
    if held.is_none() {
        bail!("{}: another process is training this run", dir.display());
    }
    let attempt = Attempt::begin(dir, None)?;
    copy_belongings(&args.from[0], dir)?;
    let to = attempt.begin_save(step)?;
    write_whole(&to.join(ANCHOR), &read(&first.checkpoint.join(ANCHOR))?)?;
    let banks: Vec<PathBuf> = jobs.iter().map(|job| job.checkpoint.join("memory")).collect();
    let start = Start { attempt, resumed: Some(step) };
    let n_blocks = merge_banks(&config, &banks, &start)?;
    let tokens_seen = jobs.iter().map(|job| job.state.tokens_seen).sum();
    start.attempt.write_state(&TrainState { tokens_seen, ..first.state })?;
    write_config(&config)?;
    start.attempt.publish(step, config.train.keep)?;
    println!(
        "{}: step {step}, {n_blocks} blocks and {tokens_seen} tokens of {} jobs",
        dir.display(),
        jobs.len()
    );
    Ok(())
}

impl Job {
    /// Fails when it is none of the run.
    fn open(dir: &Path, whole: &Config) -> Result<Self> {
        let path = dir.join("config.toml");
        let mut config = Config::load(&path, &[])?;
        let Some(subtree) = config.train.subtree.take() else {
            bail!("{}: expected train.subtree, found a run of all", path.display());
        };
        if let Some((key, found, expected)) = difference(&config, whole)? {
            bail!("{}: {key}: expected {expected} as in the whole run, found {found}", path.display());
        }
        let checkpoints = Checkpoints::of(dir);
        let step = checkpoints.require_latest()?;
        if step != whole.train.steps {
            bail!("{}: expected all {} steps, found {step}", dir.display(), whole.train.steps);
        }
        Ok(Self { subtree, state: checkpoints.state(step)?, checkpoint: checkpoints.dir(step) })
    }

    /// Fails when the frozen anchors are different ones.
    fn check_beside(&self, first: &Self) -> Result<()> {
        let [ours, theirs] = [self, first].map(|job| job.checkpoint.join(ANCHOR));
        if read(&ours)? != read(&theirs)? {
            bail!("{}: expected the anchor of {}, found another", ours.display(), theirs.display());
        }
        Ok(())
    }
}

/// Fails when a subtree is missing, or there twice.
fn check_whole(config: &Config, tree: &ClusterTree, jobs: &[Job]) -> Result<()> {
    let mut found = BTreeSet::new();
    if let Some(job) = jobs.iter().find(|job| !found.insert(job.subtree)) {
        bail!("train.subtree = {}: expected one job, found two", job.subtree);
    }
    let clusters = (0..tree.branching(0) as u32).map(Subtree::Cluster);
    let generic = (config.train.generic_share > 0.0).then_some(Subtree::Named(Generic::Generic));
    let missing: Vec<String> = clusters
        .chain(generic)
        .filter(|subtree| !found.contains(subtree))
        .map(|subtree| subtree.to_string())
        .collect();
    if !missing.is_empty() {
        bail!("--from: expected a job of every subtree, found none of {}", missing.join(", "));
    }
    Ok(())
}

/// Joins the banks where the shards of the run would look for one, or else in its checkpoint; returns how many
/// blocks were updated.
fn merge_banks(config: &Config, banks: &[PathBuf], start: &Start) -> Result<u64> {
    if config.shard.store.is_some() {
        return shards::merge(config, banks);
    }
    let between = std::path::absolute(config.run.dir.join("merge.tmp"))?;
    let remove = || match fs::remove_dir_all(&between) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    remove()?;
    let mut config = config.clone();
    let (url, options) = (between.display().to_string(), Default::default());
    config.shard.store = Some(StoreSection { url, keep: 1, options });
    let n_blocks = shards::merge(&config, banks)?;
    let (tree, tokenizer) = belongings(&config)?;
    own_bank(&config, (&tree, &tokenizer), start)?.save(Step(start.resumed.unwrap_or(0)))?;
    remove()?;
    Ok(n_blocks)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("{}", path.display()))
}
