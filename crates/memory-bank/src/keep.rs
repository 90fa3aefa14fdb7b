//! Which saves stay, and the removal of what no save needs.

use std::collections::BTreeSet;
use std::path::Path;

use futures::stream::{self, StreamExt, TryStreamExt};

use crate::bank_store::{manifest_path, step_of_manifest};
use crate::schedule::setting;
use crate::segment::Part;
use crate::tensor_file::io_error;
use crate::{BankStore, Manifest, Result, Step};

/// Removals at the same time.
const REMOVALS: usize = 16;

/// What [`BankStore::keep`] has removed.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Pruned {
    /// Saves, ascending.
    pub steps: Vec<Step>,
    /// Files beside their manifests.
    pub n_files: usize,
    /// Bytes of those.
    pub bytes: u64,
}

impl BankStore {
    /// Keeps the newest `n` saves. Of the others, first the manifests go; then, of the steps before the
    /// newest save, every file that no kept manifest names, those that a killed save left behind too. So
    /// it may be killed anywhere, and called again. It does not touch what is newer than the newest save:
    /// the next one may be at work.
    pub async fn keep(&self, n: usize) -> Result<Pruned> {
        self.check_access()?;
        if n == 0 {
            return Err(setting("saves to keep", "at least 1", n));
        }
        let (mut kept, mut old) = (Vec::<Manifest>::new(), Vec::new());
        for step in self.steps().await?.into_iter().rev() {
            match kept.len() < n {
                true => match self.manifest(step).await? {
                    Some(manifest) => kept.push(manifest),
                    // Cut short. Before the newest save it is nobody's; after it, of one at work.
                    None if !kept.is_empty() => old.push(step),
                    None => {}
                },
                false => old.push(step),
            }
        }
        let Some(newest) = kept.first().map(|manifest| manifest.step) else { return Ok(Pruned::default()) };
        self.remove_all(old.iter().map(|&step| manifest_path(step)).collect()).await?;
        let mut named: BTreeSet<String> = kept.iter().map(|manifest| manifest_path(manifest.step)).collect();
        for segment in kept.iter().flat_map(|manifest| &manifest.segments) {
            named.extend([Part::Values, Part::Optimizer].map(|part| segment.file(part).path.clone()));
        }
        let mut files = self.files.list().await?;
        files.retain(|(path, _)| {
            // A manifest that has come since is not ours to remove.
            let is_before = step_of(path).is_some_and(|step| step < newest);
            is_before && step_of_manifest(path).is_none() && !named.contains(path)
        });
        let (n_files, bytes) = (files.len(), files.iter().map(|(_, bytes)| bytes).sum());
        self.remove_all(files.into_iter().map(|(path, _)| path).collect()).await?;
        if let Some(folder) = &self.folder {
            sweep(folder, newest)?;
        }
        old.reverse();
        Ok(Pruned { steps: old, n_files, bytes })
    }

    async fn remove_all(&self, paths: Vec<String>) -> Result<()> {
        let remove = |path: String| {
            let files = self.files.clone();
            async move { files.remove(&path).await }
        };
        stream::iter(paths).map(remove).buffer_unordered(REMOVALS).try_collect().await
    }
}

/// The step in whose folder a file is.
fn step_of(path: &str) -> Option<Step> {
    let (folder, _) = path.split_once('/')?;
    folder.parse().ok().map(Step).filter(|step| format!("{:08}", step.0) == folder)
}

/// Removes what the store does not list from the local folders of steps before `newest`: files that were
/// never finished, whose names have a `#`, and folders that are empty.
fn sweep(folder: &Path, newest: Step) -> Result<()> {
    let failed = |source| io_error(folder, source);
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().map(|name| format!("{}/", name.display()));
        if name.and_then(|name| step_of(&name)).is_none_or(|step| step >= newest) {
            continue;
        }
        for file in std::fs::read_dir(&path).map_err(failed)? {
            let file = file.map_err(failed)?.path();
            if file.display().to_string().rsplit('/').next().is_some_and(|name| name.contains('#')) {
                std::fs::remove_file(&file).map_err(|source| io_error(&file, source))?;
            }
        }
        // One that is not empty stays.
        let _ = std::fs::remove_dir(&path);
    }
    Ok(())
}
