use std::fs;
use std::path::Path;

use bytes::Bytes;
use cluster_tree::ClusterId;
use futures::stream::{self, StreamExt, TryStreamExt};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;

use crate::bank_store::unique;
use crate::files::{Files, Parts};
use crate::segment::block_bytes;
use crate::tensor_file::{Tensor, header_with, io_error};
use crate::{Checkpoint, Result, StoreBank};

const PARTS: Parts = Parts { bytes: 8 << 20, in_flight: 4 };
/// Bytes of blocks made at once, unless one block is larger.
const BATCH_BYTES: u64 = 32 << 20;
/// Batches made at the same time.
const BATCHES: usize = 2;

/// The numbers of an exported file.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Precision {
    /// As they are.
    F32,
    /// Rounded to the nearest bf16.
    Bf16,
}

/// The file that an export has written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Exported {
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256, in hex.
    pub sha256: String,
}

/// Writes the weights of all blocks, those never updated too, into one safetensors file at `path`: a
/// tensor `level{l}` for each level with memory, `[n_blocks + 1, …]`, … being [`crate::BlockSpec::block_shape`], the
/// generic block last, and in its metadata the sizes as JSON, `spec`. So
/// Python's `safe_open(path, "np").get_slice("level3")[i]` reads one block. The file is there once it is
/// whole.
pub async fn export(checkpoint: &Checkpoint, path: &Path, precision: Precision) -> Result<Exported> {
    let spec = checkpoint.spec();
    let dtype = match precision {
        Precision::F32 => Dtype::F32,
        Precision::Bf16 => Dtype::BF16,
    };
    let tensor = |level: usize| {
        let sizes = [vec![spec.n_blocks(level) + 1], spec.block_shape(level)].concat();
        let shape = sizes.into_iter().map(|size| size as u64).collect();
        Tensor { name: format!("level{level}"), dtype, shape }
    };
    let text = serde_json::to_string(spec).unwrap_or_default();
    let start = header_with(&spec.levels().map(tensor).collect::<Vec<_>>(), Some(("spec", text)));

    let bank = StoreBank::new(checkpoint.clone());
    let batch = move |ids: Vec<ClusterId>| {
        let bank = bank.clone();
        async move {
            let blocks = bank.fetch_bytes(&ids).await?;
            Ok(stream::iter(blocks.into_iter().map(move |block| Ok(converted(block, precision)))))
        }
    };
    let blocks = stream::iter(batches(checkpoint)).map(batch).buffered(BATCHES).try_flatten();

    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // A store's names allow less than a file system's do.
    let temporary = format!("export-{}.tmp", unique());
    let written = Files::local(folder)?.write(&temporary, start.into(), blocks, PARTS).await?;
    if let Err(source) = fs::rename(folder.join(&temporary), path) {
        // The first error is the one to report.
        let _ = fs::remove_file(folder.join(&temporary));
        return Err(io_error(path, source));
    }
    atomic_file::sync_folder(folder).map_err(|source| io_error(folder, source))?;
    Ok(Exported { bytes: written.bytes, sha256: written.sha256 })
}

/// All blocks, level by level and row by row, some at a time.
fn batches(checkpoint: &Checkpoint) -> impl Iterator<Item = Vec<ClusterId>> + Send + use<> {
    let spec = checkpoint.spec().clone();
    let levels: Vec<usize> = spec.levels().collect();
    levels.into_iter().flat_map(move |level| {
        let (spec, n_rows) = (spec.clone(), spec.n_blocks(level) + 1);
        let size = (BATCH_BYTES / block_bytes(&spec, level)).max(1) as usize;
        (0..n_rows).step_by(size).map(move |start| {
            (start..(start + size).min(n_rows)).map(|row| spec.id_of_row(level, row)).collect()
        })
    })
}

fn converted(block: Bytes, precision: Precision) -> Bytes {
    match precision {
        Precision::F32 => block,
        Precision::Bf16 => {
            let values = bytemuck::pod_collect_to_vec::<u8, f32>(&block);
            let mut rounded = vec![bf16::ZERO; values.len()];
            rounded.convert_from_f32_slice(&values);
            Bytes::copy_from_slice(bytemuck::cast_slice(&rounded))
        }
    }
}
