//! `anchorage task`: what each task of a Slurm job's steps is. It keeps one worker or one shard: starts it, and
//! starts it again when it is killed.

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use launch::Ranks;
use train::Ended;

use crate::config::Config;
use crate::roles::{Roles, Shape};
use crate::training::Stop;
use crate::{ConfigArgs, variable};

#[derive(Args)]
pub(crate) struct TaskArgs {
    /// Which of the steps this task is of.
    #[arg(value_enum)]
    role: TaskRole,
    #[command(flatten)]
    config: ConfigArgs,
    /// Workers of the job, as its shards are told.
    #[arg(long, default_value_t = 1)]
    workers: usize,
}

#[derive(Clone, Copy, ValueEnum)]
enum TaskRole {
    Worker,
    Shard,
}

/// Keeps the process that this task stands for until it is done, or is told to stop.
pub(crate) fn task(args: &TaskArgs) -> Result<Ended> {
    let TaskArgs { role, config: ref files, workers } = *args;
    let config = Config::load(&files.config, &files.set)?;
    let Ranks { rank, world_size, .. } = Ranks::of(variable)?;
    let stop = Stop::when_told()?;
    let mut roles = Roles::new(&config, files)?;
    match role {
        // It reads the same variables.
        TaskRole::Worker => roles.start_worker(rank, vec![])?,
        TaskRole::Shard => {
            let address = config.memory.shards.get(rank).with_context(|| {
                let found = config.memory.shards.len();
                format!("memory.shards: expected an address for each of {world_size} shards, found {found}")
            })?;
            roles.start_shard(rank, address, Shape { shards: world_size, workers }, true)?;
        }
    }
    roles.watch(&config, &stop, |happened| {
        happened.inspect(|text| eprintln!("{text}"));
    })
}
