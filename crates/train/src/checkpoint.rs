//! A run's checkpoints: `checkpoints/<step>/…` with DONE written last. [`Attempt`](crate::Attempt) writes them.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// All that resumes, as data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainState {
    /// Optimizer steps done.
    pub step: u64,
    /// Targets scored so far.
    pub tokens_seen: u64,
    /// Targets that the initial anchor had been trained on before this run.
    pub tokens_before: u64,
}

/// The folder `checkpoints` of a run.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    root: PathBuf,
}

/// Written last; a folder without it does not exist.
pub(crate) const DONE: &str = "DONE";

impl Checkpoints {
    /// Those under `<run_dir>/checkpoints`.
    pub fn of(run_dir: &Path) -> Self {
        Self { root: run_dir.join("checkpoints") }
    }

    /// The folder that holds them.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of one step.
    pub fn dir(&self, step: u64) -> PathBuf {
        self.root.join(format!("{step:08}"))
    }

    /// Steps of the whole checkpoints, ascending.
    ///
    /// # Errors
    /// When the folder exists and cannot be read.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let mut steps: Vec<u64> =
            self.folders()?.into_iter().filter(|(_, whole)| *whole).map(|(step, _)| step).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// The newest whole checkpoint.
    ///
    /// # Errors
    /// As [`Checkpoints::steps`].
    pub fn latest(&self) -> Result<Option<u64>> {
        Ok(self.steps()?.last().copied())
    }

    /// The newest whole checkpoint of a run that must have one.
    ///
    /// # Errors
    /// When there is none.
    pub fn require_latest(&self) -> Result<u64> {
        self.latest()?.ok_or_else(|| Error::file(&self.root, "no whole checkpoint (none has a file DONE)"))
    }

    /// The state saved at `step`.
    ///
    /// # Errors
    /// When state.json cannot be read.
    pub fn state(&self, step: u64) -> Result<TrainState> {
        let path = self.dir(step).join("state.json");
        let text = fs::read_to_string(&path).map_err(|e| Error::file(&path, e))?;
        serde_json::from_str(&text).map_err(|e| Error::file(&path, e))
    }

    /// Every folder named by a step, and whether it is whole.
    pub(crate) fn folders(&self) -> Result<Vec<(u64, bool)>> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
            Err(e) => return Err(Error::file(&self.root, e)),
        };
        let mut folders = vec![];
        for entry in entries {
            let entry = entry.map_err(|e| Error::file(&self.root, e))?;
            let Some(step) = entry.file_name().to_str().and_then(|name| name.parse::<u64>().ok()) else {
                continue;
            };
            // A folder of another form of the same number is not ours.
            if entry.path() == self.dir(step) {
                folders.push((step, entry.path().join(DONE).exists()));
            }
        }
        Ok(folders)
    }
}

/// Writes a whole file or none.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    atomic_file::write(path, bytes).map_err(|e| Error::file(path, e))
}
