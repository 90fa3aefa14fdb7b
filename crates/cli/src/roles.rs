//! The workers and shards of a job that are processes of this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use launch::{Event, Role, Supervisor};
use train::{Checkpoints, Ended};

use crate::ConfigArgs;
use crate::config::Config;
use crate::training::Stop;

/// Between two looks at the processes.
const LOOK: Duration = Duration::from_millis(50);
/// How long those that serve may take to stop.
const STOP: Duration = Duration::from_secs(30);

/// How many a job has of each.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Shape {
    /// Shards of the memory bank; without any, every worker keeps the whole bank.
    #[arg(long, default_value_t = 0)]
    pub(crate) shards: usize,
    /// Workers.
    #[arg(long, default_value_t = 1)]
    pub(crate) workers: usize,
}

impl Shape {
    /// Fails on one that a run cannot have.
    pub(crate) fn check(self, config: &Config) -> Result<()> {
        if self.workers == 0 {
            bail!("--workers: expected at least 1, found 0");
        }
        if self.shards > 0 && !config.train.phase.has_memory() {
            bail!("--shards: expected none (train.phase = \"anchor\" has no memory), found {}", self.shards);
        }
        Ok(())
    }
}

/// What says where the bank's checkpoints are while it is on shards, unless the configuration does.
pub(crate) fn setting_of_store(config: &Config) -> Result<Option<String>> {
    if !config.train.phase.has_memory() || config.shard.store.is_some() {
        return Ok(None);
    }
    let url = std::path::absolute(config.run.dir.join("bank"))?;
    Ok(Some(format!("shard.store.url={:?}", url.display().to_string())))
}

/// Processes that are started, watched and started again.
pub(crate) struct Roles<'a> {
    program: PathBuf,
    logs: PathBuf,
    /// Arguments of all after the configuration's path.
    common: Vec<String>,
    path: &'a Path,
    processes: Supervisor,
}

impl<'a> Roles<'a> {
    /// None yet, of the run of a configuration; each will have a log in its folder.
    pub(crate) fn new(config: &Config, args: &'a ConfigArgs) -> Result<Self> {
        let logs = config.run.dir.join("logs");
        fs::create_dir_all(&logs).with_context(|| format!("{}", logs.display()))?;
        Ok(Self {
            program: std::env::current_exe().context("the program that workers run")?,
            logs,
            common: args.set.iter().flat_map(|setting| ["--set".into(), setting.clone()]).collect(),
            path: &args.config,
            processes: Supervisor::new(config.collective.retries),
        })
    }

    /// Overrides a key for all that are started from now on.
    pub(crate) fn set(&mut self, setting: &str) {
        self.common.extend(["--set".to_owned(), setting.to_owned()]);
    }

    /// Starts a shard that serves on `address`; `leads` says that the job here is over with it.
    pub(crate) fn start_shard(
        &mut self,
        shard: usize,
        address: &str,
        shape: Shape,
        leads: bool,
    ) -> Result<()> {
        let numbers = [("--shard", shard), ("--of", shape.shards), ("--workers", shape.workers)];
        let mut args = self.args("shard");
        args.extend(numbers.into_iter().flat_map(|(flag, n)| [flag.to_owned(), n.to_string()]));
        args.extend(["--listen", address, "--log", "json"].map(str::to_owned));
        self.start(format!("shard {shard}"), args, vec![], leads)
    }

    /// Starts a worker, with variables that say what this process does not have in its own.
    pub(crate) fn start_worker(&mut self, rank: usize, variables: Vec<(String, String)>) -> Result<()> {
        let args = self.args("train");
        self.start(format!("worker {rank}"), args, variables, true)
    }

    fn args(&self, command: &str) -> Vec<String> {
        let path = self.path.display().to_string();
        [command.to_owned(), path].into_iter().chain(self.common.iter().cloned()).collect()
    }

    fn start(
        &mut self,
        name: String,
        args: Vec<String>,
        variables: Vec<(String, String)>,
        is_worker: bool,
    ) -> Result<()> {
        let log = self.logs.join(format!("{}.log", name.replace(' ', "-")));
        let program = self.program.clone();
        Ok(self.processes.start(Role { name, program, args, variables, log, is_worker })?)
    }

    /// Watches them until the job is over, and ends who is left; `look` is called all the time, with what has
    /// happened if anything.
    pub(crate) fn watch(
        mut self,
        config: &Config,
        stop: &Stop,
        look: impl FnMut(Option<String>),
    ) -> Result<Ended> {
        let ended = self.until_over(config, stop, look);
        self.processes.finish(STOP);
        ended
    }

    fn until_over(
        &mut self,
        config: &Config,
        stop: &Stop,
        mut look: impl FnMut(Option<String>),
    ) -> Result<Ended> {
        let checkpoints = Checkpoints::of(&config.run.dir);
        let (mut newest, mut is_told) = (checkpoints.latest()?, false);
        loop {
            if stop.is_set() && !std::mem::replace(&mut is_told, true) {
                self.processes.stop_workers();
            }
            match self.processes.look()? {
                Some(Event::Over { is_stopped: false }) => return Ok(Ended::Done),
                Some(Event::Over { is_stopped: true }) => return Ok(Ended::Stopped),
                Some(Event::StartedAgain { role, ended }) => {
                    look(Some(format!("{role} ended with {ended} and is started again")));
                }
                None => look(None),
            }
            let found = checkpoints.latest()?;
            if std::mem::replace(&mut newest, found) != found {
                self.processes.progressed();
            }
            std::thread::park_timeout(LOOK);
        }
    }
}
