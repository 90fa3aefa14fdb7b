//! Which stages of a prepared folder are finished, and for which inputs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::files::{read_json, write_json};
use crate::source::hex;
use crate::{Error, Result};

/// The stages in the order in which they run; each is made from those before it.
pub const STAGES: [&str; 4] = ["tokenise", "embed", "cluster", "pack"];

/// Whether `stage` was finished in `dir` with these inputs. Fails on a name that is no stage and on a
/// damaged `stages.json`.
pub fn stage_is_current(dir: &Path, stage: &str, inputs_hash: &str) -> Result<bool> {
    position(stage)?;
    Ok(read(dir)?.get(stage).is_some_and(|hash| hash == inputs_hash))
}

/// Whether `stage` was finished in `dir`, with whatever inputs. Fails as [`stage_is_current`].
pub fn stage_is_finished(dir: &Path, stage: &str) -> Result<bool> {
    position(stage)?;
    Ok(read(dir)?.contains_key(stage))
}

/// Call before a stage changes the folder: from here on neither it nor a later stage counts as
/// finished. `tokenise` and `pack` do it themselves.
pub fn begin_stage(dir: &Path, stage: &str) -> Result<()> {
    let first = position(stage)?;
    let mut finished = read(dir)?;
    let n_finished = finished.len();
    finished.retain(|name, _| STAGES[..first].contains(&name.as_str()));
    if finished.len() == n_finished {
        return Ok(());
    }
    write_json(&path(dir), &finished)
}

/// Call after a stage's last file is in its place.
pub fn finish_stage(dir: &Path, stage: &str, inputs_hash: &str) -> Result<()> {
    position(stage)?;
    let mut finished = read(dir)?;
    finished.insert(stage.to_owned(), inputs_hash.to_owned());
    write_json(&path(dir), &finished)
}

/// One hash for several inputs: sha256 over each part with its length, as hexadecimal digits.
pub fn hash_inputs<T: AsRef<str>>(parts: &[T]) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        let part = part.as_ref();
        // The length keeps ("ab", "c") and ("a", "bc") apart.
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hex(&hasher.finalize())
}

fn position(stage: &str) -> Result<usize> {
    let position = STAGES.iter().position(|name| *name == stage);
    position.ok_or_else(|| Error::UnknownStage { found: stage.to_owned() })
}

fn path(dir: &Path) -> PathBuf {
    dir.join("stages.json")
}

fn read(dir: &Path) -> Result<BTreeMap<String, String>> {
    Ok(read_json(&path(dir))?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_is_current_until_it_or_an_earlier_one_begins() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        assert!(!stage_is_current(dir, "tokenise", "a").unwrap());
        for stage in STAGES {
            finish_stage(dir, stage, "a").unwrap();
        }
        assert!(stage_is_current(dir, "pack", "a").unwrap());
        assert!(!stage_is_current(dir, "pack", "b").unwrap());
        begin_stage(dir, "embed").unwrap();
        let current = STAGES.map(|stage| stage_is_current(dir, stage, "a").unwrap());
        assert_eq!(current, [true, false, false, false]);
        assert!(!dir.join("stages.json.tmp").exists());
    }

    #[test]
    fn unknown_stages_and_damaged_files_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let error = finish_stage(dir.path(), "tokenize", "a").unwrap_err().to_string();
        assert_eq!(error, "expected a stage (tokenise, embed, cluster, pack), found `tokenize`");
        std::fs::write(dir.path().join("stages.json"), "[").unwrap();
        assert!(matches!(stage_is_current(dir.path(), "pack", "a"), Err(Error::WrongFile { .. })));
    }

    #[test]
    fn inputs_do_not_run_together() {
        assert_ne!(hash_inputs(&["ab", "c"]), hash_inputs(&["a", "bc"]));
        assert_eq!(hash_inputs(&["a"]), hash_inputs(&["a".to_owned()]));
    }
}
