use std::path::Path;
use std::sync::Arc;

use futures::stream::{self, StreamExt, TryStreamExt};
use sha2::{Digest, Sha256};
use tokio::task::spawn_blocking;

use crate::blocking::wait;
use crate::checkpoint::{Column, Entry, Indices};
use crate::manifest::hex;
use crate::tensor_file::mismatch;
use crate::{Checkpoint, Error, Manifest, Result, Verify};

/// Files read at the same time.
const FILES: usize = 4;

/// What a full check has read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verification {
    /// Files beside the manifest.
    pub n_files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Blocks in them, those of which a later segment has a newer content counted too.
    pub n_blocks: u64,
}

/// Checks the files of a `memory` folder against its manifest, and returns it. Fails on a file that is
/// missing or of another size, index or hash, and on a manifest that is not one.
pub fn verify(memory_folder: &Path, verify: Verify) -> Result<Manifest> {
    wait(memory_folder, async {
        let checkpoint = Checkpoint::open_folder(memory_folder).await?;
        match verify {
            Verify::Sizes => checkpoint.optimizer().await.map(|_| ())?,
            Verify::Full => verify_checkpoint(&checkpoint).await.map(|_| ())?,
        }
        Ok(checkpoint.manifest().clone())
    })
}

/// Reads every file of a checkpoint in full, and checks its hash and every block.
pub async fn verify_checkpoint(checkpoint: &Checkpoint) -> Result<Verification> {
    let optimizer = checkpoint.optimizer().await?;
    let n_segments = checkpoint.manifest().segments.len();
    let kinds = [checkpoint.values(), &optimizer];
    let files = (0..n_segments).flat_map(|segment| {
        kinds.map(|indices| verify_file(checkpoint.clone(), Arc::clone(indices), segment))
    });
    let files: Vec<_> = files.collect();
    let n_files = files.len();
    let bytes: Vec<u64> = stream::iter(files).buffer_unordered(FILES).try_collect().await?;
    let rows = checkpoint.manifest().segments.iter().flat_map(|segment| &segment.rows);
    Ok(Verification { n_files, bytes: bytes.iter().sum(), n_blocks: rows.sum() })
}

/// Returns the bytes read.
async fn verify_file(checkpoint: Checkpoint, indices: Arc<Indices>, segment: usize) -> Result<u64> {
    let file = checkpoint.manifest().segments[segment].file(indices.part);
    let (layout, index) = &indices.segments[segment];
    let start = checkpoint.files().read(file, 0..layout.index_bytes).await?;
    let (mut hasher, mut n_bytes) = (Sha256::new_with_prefix(&start), start.len() as u64);
    for (level, found) in index.iter().enumerate() {
        let entry = |(place, &row)| Entry { row, segment: segment as u32, place: place as u32 };
        let entries: Vec<Entry> = found.rows.iter().enumerate().map(entry).collect();
        for tensor in 0..layout.n_tensors() {
            let column = Column { level, tensor };
            let mut pieces = std::pin::pin!(checkpoint.read(Arc::clone(&indices), column, entries.clone()));
            while let Some(piece) = pieces.try_next().await? {
                n_bytes += piece.iter().map(|block| block.len() as u64).sum::<u64>();
                let hash = move || {
                    piece.iter().for_each(|block| hasher.update(block));
                    hasher
                };
                hasher = spawn_blocking(hash).await.map_err(|source| Error::Task { source })?;
            }
        }
    }
    let found = hex(&hasher.finalize());
    if found != file.sha256 {
        return Err(mismatch(&checkpoint.files().place(&file.path), "sha256", &file.sha256, found));
    }
    Ok(n_bytes)
}
