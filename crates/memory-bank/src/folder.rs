//! A whole bank in one folder of this machine, there completely or not at all.

use std::fs;
use std::path::Path;

use crate::files::{Files, Parts};
use crate::manifest::{FORMAT, MANIFEST};
use crate::tensor_file::io_error;
use crate::write::{Target, write_rows};
use crate::{Identity, Manifest, Result, Snapshot};

const PARTS: Parts = Parts { bytes: 8 << 20, in_flight: 4 };

/// Writes a bank to `<root>/<step>/memory`, the step in eight digits. A folder that is there already is
/// replaced.
pub(crate) async fn save(identity: &Identity, snapshot: Snapshot, root: &Path) -> Result<()> {
    let step_folder = root.join(format!("{:08}", snapshot.step.0));
    fs::create_dir_all(&step_folder).map_err(|source| io_error(&step_folder, source))?;
    let target = step_folder.join("memory");
    let temporary = target.with_extension("tmp");
    remove_folder(&temporary)?;
    fs::create_dir(&temporary).map_err(|source| io_error(&temporary, source))?;
    if let Err(error) = fill(identity, snapshot, &temporary).await {
        // The first error is the one to report.
        let _ = remove_folder(&temporary);
        return Err(error);
    }
    remove_folder(&target)?;
    fs::rename(&temporary, &target).map_err(|source| io_error(&target, source))?;
    sync_folder(&step_folder)?;
    sync_folder(root)
}

/// The files do not depend on who writes them, so a bank that was resumed writes the same.
async fn fill(identity: &Identity, snapshot: Snapshot, folder: &Path) -> Result<()> {
    let Identity { spec, seed, hashes } = identity.clone();
    let (files, step) = (Files::local(folder)?, snapshot.step);
    let mut touched = vec![0; spec.n_levels()];
    snapshot.rows.iter().for_each(|(id, _)| touched[usize::from(id.level)] += 1);
    let mut segments = Vec::new();
    if !snapshot.rows.is_empty() {
        let target = Target { files: &files, stem: String::new(), shard: 0, step, parts: PARTS };
        segments.push(write_rows(&spec, target, snapshot.rows).await?);
    }
    let format = FORMAT.to_owned();
    let manifest = Manifest { format, spec, step, seed, hashes, n_shards: 1, touched, segments };
    let path = folder.join(MANIFEST);
    atomic_file::write(&path, &manifest.to_json()).map_err(|source| io_error(&path, source))
}

fn remove_folder(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(io_error(folder, source)),
        _ => Ok(()),
    }
}

/// A rename is durable once its folder is.
fn sync_folder(folder: &Path) -> Result<()> {
    atomic_file::sync_folder(folder).map_err(|source| io_error(folder, source))
}
