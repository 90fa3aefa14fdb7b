use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use launch::Ranks;
use memory_service::{RemoteBank, RemoteStats, ShardStat};
use tokio::sync::oneshot;
use train::{Checkpoints, StepMetrics, TrainState};

use super::{ShardStatus, Spent, Status, every, http, write};
use crate::config::Config;

/// How long the shards may take to say how they are.
const SHARDS: Duration = Duration::from_secs(2);
/// Steps that rates are of.
const RECENT: usize = 50;

/// Watches a worker for others to see; ends, with a last word, when dropped.
pub(crate) struct Observer {
    seen: Arc<Seen>,
    ending: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What rates and utilisation are computed from.
#[derive(Copy, Clone, Debug, Default)]
pub(crate) struct Rates {
    /// Of the products of forward and backward.
    pub(crate) flops_per_token: f64,
    /// The peak of all devices together, if it is known.
    pub(crate) peak_flops: Option<f64>,
}

/// What the training loop, the thread that writes and the endpoint share.
pub(super) struct Seen {
    run_dir: PathBuf,
    began: Instant,
    now: Mutex<Now>,
}

#[derive(Default)]
struct Now {
    status: Status,
    /// Whether the file is written.
    is_its_run: bool,
    rates: Rates,
    /// When the last step, or what came before the first one, ended.
    since: Option<Instant>,
    recent: VecDeque<Recent>,
    /// Steps and their seconds since the last checkpoint: they may be lost.
    unsaved: BTreeMap<u64, f64>,
    useful_s: f64,
    bank: Option<RemoteBank>,
}

struct Recent {
    tokens: u64,
    seconds: f64,
    spent: Spent,
}

impl Observer {
    /// Fails when the endpoint's address cannot be had.
    pub(crate) fn start(config: &Config, ranks: &Ranks) -> Result<Self> {
        let status = Status {
            rank: ranks.rank,
            world_size: ranks.world_size,
            pid: std::process::id(),
            steps: config.train.steps,
            ..Status::default()
        };
        let now = Mutex::new(Now { status, ..Now::default() });
        let seen = Arc::new(Seen { run_dir: config.run.dir.clone(), began: Instant::now(), now });
        let endpoint = config.observe.endpoint(ranks.local_rank)?.map(http::bind).transpose()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (ending, mut ended) = oneshot::channel::<()>();
        let watched = Arc::clone(&seen);
        let watch = async move {
            if let Some(listener) = endpoint {
                tokio::spawn(http::serve(Arc::clone(&watched), listener));
            }
            let (every, mut is_last) = (every(watched.lock().status.world_size), false);
            while !is_last {
                is_last = tokio::time::timeout(every, &mut ended).await.is_ok();
                watched.look().await;
                if watched.lock().is_its_run {
                    let _ = write(&watched.run_dir, &watched.status());
                }
            }
        };
        let run = move || runtime.block_on(watch);
        let thread = std::thread::Builder::new().name("status".into()).spawn(run).context("a thread")?;
        Ok(Self { seen, ending: Some(ending), thread: Some(thread) })
    }

    /// Says what the worker does now, which is not training.
    pub(crate) fn tell(&self, state: impl Into<String>) {
        let mut now = self.seen.lock();
        now.status.state = state.into();
        now.stand_still();
    }

    /// The run's folder is one that this worker trains: its file is written from now on.
    pub(crate) fn write_from_now(&self) {
        self.seen.lock().is_its_run = true;
    }

    /// The worker begins to train from a state.
    pub(crate) fn train(&self, state: TrainState, rates: Rates, bank: Option<RemoteBank>) {
        let TrainState { step, tokens_seen, .. } = state;
        let mut now = self.seen.lock();
        now.status.state = "training".into();
        (now.status.step, now.status.tokens_seen) = (step, tokens_seen);
        (now.rates, now.bank) = (rates, bank);
        now.since = Some(Instant::now());
        now.recent.clear();
        let lost: f64 = now.unsaved.split_off(&(step + 1)).values().sum();
        now.useful_s -= lost;
    }

    /// The bank is closed.
    pub(crate) fn let_go(&self) {
        let mut now = self.seen.lock();
        if let Some(bank) = now.bank.take() {
            now.status.add(bank.stats());
        }
    }

    /// A step is done.
    pub(crate) fn step(&self, metrics: &StepMetrics) {
        self.seen.lock().step(metrics);
    }

    /// The worker goes back to its last checkpoint, because of an error.
    pub(crate) fn back(&self, why: &str) {
        let mut now = self.seen.lock();
        now.status.rollbacks += 1;
        now.status.state = format!("went back: {why}");
        now.stand_still();
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        drop(self.ending.take());
        if let Some(thread) = self.thread.take() {
            // It looks and writes once more.
            let _ = thread.join();
        }
    }
}

impl Seen {
    fn lock(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The worker now.
    pub(super) fn status(&self) -> Status {
        let seconds = self.began.elapsed().as_secs_f64();
        let now = self.lock();
        let (mut status, useful) = (now.status.clone(), now.useful_s);
        if let Some(bank) = &now.bank {
            status.add(bank.stats());
        }
        status.time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
        status.seconds = seconds;
        status.goodput = useful / seconds.max(1e-9);
        status
    }

    /// What the training loop does not tell: the newest checkpoint, and how the shards are.
    async fn look(&self) {
        let (rank, bank) = {
            let now = self.lock();
            (now.status.rank, now.bank.clone())
        };
        let checkpoint = Checkpoints::of(&self.run_dir).latest().ok().flatten();
        let shards = match bank.filter(|_| rank == 0) {
            Some(bank) => bank.shard_stats(SHARDS).await.into_iter().map(shard_status).collect(),
            None => vec![],
        };
        let mut now = self.lock();
        now.status.checkpoint = checkpoint;
        // What was asked of a bank that has been let go of meanwhile is no answer.
        if now.bank.is_some() {
            now.status.shards = shards;
        }
        now.unsaved = now.unsaved.split_off(&checkpoint.map_or(0, |step| step + 1));
    }
}

fn shard_status((address, found): (String, memory_bank::Result<ShardStat>)) -> ShardStatus {
    match found {
        Ok(ShardStat { applied, pending, touched }) => {
            ShardStatus { address, applied: applied.0, pending, touched, error: None }
        }
        Err(error) => ShardStatus { address, error: Some(error.to_string()), ..ShardStatus::default() },
    }
}

impl Status {
    fn add(&mut self, stats: RemoteStats) {
        let RemoteStats { received_bytes, sent_bytes, retries, .. } = stats;
        self.fetched_bytes += received_bytes;
        self.pushed_bytes += sent_bytes;
        self.retries += retries;
    }
}

impl Now {
    /// No rate is told while nothing is trained.
    fn stand_still(&mut self) {
        self.recent.clear();
        let status = &mut self.status;
        (status.tokens_per_s, status.mfu, status.seconds_left) = (0.0, status.mfu.map(|_| 0.0), None);
        status.recent = Spent::default();
    }

    fn step(&mut self, metrics: &StepMetrics) {
        let now = Instant::now();
        let seconds = self.since.replace(now).map_or(0.0, |since| (now - since).as_secs_f64());
        let spent = Spent::of(&metrics.time, seconds);
        let tokens = metrics.tokens_seen.saturating_sub(self.status.tokens_seen);
        self.recent.push_back(Recent { tokens, seconds, spent });
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
        self.unsaved.insert(metrics.step, seconds);
        self.useful_s += seconds;
        let n = self.recent.len().max(1) as f64;
        let tokens: u64 = self.recent.iter().map(|recent| recent.tokens).sum();
        let in_all: f64 = self.recent.iter().map(|recent| recent.seconds).sum();
        let mean = |sum: Spent, recent: &Recent| sum.plus(1.0 / n, &recent.spent);
        let status = &mut self.status;
        status.spent = status.spent.plus(1.0, &spent);
        status.recent = self.recent.iter().fold(Spent::default(), mean);
        status.tokens_per_s = tokens as f64 / in_all.max(1e-9);
        status.mfu =
            self.rates.peak_flops.map(|peak| status.tokens_per_s * self.rates.flops_per_token / peak);
        status.seconds_left =
            (in_all > 0.0).then(|| in_all / n * status.steps.saturating_sub(metrics.step) as f64);
        (status.step, status.tokens_seen, status.loss) = (metrics.step, metrics.tokens_seen, metrics.loss);
        (status.gradient_norm, status.memory_gradient_norm) =
            (metrics.gradient_norm, metrics.memory_gradient_norm);
        status.validation_loss = metrics.validation_loss.or(status.validation_loss);
    }
}
