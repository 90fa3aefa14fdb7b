//! `anchorage top`: the workers and shards of a run, as they are now.

use std::fmt::Write as _;
use std::fs;
use std::io::{IsTerminal, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::{Spent, Status, every, folder};

#[derive(Args)]
pub(crate) struct TopArgs {
    /// Folder of the run.
    run: PathBuf,
    /// Show it once and end, as is done where the output is no terminal.
    #[arg(long)]
    once: bool,
    /// One line of JSON: the workers in order of their ranks.
    #[arg(long)]
    json: bool,
}

/// Between two looks.
const EVERY: Duration = Duration::from_secs(1);
/// A worker that has missed so many writes is told of.
const MISSED: f64 = 5.0;

pub(crate) fn top(args: &TopArgs) -> Result<()> {
    let mut out = std::io::stdout();
    let follows = !args.once && !args.json && out.is_terminal();
    loop {
        let workers = read(&args.run)?;
        if args.json {
            println!("{}", serde_json::to_string(&workers)?);
            return Ok(());
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
        let view = view(&args.run.display().to_string(), &workers, now);
        if !follows {
            print!("{view}");
            return Ok(());
        }
        // From the upper left corner; what is left of the last view goes.
        let lines = view.replace('\n', "\x1b[K\n");
        write!(out, "\x1b[H{lines}\x1b[J")?;
        out.flush()?;
        std::thread::park_timeout(EVERY);
    }
}

/// What the workers of the run's last job have written, by rank.
fn read(run: &Path) -> Result<Vec<Status>> {
    let folder = folder(run);
    let mut workers: Vec<Status> = vec![];
    for entry in fs::read_dir(&folder).into_iter().flatten() {
        let path = entry.with_context(|| format!("{}", folder.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let text = fs::read(&path).with_context(|| format!("{}", path.display()))?;
            workers.push(serde_json::from_slice(&text).with_context(|| format!("{}", path.display()))?);
        }
    }
    // A job of more workers may have been there before.
    let newest = workers.iter().max_by(|a, b| a.time.total_cmp(&b.time)).map(|newest| newest.world_size);
    workers.retain(|worker| worker.rank < newest.unwrap_or(0));
    workers.sort_by_key(|worker| worker.rank);
    if workers.is_empty() {
        bail!("{}: expected what workers tell while they train, found nothing", folder.display());
    }
    Ok(workers)
}

fn view(run: &str, workers: &[Status], now: f64) -> String {
    let first = &workers[0];
    let mut text = format!("{run}: step {} of {}", first.step, first.steps);
    let _ = write!(text, " ({:.1} %)", 100.0 * first.step as f64 / first.steps.max(1) as f64);
    let _ = write!(text, ", loss {:.4}", first.loss);
    if let Some(loss) = first.validation_loss {
        let _ = write!(text, ", held out {loss:.4}");
    }
    if first.tokens_per_s > 0.0 {
        let _ = write!(text, ", {:.0} tokens/s", first.tokens_per_s);
        if let Some(mfu) = first.mfu {
            let _ = write!(text, ", MFU {:.1} %", 100.0 * mfu);
        }
    }
    let _ = write!(text, ", goodput {:.1} %", 100.0 * first.goodput);
    if let Some(left) = first.seconds_left {
        let _ = write!(text, ", {} left", duration(left));
    }
    match first.checkpoint {
        Some(step) => text.push_str(&format!(", checkpoint {step}\n\n")),
        None => text.push_str(", no checkpoint\n\n"),
    }
    let heads = ["worker", "step", "ms/step"].into_iter().chain(Spent::CAUSES);
    let heads = heads.chain(["back", "fetched", "pushed", "state"]).map(str::to_owned);
    let mut rows: Vec<Vec<String>> = vec![heads.collect()];
    for worker in workers {
        let total = worker.recent.total();
        let mut row = vec![worker.rank.to_string(), worker.step.to_string(), format!("{total:.0}")];
        let part = |ms: f64| if total > 0.0 { format!("{:.0} %", 100.0 * ms / total) } else { "-".into() };
        row.extend(worker.recent.values().map(part));
        row.extend([worker.rollbacks.to_string(), bytes(worker.fetched_bytes), bytes(worker.pushed_bytes)]);
        let silence = now - worker.time;
        row.push(match silence > MISSED * every(worker.world_size).as_secs_f64() {
            true => format!("{}, silent for {}", worker.state, duration(silence)),
            false => worker.state.clone(),
        });
        rows.push(row);
    }
    text.push_str(&table(&rows));
    if !first.shards.is_empty() {
        text.push('\n');
        let mut rows = vec![["shard", "step", "pending", "blocks", "address"].map(str::to_owned).to_vec()];
        for (i, shard) in first.shards.iter().enumerate() {
            let last = shard
                .error
                .as_ref()
                .map_or(shard.address.clone(), |error| format!("{}: {error}", shard.address));
            let numbers = [shard.applied, shard.pending, shard.touched].map(|n| n.to_string());
            rows.push([i.to_string()].into_iter().chain(numbers).chain([last]).collect());
        }
        text.push_str(&table(&rows));
    }
    text
}

/// Columns to the right, the last one to the left.
fn table(rows: &[Vec<String>]) -> String {
    let n = rows[0].len();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..n - 1).map(width).collect();
    let mut text = String::new();
    for row in rows {
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(text, "{cell:>width$}  ");
        }
        text.push_str(&row[n - 1]);
        text.push('\n');
    }
    text
}

fn duration(seconds: f64) -> String {
    let s = seconds.max(0.0) as u64;
    match s {
        0..=119 => format!("{s} s"),
        120..=7199 => format!("{} min", s / 60),
        7200..=172_799 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        _ => format!("{} days {} h", s / 86_400, s % 86_400 / 3600),
    }
}

fn bytes(n: u64) -> String {
    match n {
        0..=999_999 => format!("{:.1} kB", n as f64 / 1e3),
        1_000_000..=999_999_999 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.1} GB", n as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ShardStatus;

    #[test]
    fn a_view_shows_every_worker_and_shard() {
        let recent = Spent { fetch: 10.0, compute: 80.0, other: 10.0, ..Spent::default() };
        let worker = Status {
            world_size: 2,
            state: "training".into(),
            time: 1000.0,
            step: 50,
            steps: 200,
            loss: 2.5,
            tokens_per_s: 1234.0,
            mfu: Some(0.385),
            goodput: 0.97,
            seconds_left: Some(9000.0),
            checkpoint: Some(40),
            recent,
            fetched_bytes: 2_500_000,
            shards: vec![
                ShardStatus { address: "a:1".into(), applied: 50, touched: 7, ..ShardStatus::default() },
                ShardStatus {
                    address: "b:2".into(),
                    error: Some("refused".into()),
                    ..ShardStatus::default()
                },
            ],
            ..Status::default()
        };
        let silent = Status { rank: 1, time: 900.0, shards: vec![], ..worker.clone() };
        let text = view("runs/x", &[worker, silent], 1001.0);
        for expected in [
            "runs/x: step 50 of 200 (25.0 %), loss 2.5000, 1234 tokens/s, MFU 38.5 %, goodput 97.0 %, 2 h 30 min left, checkpoint 40",
            "10 %     80 %     0 %   0 %     0 %   10 %     0   2.5 MB  0.0 kB  training\n",
            "training, silent for 101 s",
            "    0    50        0       7  a:1\n",
            "b:2: refused",
        ] {
            assert!(text.contains(expected), "{expected}\n{text}");
        }
    }
}
