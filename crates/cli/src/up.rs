//! `anchorage up`: a job of workers and shards on this machine.

use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom};
use std::net::TcpListener;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use train::{Checkpoints, Ended, StepMetrics};

use crate::ConfigArgs;
use crate::config::Config;
use crate::prepare::prepare;
use crate::progress::Progress;
use crate::roles::{Roles, Shape, setting_of_store};
use crate::training::Stop;

#[derive(Args)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    shape: Shape,
}

/// Runs the job to its end, or until it is told to stop.
pub(crate) fn up(args: &UpArgs) -> Result<Ended> {
    let UpArgs { config: files, shape } = args;
    let config = Config::load(&files.config, &files.set)?;
    shape.check(&config)?;
    let stop = Stop::when_told()?;
    prepare(&config)?;
    let mut roles = Roles::new(&config, files)?;
    if let Some(setting) = setting_of_store(&config)? {
        roles.set(&setting);
    }
    let ports = free_ports(1 + shape.shards)?;
    let addresses: Vec<String> = ports[1..].iter().map(|port| format!("127.0.0.1:{port}")).collect();
    for (shard, address) in addresses.iter().enumerate() {
        roles.start_shard(shard, address, *shape, false)?;
    }
    if !addresses.is_empty() {
        roles.set(&format!("memory.shards={addresses:?}"));
    }
    // They wait for shards that still read their blocks.
    for rank in 0..shape.workers {
        roles.start_worker(rank, variables(rank, shape.workers, ports[0]))?;
    }
    watch(&config, roles, &stop)
}

/// What tells a worker of `up` where it is in the job.
fn variables(rank: usize, workers: usize, port: u16) -> Vec<(String, String)> {
    let variables = [
        ("RANK", rank.to_string()),
        ("LOCAL_RANK", rank.to_string()),
        ("WORLD_SIZE", workers.to_string()),
        ("LOCAL_WORLD_SIZE", workers.to_string()),
        ("MASTER_ADDR", "127.0.0.1".to_owned()),
        ("MASTER_PORT", port.to_string()),
        // Another job that is given the same port is not taken for this one.
        ("ANCHORAGE_JOB", format!("{}-{port}", std::process::id())),
    ];
    variables.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
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
fn watch(config: &Config, roles: Roles, stop: &Stop) -> Result<Ended> {
    let name = config.run.dir.file_name().map_or("train".into(), |name| name.to_string_lossy().into_owned());
    let mut progress = Progress::new(&name, config.train.steps);
    let mut metrics = Tail::new(config.run.dir.join("metrics.jsonl"));
    let mut last = StepMetrics::default();
    let ended = roles.watch(config, stop, |happened| {
        happened.inspect(|text| progress.tell(text));
        metrics.read(&mut last);
        progress.set(last.step, config.train.steps, || {
            format!("loss {:.3} {:.0} tokens/s", last.loss, last.tokens_per_s)
        });
    })?;
    metrics.read(&mut last);
    progress.finish(match ended {
        Ended::Done => format!("{} steps, loss {:.4}", last.step, last.loss),
        Ended::Stopped => {
            let step = Checkpoints::of(&config.run.dir).latest()?.unwrap_or(0);
            format!("saved and stopped at step {step}")
        }
    });
    Ok(ended)
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
