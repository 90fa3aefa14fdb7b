//! `anchorage up`: a job of workers and shards on this machine.

use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use launch::{Event, Role, Supervisor};
use train::{Checkpoints, Ended, StepMetrics};

use crate::ConfigArgs;
use crate::config::Config;
use crate::prepare::prepare;
use crate::progress::Progress;
use crate::training::Stop;

#[derive(Args)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Shards of the memory bank; without any, every worker keeps the whole bank.
    #[arg(long, default_value_t = 0)]
    shards: usize,
    /// Workers.
    #[arg(long, default_value_t = 1)]
    workers: usize,
}

/// Between two looks at the processes.
const LOOK: Duration = Duration::from_millis(50);
/// How long those that serve may take to stop.
const STOP: Duration = Duration::from_secs(30);

/// Runs the job to its end, or until it is told to stop.
pub(crate) fn up(args: &UpArgs) -> Result<Ended> {
    let UpArgs { config: ConfigArgs { config: path, set }, shards, workers } = args;
    let config = Config::load(path, set)?;
    if *workers == 0 {
        bail!("--workers: expected at least 1, found 0");
    }
    if *shards > 0 && !config.train.phase.has_memory() {
        bail!("--shards: expected none (train.phase = \"anchor\" has no memory), found {shards}");
    }
    let stop = Stop::when_told()?;
    prepare(&config)?;
    let logs = config.run.dir.join("logs");
    fs::create_dir_all(&logs).with_context(|| format!("{}", logs.display()))?;
    let mut job = Job {
        program: std::env::current_exe().context("the program that workers run")?,
        logs,
        common: set.iter().flat_map(|setting| ["--set".into(), setting.clone()]).collect(),
        path,
        processes: Supervisor::new(config.collective.retries),
    };
    if config.train.phase.has_memory() && config.shard.store.is_none() {
        // Where the bank's checkpoints are while it is on shards.
        let url = std::path::absolute(config.run.dir.join("bank"))?;
        job.set(&format!("shard.store.url={:?}", url.display().to_string()));
    }
    let ports = free_ports(1 + *shards)?;
    let addresses: Vec<String> = ports[1..].iter().map(|port| format!("127.0.0.1:{port}")).collect();
    for (shard, address) in addresses.iter().enumerate() {
        job.start_shard(shard, address, (*shards, *workers))?;
    }
    if !addresses.is_empty() {
        job.set(&format!("memory.shards={addresses:?}"));
    }
    // They wait for shards that still read their blocks.
    job.start_workers(*workers, ports[0])?;
    let ended = watch(&config, &mut job, &stop);
    job.processes.finish(STOP);
    ended
}

struct Job<'a> {
    program: PathBuf,
    logs: PathBuf,
    /// Arguments of all roles after the configuration's path.
    common: Vec<String>,
    path: &'a Path,
    processes: Supervisor,
}

impl Job<'_> {
    fn set(&mut self, setting: &str) {
        self.common.extend(["--set".to_owned(), setting.to_owned()]);
    }

    fn start(&mut self, name: &str, args: Vec<String>, variables: Vec<(String, String)>) -> Result<()> {
        let (program, log) =
            (self.program.clone(), self.logs.join(format!("{}.log", name.replace(' ', "-"))));
        let is_worker = name.starts_with("worker");
        Ok(self.processes.start(Role { name: name.to_owned(), program, args, variables, log, is_worker })?)
    }

    fn args(&self, command: &str, more: &[String]) -> Vec<String> {
        let path = self.path.display().to_string();
        [command.to_owned(), path]
            .into_iter()
            .chain(self.common.iter().cloned())
            .chain(more.iter().cloned())
            .collect()
    }

    /// Starts a shard that serves on `address`.
    fn start_shard(&mut self, shard: usize, address: &str, (of, workers): (usize, usize)) -> Result<()> {
        let text = |n: usize| n.to_string();
        let more = ["--shard", &text(shard), "--of", &text(of), "--workers", &text(workers)]
            .into_iter()
            .chain(["--listen", address, "--log", "json"])
            .map(str::to_owned)
            .collect::<Vec<_>>();
        self.start(&format!("shard {shard}"), self.args("shard", &more), vec![])
    }

    fn start_workers(&mut self, workers: usize, port: u16) -> Result<()> {
        // Another job that is given the same port is not taken for this one.
        let job = format!("{}-{port}", std::process::id());
        for rank in 0..workers {
            let variables = [
                ("RANK", rank.to_string()),
                ("LOCAL_RANK", rank.to_string()),
                ("WORLD_SIZE", workers.to_string()),
                ("LOCAL_WORLD_SIZE", workers.to_string()),
                ("MASTER_ADDR", "127.0.0.1".to_owned()),
                ("MASTER_PORT", port.to_string()),
                ("ANCHORAGE_JOB", job.clone()),
            ];
            let variables = variables.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
            self.start(&format!("worker {rank}"), self.args("train", &[]), variables)?;
        }
        Ok(())
    }
}

/// Ports that nobody listens on and that the system gives to nobody by itself: they have to be free again when
/// a role is started again.
fn free_ports(n: usize) -> Result<Vec<u16>> {
    const FIRST: u16 = 10_000;
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let given = range.split_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(32_768);
    let all = given.max(FIRST + 1) - FIRST;
    // Jobs that begin at the same time look in different places.
    let start = RandomState::new().build_hasher().finish();
    let port = |i: u16| FIRST + (start.wrapping_add(u64::from(i)) % u64::from(all)) as u16;
    let listen = |i: u16| TcpListener::bind(("127.0.0.1", port(i)));
    // All are held until the last is found.
    let held: Vec<TcpListener> = (0..all).filter_map(|i| listen(i).ok()).take(n).collect();
    if held.len() < n {
        bail!("ports {FIRST} to {given}: expected {n} that are free, found {}", held.len());
    }
    Ok(held
        .iter()
        .map(|listener| listener.local_addr().map(|address| address.port()))
        .collect::<Result<_, _>>()?)
}

/// Shows how far the job is until it is over.
fn watch(config: &Config, job: &mut Job, stop: &Stop) -> Result<Ended> {
    let name = config.run.dir.file_name().map_or("train".into(), |name| name.to_string_lossy().into_owned());
    let checkpoints = Checkpoints::of(&config.run.dir);
    let mut progress = Progress::new(&name, config.train.steps);
    let mut metrics = Tail::new(config.run.dir.join("metrics.jsonl"));
    let (mut newest, mut is_told, mut last) = (checkpoints.latest()?, false, StepMetrics::default());
    loop {
        if stop.is_set() && !std::mem::replace(&mut is_told, true) {
            job.processes.stop_workers();
        }
        match job.processes.look()? {
            Some(Event::Over { is_stopped }) => {
                metrics.read(&mut last);
                let (ended, line) = match is_stopped {
                    false => (Ended::Done, format!("{} steps, loss {:.4}", last.step, last.loss)),
                    true => {
                        let step = checkpoints.latest()?.unwrap_or(0);
                        (Ended::Stopped, format!("saved and stopped at step {step}"))
                    }
                };
                progress.finish(line);
                return Ok(ended);
            }
            Some(Event::StartedAgain { role, ended }) => {
                progress.tell(&format!("{role} ended with {ended} and is started again"));
            }
            None => {}
        }
        metrics.read(&mut last);
        progress.set(last.step, config.train.steps, || {
            format!("loss {:.3} {:.0} tokens/s", last.loss, last.tokens_per_s)
        });
        let found = checkpoints.latest()?;
        if std::mem::replace(&mut newest, found) != found {
            job.processes.progressed();
        }
        std::thread::park_timeout(LOOK);
    }
}

/// The last line of a run's metrics, whose file begins anew when the run goes back to a checkpoint.
struct Tail {
    path: PathBuf,
    /// Bytes that have been read.
    read: u64,
}

impl Tail {
    fn new(path: PathBuf) -> Self {
        Self { path, read: 0 }
    }

    fn read(&mut self, last: &mut StepMetrics) {
        let Ok(n_bytes) = fs::metadata(&self.path).map(|found| found.len()) else { return };
        if n_bytes == self.read {
            return;
        }
        let begin = if n_bytes < self.read { 0 } else { self.read };
        let found = self.lines(begin).unwrap_or_default();
        if let Some(line) = found.iter().rev().find_map(|line| serde_json::from_str(line).ok()) {
            *last = line;
        }
        self.read = n_bytes;
    }

    /// The lines from a byte on.
    fn lines(&self, begin: u64) -> io::Result<Vec<String>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(begin))?;
        BufReader::new(file).lines().collect()
    }
}
