//! `anchorage submit`: a run as a job of a site, and `anchorage job`: what has become of it.
//!
//! The run's folder has `job/`: `config.toml` is the configuration as it was submitted, which all processes of the
//! job read however often it starts, beside what the site was given; `submitted.json` says which job it is.

mod kubernetes;
mod slurm;

use std::fs;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use launch::slurm::JobId;
use serde::{Deserialize, Serialize};

use crate::ConfigArgs;
use crate::config::Config;
use crate::roles::{Shape, setting_of_store};
use crate::run::write_whole;
use crate::site::Site;

#[derive(Args)]
pub(crate) struct SubmitArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The site, such as cluster/slurm.toml.
    #[arg(long)]
    site: PathBuf,
    #[command(flatten)]
    shape: Shape,
    /// Print what the site would be given, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

/// What is asked of a submitted run.
#[derive(Subcommand)]
pub(crate) enum JobCommand {
    /// Whether it waits, runs or is over, and how far the run is.
    Status {
        /// Folder of the run.
        run: PathBuf,
    },
    /// The last lines of the logs of the job and of its processes.
    Logs {
        /// Folder of the run.
        run: PathBuf,
        /// One of them, such as `job` or `worker-0`; all without it.
        name: Option<String>,
        /// Lines of each.
        #[arg(long, default_value_t = 10)]
        lines: usize,
    },
    /// End it. What was saved stays: a run that is submitted again goes on.
    Cancel {
        /// Folder of the run.
        run: PathBuf,
    },
    /// Have it save and queue it again, such as to leave a node that is bad.
    Requeue {
        /// Folder of the run.
        run: PathBuf,
    },
}

/// Which job a run is.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Submitted {
    /// Of Slurm.
    Slurm { id: JobId },
    /// Of a Kubernetes cluster, by the name of the manifests beside.
    Kubernetes,
}

/// A run that is to be a job.
struct Submission {
    /// As it is submitted.
    config: Config,
    /// Its folder, absolute.
    dir: PathBuf,
    shape: Shape,
}

pub(crate) fn submit(args: &SubmitArgs) -> Result<()> {
    let SubmitArgs { config: files, site: path, shape, dry_run } = args;
    let mut config = Config::load(&files.config, &files.set)?;
    shape.check(&config)?;
    let leaves = config.train.batch_size.div_ceil(config.train.micro_batch);
    if leaves < shape.workers {
        bail!(
            "train.micro_batch: expected at least {} micro-batches, one for each worker, found {leaves}",
            shape.workers
        );
    }
    let site = Site::load(path)?;
    if let Some(site) = &site.kubernetes {
        return kubernetes::submit_to(args, site).with_context(|| format!("{}", path.display()));
    }
    let Some(site) = &site.slurm else {
        bail!("{}: expected a section [slurm] or [kubernetes], found neither", path.display());
    };
    let serve = &config.shard.serve;
    if shape.shards > 0 && serve.tls.is_none() && !serve.insecure {
        bail!(
            "shard.serve.tls: expected certificates, since others than this job's workers may reach its shards (or \
             shard.serve.insecure = true where nobody else can), found none"
        );
    }
    let collective = &config.collective;
    if shape.workers > 1 && collective.tls.is_none() && !collective.insecure {
        bail!(
            "collective.tls: expected certificates, since others may reach the workers (or collective.insecure = true \
             where nobody else can), found none"
        );
    }
    if let Some(setting) = setting_of_store(&config)? {
        let set = files.set.iter().cloned().chain([setting]).collect::<Vec<_>>();
        config = Config::load(&files.config, &set)?;
    }
    let dir = std::path::absolute(&config.run.dir)?;
    let submission = Submission { config, dir, shape: *shape };
    let script = slurm::render(&submission, site).with_context(|| format!("{}", path.display()))?;
    if *dry_run {
        print!("{script}");
        return Ok(());
    }
    slurm::refuse_second(&submission.dir)?;
    submission.prepare()?;
    println!("{}", slurm::submit(&submission, &script)?);
    Ok(())
}

impl Submission {
    /// Where `submitted.json` and all that the site is given lie.
    fn folder(&self) -> PathBuf {
        self.dir.join("job")
    }

    /// Makes the run's folder with what the job finds there.
    fn prepare(&self) -> Result<()> {
        for folder in [self.folder(), self.dir.join("logs")] {
            fs::create_dir_all(&folder).with_context(|| format!("{}", folder.display()))?;
        }
        write_whole(&self.folder().join("config.toml"), self.config.to_toml()?.as_bytes())
    }

    /// Says which job the run is now.
    fn note(&self, submitted: &Submitted) -> Result<()> {
        write_whole(&self.folder().join("submitted.json"), &serde_json::to_vec(submitted)?)
    }
}

/// Which job a run is; `None` of one that never was submitted.
fn find(dir: &Path) -> Result<Option<Submitted>> {
    let path = dir.join("job/submitted.json");
    match fs::read(&path) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text).with_context(|| format!("{}", path.display()))?)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("{}", path.display())),
    }
}

pub(crate) fn job(command: &JobCommand) -> Result<()> {
    let of = |run: &Path| {
        find(run)?
            .with_context(|| format!("{}: expected a run that was submitted, found no job", run.display()))
    };
    match command {
        JobCommand::Logs { run, name, lines } => match of(run)? {
            Submitted::Slurm { .. } => logs(run, name.as_deref(), *lines),
            Submitted::Kubernetes => kubernetes::logs(run, (name.as_deref(), *lines)),
        },
        JobCommand::Status { run } => match of(run)? {
            Submitted::Slurm { id } => slurm::status(run, id),
            Submitted::Kubernetes => kubernetes::status(run),
        },
        JobCommand::Cancel { run } => match of(run)? {
            Submitted::Slurm { id } => slurm::cancel(id),
            Submitted::Kubernetes => kubernetes::cancel(run),
        },
        JobCommand::Requeue { run } => match of(run)? {
            Submitted::Slurm { id } => slurm::requeue(id),
            Submitted::Kubernetes => kubernetes::requeue(run),
        },
    }
}

/// Bytes at a log's end in which its last lines are looked for.
const END: u64 = 1 << 18;

/// Prints the ends of logs, as `tail` does.
fn logs(run: &Path, name: Option<&str>, lines: usize) -> Result<()> {
    let folder = run.join("logs");
    let mut names = vec![];
    for entry in fs::read_dir(&folder).with_context(|| format!("{}", folder.display()))? {
        let file = entry?.file_name().to_string_lossy().into_owned();
        names.extend(file.strip_suffix(".log").map(str::to_owned));
    }
    names.sort();
    if let Some(name) = name {
        if !names.iter().any(|found| found == name) {
            bail!("{}: expected a log {name}.log, found {}", folder.display(), names.join(", "));
        }
        names = vec![name.to_owned()];
    }
    for name in names {
        let path = folder.join(format!("{name}.log"));
        let mut file = fs::File::open(&path).with_context(|| format!("{}", path.display()))?;
        let n_bytes = file.metadata()?.len();
        file.seek(SeekFrom::Start(n_bytes.saturating_sub(END)))?;
        let mut end = vec![];
        file.read_to_end(&mut end)?;
        let text = String::from_utf8_lossy(&end);
        let all: Vec<&str> = text.lines().collect();
        println!("==> {name} <==");
        all[all.len().saturating_sub(lines)..].iter().for_each(|line| println!("{line}"));
    }
    Ok(())
}
