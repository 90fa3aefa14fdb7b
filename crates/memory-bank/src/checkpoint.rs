//! A shard into files and back.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use crate::manifest::{FORMAT, FileRecord, Manifest, OPTIMIZER, VALUES, Verify, verify};
use crate::tensor_file::{Reader, Writer, io_error, mismatch, optimizer_tensors, value_tensors};
use crate::{BlockSpec, Result, Row, Shard, ShardOptions, init_block};

/// Bytes of blocks made at once while writing, unless one block is larger.
const BATCH_BYTES: usize = 64 << 20;

/// Writes a shard to `<root>/<step>/memory`, the step in eight digits. The folder appears complete
/// or not at all; one that is there already is replaced.
pub(crate) fn save(shard: &Shard, root: &Path, hashes: &BTreeMap<String, String>) -> Result<()> {
    let step_folder = root.join(format!("{:08}", shard.applied().0));
    fs::create_dir_all(&step_folder).map_err(|source| io_error(&step_folder, source))?;
    replace_folder(&step_folder.join("memory"), |folder| write_folder(shard, hashes, folder))?;
    sync_folder(root)
}

/// Reads a shard back, to continue to the bit. Checks every file in full; fails when the folder
/// holds a bank of another spec or seed, or one that belongs to other hashes.
pub(crate) fn resume(
    folder: &Path,
    spec: BlockSpec,
    options: ShardOptions,
    hashes: &BTreeMap<String, String>,
) -> Result<Shard> {
    let manifest = verify(folder, Verify::Full)?;
    manifest.check_same(folder, &spec, options.seed, hashes)?;
    let mut values = Reader::open(&folder.join(VALUES), &value_tensors(&spec))?;
    let mut optimizer = Reader::open(&folder.join(OPTIMIZER), &optimizer_tensors(&spec))?;
    let steps = read_steps(&mut optimizer, folder, &manifest)?;
    let mut rows = Vec::new();
    for (place, level) in spec.levels().enumerate() {
        let len = spec.block_len(level);
        // The tensors of steps come first, one a level, then two of moments a level.
        let m = spec.levels().count() + 2 * place;
        for (row, &steps) in steps[place].iter().enumerate().filter(|&(_, &steps)| steps > 0) {
            let state = Row {
                values: Arc::new(values.read(place, row * len, len)?),
                m: Arc::new(optimizer.read(m, row * len, len)?),
                v: Arc::new(optimizer.read(m + 1, row * len, len)?),
                steps,
                last: manifest.step,
            };
            rows.push((spec.id_of_row(level, row), state));
        }
    }
    Shard::with_rows(spec, options, manifest.step, rows)
}

/// The update counts of every row, per level with memory. Fails when they are not those that the
/// manifest counts.
pub(crate) fn read_steps(
    optimizer: &mut Reader,
    folder: &Path,
    manifest: &Manifest,
) -> Result<Vec<Vec<u64>>> {
    let spec = &manifest.spec;
    let mut all = Vec::new();
    for (place, level) in spec.levels().enumerate() {
        let steps: Vec<u64> = optimizer.read(place, 0, spec.n_blocks(level) + 1)?;
        let n_touched = steps.iter().filter(|&&steps| steps > 0).count() as u64;
        if n_touched != manifest.touched[level] {
            let what = format!("number of touched blocks of level {level}");
            return Err(mismatch(&folder.join(OPTIMIZER), &what, manifest.touched[level], n_touched));
        }
        all.push(steps);
    }
    Ok(all)
}

/// Makes a folder under a temporary name beside `target` and renames it once `write` has filled it.
/// When `write` fails, nothing stays behind and a folder that was there before is as it was.
fn replace_folder(target: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let temporary = target.with_extension("tmp");
    remove_folder(&temporary)?;
    fs::create_dir(&temporary).map_err(|source| io_error(&temporary, source))?;
    let written = write(&temporary).and_then(|()| sync_folder(&temporary));
    if written.is_err() {
        // The first error is the one to report.
        let _ = remove_folder(&temporary);
        return written;
    }
    remove_folder(target)?;
    fs::rename(&temporary, target).map_err(|source| io_error(target, source))?;
    sync_folder(target.parent().unwrap_or(target))
}

fn write_folder(shard: &Shard, hashes: &BTreeMap<String, String>, folder: &Path) -> Result<()> {
    let path = |name: &str| -> PathBuf { folder.join(name) };
    let (values, optimizer) =
        rayon::join(|| write_values(shard, &path(VALUES)), || write_optimizer(shard, &path(OPTIMIZER)));
    let manifest = Manifest {
        format: FORMAT.to_owned(),
        spec: shard.spec().clone(),
        step: shard.applied(),
        seed: shard.options().seed,
        touched: shard.n_touched().into_iter().map(|n| n as u64).collect(),
        files: BTreeMap::from([(VALUES.to_owned(), values?), (OPTIMIZER.to_owned(), optimizer?)]),
        hashes: hashes.clone(),
    };
    manifest.write(folder)
}

/// Every block, the untouched ones too: whoever reads the file need not know how they are made.
fn write_values(shard: &Shard, path: &Path) -> Result<FileRecord> {
    let spec = shard.spec();
    let mut writer = Writer::create(path, &value_tensors(spec))?;
    for level in spec.levels() {
        let n_rows = spec.n_blocks(level) + 1;
        let batch = (BATCH_BYTES / (spec.block_len(level) * size_of::<f32>())).max(1);
        for start in (0..n_rows).step_by(batch) {
            let rows = start..(start + batch).min(n_rows);
            let values = |row| {
                let id = spec.id_of_row(level, row);
                match shard.row(id) {
                    Some(row) => Cow::Borrowed(row.values.as_slice()),
                    None => Cow::Owned(init_block(spec, shard.options().seed, id)),
                }
            };
            let blocks: Vec<Cow<[f32]>> = rows.into_par_iter().map(values).collect();
            blocks.iter().try_for_each(|block| writer.write(block))?;
        }
    }
    writer.finish()
}

/// The state of untouched blocks is zeros, left as holes.
fn write_optimizer(shard: &Shard, path: &Path) -> Result<FileRecord> {
    let spec = shard.spec();
    let mut writer = Writer::create(path, &optimizer_tensors(spec))?;
    let rows = |level| (0..=spec.n_blocks(level)).map(move |row| shard.row(spec.id_of_row(level, row)));
    for level in spec.levels() {
        let steps: Vec<u64> = rows(level).map(|row| row.map_or(0, |row| row.steps)).collect();
        writer.write(&steps)?;
    }
    for level in spec.levels() {
        let n_bytes = (spec.block_len(level) * size_of::<f32>()) as u64;
        for moment in [|row: &Row| Arc::clone(&row.m), |row: &Row| Arc::clone(&row.v)] {
            for row in rows(level) {
                match row {
                    Some(row) => writer.write(&moment(row))?,
                    None => writer.skip(n_bytes),
                }
            }
        }
    }
    writer.finish()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AdamW, Error, MemoryKind, Placement, Schedule, Step};

    fn shard() -> Shard {
        let (width, branching) = (vec![64], vec![32]);
        let spec = BlockSpec { kind: MemoryKind::Ffn, n_layers: 2, d_model: 64, width, branching };
        let schedule = Schedule { peak: 0.1, floor: 0.1, warmup_steps: 0, total_steps: 1 };
        let adamw = AdamW { schedule, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, clip: None };
        let options =
            ShardOptions { seed: 1, adamw, world_size: 1, staleness: 0, placement: Placement::WHOLE };
        Shard::with_rows(spec, options, Step(1), []).unwrap()
    }

    /// `/dev/full` is a disk without space: every write to it fails as one on a full disk does.
    #[test]
    fn a_full_disk_leaves_no_folder() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("memory");
        let full = |folder: &Path| {
            write_values(&shard(), &folder.join(VALUES))?;
            assert!(folder.join(VALUES).exists());
            write_optimizer(&shard(), Path::new("/dev/full")).map(|_| ())
        };
        let is_full = |result| match result {
            Err(Error::Io { path, source }) => {
                path == Path::new("/dev/full") && source.kind() == std::io::ErrorKind::StorageFull
            }
            _ => false,
        };
        assert!(is_full(replace_folder(&target, full)));
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);

        // A folder that was there before is as it was.
        replace_folder(&target, |folder| write_folder(&shard(), &BTreeMap::new(), folder)).unwrap();
        assert!(is_full(replace_folder(&target, full)));
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
        verify(&target, Verify::Full).unwrap();
    }

    /// A file that outgrows the buffer fails while rows are written, not only at the end.
    #[test]
    fn a_disk_that_fills_up_half_way_is_an_error() {
        let shard = shard();
        assert!(shard.spec().bank_len() * 4 > 1 << 20);
        assert!(matches!(write_values(&shard, Path::new("/dev/full")), Err(Error::Io { .. })));
    }

    #[test]
    fn untouched_state_takes_no_space() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(OPTIMIZER);
        let record = write_optimizer(&shard(), &path).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), record.bytes);
        assert!(metadata.blocks() * 512 < record.bytes / 10, "{} blocks", metadata.blocks());
    }
}
