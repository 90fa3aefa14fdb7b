//! Runs as jobs of Slurm.

use std::path::Path;

use anyhow::{Context, Result, bail};
use launch::slurm::{self, JobId, Script, Site};
use train::{Checkpoints, StepMetrics};

use super::{Submission, Submitted, find};
use crate::run::write_whole;

/// The script that sbatch is given.
pub(super) fn render(submission: &Submission, site: &Site) -> Result<String> {
    let Submission { dir, shape, .. } = submission;
    let name = dir.file_name().map_or("anchorage".into(), |name| name.to_string_lossy().into_owned());
    let script = Script {
        name: &name,
        program: &std::env::current_exe().context("the program that the job runs")?,
        config: &submission.folder().join("config.toml"),
        folder: &std::env::current_dir().context("the folder that the job runs in")?,
        workers: shape.workers,
        shards: shape.shards,
        site,
    };
    Ok(script.render()?)
}

/// Fails while the run is a job that is not over.
pub(super) fn refuse_second(dir: &Path) -> Result<()> {
    if let Some(Submitted::Slurm { id }) = find(dir)?
        && let Some(found) = slurm::find(id)?.filter(|found| !found.is_over())
    {
        let dir = dir.display();
        bail!("{dir}: job {id} of this run is {}: `anchorage job cancel {dir}` ends it", found.state);
    }
    Ok(())
}

/// Gives the script to Slurm.
pub(super) fn submit(submission: &Submission, script: &str) -> Result<JobId> {
    let path = submission.folder().join("script.sh");
    write_whole(&path, script.as_bytes())?;
    let id = slurm::submit(&path, &submission.dir)?;
    submission.note(&Submitted::Slurm { id })?;
    Ok(id)
}

pub(super) fn status(run: &Path, id: JobId) -> Result<()> {
    match slurm::find(id)? {
        None => println!("job {id}: over, and forgotten by Slurm"),
        Some(found) => {
            let reason = if found.reason == "None" { String::new() } else { format!(" ({})", found.reason) };
            let nodes = if found.nodes.is_empty() { String::new() } else { format!(" on {}", found.nodes) };
            println!(
                "job {id}: {}{reason}{nodes}, {} of {}, queued again {} times",
                found.state, found.run_time, found.time_limit, found.restarts
            );
        }
    }
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    let last: Option<StepMetrics> = text.lines().rev().find_map(|line| serde_json::from_str(line).ok());
    let saved = Checkpoints::of(run).latest()?;
    match (last, saved) {
        (None, _) => println!("no step yet"),
        (Some(last), saved) => {
            let saved = saved.map_or("nothing saved".to_owned(), |step| format!("saved at step {step}"));
            println!("step {}, loss {:.4}, {saved}", last.step, last.loss);
        }
    }
    Ok(())
}

pub(super) fn cancel(id: JobId) -> Result<()> {
    match slurm::find(id)? {
        None => bail!("job {id}: expected one that waits or runs, found none: Slurm has forgotten it"),
        Some(found) if found.is_over() => {
            bail!("job {id}: expected one that waits or runs, found it {}", found.state)
        }
        Some(_) => slurm::cancel(id)?,
    }
    println!("job {id} is cancelled");
    Ok(())
}

pub(super) fn requeue(id: JobId) -> Result<()> {
    match slurm::find(id)? {
        Some(found) if found.state == "RUNNING" => {
            slurm::stop(id)?;
            println!("job {id} is told to save, and is then queued again");
        }
        _ => {
            slurm::requeue(id)?;
            println!("job {id} is queued again");
        }
    }
    Ok(())
}
