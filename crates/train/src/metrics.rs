use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use memory_bank::Traffic;
use serde::{Deserialize, Serialize};

use crate::checkpoint::write_whole;
use crate::tensorboard::EventWriter;
use crate::{Error, Result};

/// One line of metrics.jsonl. All but the last four fields repeat to the bit when a run is resumed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Optimizer steps done.
    pub step: u64,
    /// Mean training loss of the step's tokens, nats, z-loss included; 0 of a step that has none of the subtree.
    pub loss: f64,
    /// Mean loss on held-out documents, nats, when it was computed after this step.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub validation_loss: Option<f64>,
    /// The anchor's learning rate.
    pub learning_rate: f64,
    /// L2 norm of the anchor's gradient before clipping; 0 when frozen.
    pub gradient_norm: f64,
    /// Memory's learning rate; 0 without memory.
    pub memory_learning_rate: f64,
    /// L2 norm of all block gradients before clipping.
    pub memory_gradient_norm: f64,
    /// Memory blocks fetched in the step.
    pub n_blocks: usize,
    /// Targets scored since the run began.
    pub tokens_seen: u64,
    /// What this worker has moved to and from shards since the last line.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub traffic: Option<Traffic>,
    /// Where the time of the step went.
    #[serde(default)]
    pub time: StepTime,
    /// Scored targets a second since the last line.
    pub tokens_per_s: f64,
    /// Seconds since this process began to train.
    pub seconds: f64,
}

/// Milliseconds of one step by what they went on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepTime {
    /// Waiting for the loader.
    pub data_ms: f64,
    /// Fetching memory blocks.
    pub fetch_ms: f64,
    /// Forward and backward.
    pub compute_ms: f64,
    /// Sums over all workers, and waiting for the others.
    #[serde(default)]
    pub reduce_ms: f64,
    /// Gradient norms, and pushing the gradients of blocks.
    pub push_ms: f64,
    /// Updating the anchor.
    pub update_ms: f64,
}

/// Milliseconds since the last lap.
pub(crate) struct Laps(Instant);

impl Laps {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn lap_ms(&mut self) -> f64 {
        let now = Instant::now();
        (now - std::mem::replace(&mut self.0, now)).as_secs_f64() * 1e3
    }
}

/// metrics.jsonl and tb/ of a run.
pub struct Metrics {
    path: PathBuf,
    file: File,
    events: EventWriter,
    began: Instant,
    last: (Instant, u64),
    moved: Traffic,
}

impl Metrics {
    /// Opens a run's metrics to continue after `step`: later lines, of steps that were not saved, go. The file
    /// is another one than before: who has that open writes no line of this one.
    ///
    /// # Errors
    /// When the files cannot be read or written.
    pub fn resume(run_dir: &Path, step: u64, tokens_seen: u64) -> Result<Self> {
        let path = run_dir.join("metrics.jsonl");
        let mut kept = String::new();
        if path.exists() {
            // The text as it was written: a number read and written again may differ in its last digit.
            for (text, _) in read_lines(&path)?.iter().filter(|(_, line)| line.step <= step) {
                kept += text;
                kept.push('\n');
            }
        }
        write_whole(&path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path).map_err(|e| Error::file(&path, e))?;
        let events = EventWriter::create(&run_dir.join("tb"), step, wall_time())?;
        let now = Instant::now();
        Ok(Self { path, file, events, began: now, last: (now, tokens_seen), moved: Traffic::default() })
    }

    /// Fills in the times, and of the traffic so far that since the last line, and writes one line and one event.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&mut self, mut metrics: StepMetrics) -> Result<StepMetrics> {
        let now = Instant::now();
        let (then, tokens) = std::mem::replace(&mut self.last, (now, metrics.tokens_seen));
        metrics.tokens_per_s = (metrics.tokens_seen - tokens) as f64 / (now - then).as_secs_f64().max(1e-9);
        if let Some(so_far) = &mut metrics.traffic {
            let before = std::mem::replace(&mut self.moved, *so_far);
            *so_far = so_far.since(&before);
        }
        metrics.seconds = (now - self.began).as_secs_f64();
        let mut line = serde_json::to_string(&metrics).map_err(|e| Error::file(&self.path, e))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(|e| Error::file(&self.path, e))?;
        let mut scalars = vec![
            ("train/loss", metrics.loss),
            ("train/learning_rate", metrics.learning_rate),
            ("train/gradient_norm", metrics.gradient_norm),
            ("train/tokens_per_s", metrics.tokens_per_s),
            ("time/data_ms", metrics.time.data_ms),
            ("time/fetch_ms", metrics.time.fetch_ms),
            ("time/compute_ms", metrics.time.compute_ms),
            ("time/push_ms", metrics.time.push_ms),
            ("time/update_ms", metrics.time.update_ms),
            ("memory/gradient_norm", metrics.memory_gradient_norm),
            ("memory/blocks", metrics.n_blocks as f64),
        ];
        scalars.extend(metrics.traffic.into_iter().flat_map(|traffic| {
            [
                ("memory/fetched_bytes", traffic.fetched_bytes as f64),
                ("memory/pushed_bytes", traffic.pushed_bytes as f64),
                ("memory/unchanged_bytes", traffic.unchanged_bytes as f64),
            ]
        }));
        scalars.extend(metrics.validation_loss.map(|loss| ("validation/loss", loss)));
        self.events.scalars(metrics.step, wall_time(), &scalars)?;
        Ok(metrics)
    }
}

/// The lines of a metrics.jsonl; a last line that a kill cut short is left out.
///
/// # Errors
/// When the file cannot be read, or another line is not what [`Metrics`] writes.
pub fn read_metrics(path: &Path) -> Result<Vec<StepMetrics>> {
    Ok(read_lines(path)?.into_iter().map(|(_, metrics)| metrics).collect())
}

/// The text of each line and what it says.
fn read_lines(path: &Path) -> Result<Vec<(String, StepMetrics)>> {
    let file = File::open(path).map_err(|e| Error::file(path, e))?;
    let whole = fs::metadata(path).map_err(|e| Error::file(path, e))?.len();
    let (mut lines, mut read) = (vec![], 0);
    for (i, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(|e| Error::file(path, e))?;
        read += line.len() as u64 + 1;
        match serde_json::from_str(&line) {
            Ok(metrics) => lines.push((line, metrics)),
            // Only a line that does not end in a newline can be one that was being written.
            Err(_) if read > whole => break,
            Err(e) => return Err(Error::file(path, format!("line {}: {e}", i + 1))),
        }
    }
    Ok(lines)
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}
