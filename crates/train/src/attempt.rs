//! Who may write the folder of a run, when several believe that they may.
//!
//! A job that a scheduler has given up, since it no longer hears of it, may still run: cut off from the
//! scheduler and from those that were started in its place, and yet with the same file system. A lock on the
//! folder keeps two apart where a lock reaches all hosts, which it does not on every file system. So each
//! attempt at a run takes a number higher than all before it, by making a folder of that name, which only one
//! can make: `attempts/1795314243`. From then on the earlier ones are over. They are not told, they look:
//!
//! * An attempt writes its checkpoints in its own folder, which the next attempt removes, and never in a
//!   place that another one writes to. One that was held still in the middle of a save finds its files gone,
//!   not those of another under its hands.
//! * A checkpoint is published by renaming its folder, whole, after a look whether there is a later attempt.
//!   The same look comes before metrics are written, before a bank is saved, and before old checkpoints are
//!   removed. It is a listing of one folder.
//! * metrics.jsonl is another file in each attempt, put in the place of the one before: a line that is written
//!   late goes to the file that is no more.
//! * Memory shards are told the number, and take no word of an earlier one.
//!
//! Between a look and the rename after it a process may be held still as well. What then comes late is a whole
//! checkpoint, made from the same checkpoint by the same configuration; it never takes the place of a later
//! attempt's. A file system that shows a new folder to other hosts only after a while (NFS caches listings,
//! for `acdirmax` seconds at most) delays the look by as much.
//!
//! The number is the time in seconds, or one more than the last where a clock is behind: so an attempt at
//! another run on the same shards, in another folder, is later than the one before it too.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::checkpoint::{Checkpoints, DONE, TrainState, write_whole};
use crate::{Error, Result};

/// One attempt at a run: from its beginning or from a checkpoint, until the end or until something fails.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attempt {
    run_dir: PathBuf,
    number: u64,
}

impl Attempt {
    /// Begins an attempt at the run in a folder: those before it are over, and what they had not finished is
    /// removed. `before` is the last one of the same process, which must not have been taken over.
    ///
    /// # Errors
    /// When another process has begun one since `before`, and when the folder cannot be written.
    pub fn begin(run_dir: &Path, before: Option<&Attempt>) -> Result<Self> {
        let root = run_dir.join("attempts");
        fs::create_dir_all(&root).map_err(|e| Error::file(&root, e))?;
        loop {
            before.map_or(Ok(()), Attempt::check)?;
            let last = newest(&root)?;
            let attempt = Self { run_dir: run_dir.into(), number: seconds().max(last.unwrap_or(0) + 1) };
            match fs::create_dir(attempt.dir()) {
                Ok(()) => {
                    atomic_file::sync_folder(&root).map_err(|e| Error::file(&root, e))?;
                    attempt.check()?;
                    attempt.clean()?;
                    return Ok(attempt);
                }
                // Another was faster.
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::file(attempt.dir(), e)),
            }
        }
    }

    /// The attempt that another worker has begun.
    pub fn of(run_dir: &Path, number: u64) -> Self {
        Self { run_dir: run_dir.into(), number }
    }

    /// Higher than those of all attempts before.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The run's folder.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// Where checkpoints are written until they are whole: also the checkpoint root of a local bank.
    pub fn dir(&self) -> PathBuf {
        self.root().join(self.number.to_string())
    }

    /// Fails when a later attempt has begun: this one writes nothing more.
    ///
    /// # Errors
    /// Then, and when the folder cannot be read.
    pub fn check(&self) -> Result<()> {
        match newest(&self.root())? {
            Some(by) if by > self.number => {
                Err(Error::TakenOver { run_dir: self.run_dir.clone(), number: self.number, by })
            }
            _ => Ok(()),
        }
    }

    /// An empty folder for the checkpoint of a step.
    ///
    /// # Errors
    /// As [`Attempt::check`], and when it cannot be made.
    pub fn begin_save(&self, step: u64) -> Result<PathBuf> {
        self.check()?;
        let dir = self.unfinished(step);
        remove(&dir)?;
        // Not its parents: a later attempt has removed them.
        fs::create_dir(&dir).map_err(|e| Error::file(&dir, e))?;
        Ok(dir)
    }

    /// Writes the state of its step beside the rest of the checkpoint.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_state(&self, state: &TrainState) -> Result<()> {
        let path = self.unfinished(state.step).join("state.json");
        let text = serde_json::to_string_pretty(state).map_err(|e| Error::file(&path, e))?;
        write_whole(&path, text.as_bytes())
    }

    /// Makes the checkpoint of `step` one of the run's, and removes all but the newest `keep`.
    ///
    /// # Errors
    /// As [`Attempt::check`], and when files cannot be written or removed.
    pub fn publish(&self, step: u64, keep: usize) -> Result<()> {
        let (checkpoints, from) = (Checkpoints::of(&self.run_dir), self.unfinished(step));
        let (root, to) = (checkpoints.root(), checkpoints.dir(step));
        write_whole(&from.join(DONE), b"")?;
        fs::create_dir_all(root).map_err(|e| Error::file(root, e))?;
        self.check()?;
        let renamed = match fs::rename(&from, &to) {
            Err(e) if [ErrorKind::DirectoryNotEmpty, ErrorKind::AlreadyExists].contains(&e.kind()) => {
                // It came late from an attempt that was over, unless that is this one.
                self.check()?;
                remove(&to)?;
                fs::rename(&from, &to)
            }
            renamed => renamed,
        };
        renamed.map_err(|e| Error::file(&to, e))?;
        atomic_file::sync_folder(root).map_err(|e| Error::file(root, e))?;
        self.check()?;
        let steps = checkpoints.steps()?;
        steps[..steps.len().saturating_sub(keep)].iter().try_for_each(|&old| remove(&checkpoints.dir(old)))
    }

    /// Removes what earlier attempts have not finished.
    fn clean(&self) -> Result<()> {
        for number in numbers(&self.root())?.into_iter().filter(|&number| number < self.number) {
            // One that still writes there may hinder it, and does not matter: the next attempt comes by.
            let _ = fs::remove_dir_all(self.root().join(number.to_string()));
        }
        let checkpoints = Checkpoints::of(&self.run_dir);
        let folders = checkpoints.folders()?;
        folders.iter().filter(|(_, whole)| !whole).try_for_each(|&(step, _)| remove(&checkpoints.dir(step)))
    }

    fn root(&self) -> PathBuf {
        self.run_dir.join("attempts")
    }

    fn unfinished(&self, step: u64) -> PathBuf {
        self.dir().join(format!("{step:08}"))
    }
}

/// Removes a checkpoint that may be there. DONE goes first: a removal that is cut short leaves a folder that
/// does not exist.
fn remove(dir: &Path) -> Result<()> {
    for removed in [fs::remove_file(dir.join(DONE)), fs::remove_dir_all(dir)] {
        match removed {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(Error::file(dir, e)),
            _ => {}
        }
    }
    Ok(())
}

fn newest(root: &Path) -> Result<Option<u64>> {
    Ok(numbers(root)?.into_iter().max())
}

fn numbers(root: &Path) -> Result<Vec<u64>> {
    let mut numbers = vec![];
    for entry in fs::read_dir(root).map_err(|e| Error::file(root, e))? {
        let name = entry.map_err(|e| Error::file(root, e))?.file_name();
        numbers.extend(name.to_str().and_then(|name| name.parse::<u64>().ok()));
    }
    Ok(numbers)
}

fn seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
