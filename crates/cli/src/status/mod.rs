//! What a worker tells of itself while it trains: a file in the run's folder, which `anchorage top` shows, and
//! where it is asked to an HTTP endpoint with the same and with Prometheus text.

mod http;
mod observer;
pub(crate) mod top;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use train::StepTime;

pub(crate) use observer::{Observer, Rates};

/// A worker of a run at a moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Status {
    /// From 0.
    pub(crate) rank: usize,
    /// Workers.
    pub(crate) world_size: usize,
    /// What it does, in words.
    pub(crate) state: String,
    /// Its process.
    pub(crate) pid: u32,
    /// Seconds since 1970 when this was true.
    pub(crate) time: f64,
    /// Seconds since the process began.
    pub(crate) seconds: f64,
    /// The last step.
    pub(crate) step: u64,
    /// Steps of the whole run.
    pub(crate) steps: u64,
    /// Targets scored since the run began.
    pub(crate) tokens_seen: u64,
    /// Of the last step, nats.
    pub(crate) loss: f64,
    /// The last one, nats.
    pub(crate) validation_loss: Option<f64>,
    pub(crate) gradient_norm: f64,
    pub(crate) memory_gradient_norm: f64,
    /// Scored targets a second of the whole job, over the last steps.
    pub(crate) tokens_per_s: f64,
    /// Part of the peak of all devices that the products of the anchor and of fetched memory make up (model
    /// FLOPs utilisation: PaLM, arXiv 2204.02311 App. B), where `observe.peak_tflops` is known.
    pub(crate) mfu: Option<f64>,
    /// Part of the time since the process began that went on steps which were not lost again.
    pub(crate) goodput: f64,
    /// Until the last step, at the rate of the last ones.
    pub(crate) seconds_left: Option<f64>,
    /// The newest checkpoint.
    pub(crate) checkpoint: Option<u64>,
    /// How often it went back to a checkpoint.
    pub(crate) rollbacks: u64,
    /// Mean milliseconds of the last steps by what they went on.
    pub(crate) recent: Spent,
    /// Milliseconds of all steps by what they went on.
    pub(crate) spent: Spent,
    /// Bytes of blocks from shards.
    pub(crate) fetched_bytes: u64,
    /// Bytes of gradients to shards.
    pub(crate) pushed_bytes: u64,
    /// Requests to shards that were tried again.
    pub(crate) retries: u64,
    /// The shards, as the first worker sees them.
    pub(crate) shards: Vec<ShardStatus>,
}

/// A shard at a moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct ShardStatus {
    pub(crate) address: String,
    /// The last step applied.
    pub(crate) applied: u64,
    /// Steps that only some workers have pushed.
    pub(crate) pending: u64,
    /// Blocks updated at least once.
    pub(crate) touched: u64,
    /// Why it says nothing.
    pub(crate) error: Option<String>,
}

/// Milliseconds by what they went on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Spent {
    pub(crate) data: f64,
    pub(crate) fetch: f64,
    pub(crate) compute: f64,
    pub(crate) reduce: f64,
    pub(crate) push: f64,
    pub(crate) update: f64,
    /// Validation, checkpoints.
    pub(crate) other: f64,
}

impl Spent {
    const CAUSES: [&str; 7] = ["data", "fetch", "compute", "reduce", "push", "update", "other"];

    /// Of a step that took `seconds` in all.
    fn of(time: &StepTime, seconds: f64) -> Self {
        let StepTime { data_ms, fetch_ms, compute_ms, reduce_ms, push_ms, update_ms } = *time;
        let known = [data_ms, fetch_ms, compute_ms, reduce_ms, push_ms, update_ms];
        let [data, fetch, compute, reduce, push, update] = known;
        let other = (1e3 * seconds - known.iter().sum::<f64>()).max(0.0);
        Self { data, fetch, compute, reduce, push, update, other }
    }

    /// In the order of `CAUSES`.
    fn values(&self) -> [f64; 7] {
        let Self { data, fetch, compute, reduce, push, update, other } = *self;
        [data, fetch, compute, reduce, push, update, other]
    }

    fn total(&self) -> f64 {
        self.values().iter().sum()
    }

    /// This and `by` times another.
    fn plus(&self, by: f64, more: &Self) -> Self {
        let (sum, more) = (self.values(), more.values());
        let [data, fetch, compute, reduce, push, update, other] =
            std::array::from_fn(|i| sum[i] + by * more[i]);
        Self { data, fetch, compute, reduce, push, update, other }
    }
}

/// Between two writes of a worker's file: those of all workers together are some 30 a second at most, which a
/// cluster's file system bears.
fn every(world_size: usize) -> Duration {
    Duration::from_secs(1 + world_size as u64 / 32)
}

/// Where the workers of a run tell how they are.
fn folder(run_dir: &Path) -> PathBuf {
    run_dir.join("status")
}

/// Writes a worker's file, whole or not at all.
fn write(run_dir: &Path, status: &Status) -> std::io::Result<()> {
    let folder = folder(run_dir);
    fs::create_dir_all(&folder)?;
    let path = folder.join(format!("worker-{}.json", status.rank));
    let staged = atomic_file::temporary(&path);
    // Without waiting for the disk: after a crash of the machine nobody asks how it was.
    fs::write(&staged, serde_json::to_vec(status)?)?;
    fs::rename(&staged, &path)
}
