use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::TryStreamExt;

use crate::adamw::squared_norm;
use crate::blocking::wait;
use crate::checkpoint::{Column, Entry};
use crate::init::started;
use crate::{BlockPart, BlockSpec, Checkpoint, Manifest, Result};

/// What a saved bank holds, in numbers.
#[derive(Clone, PartialEq, Debug)]
pub struct Inspection {
    /// Its manifest.
    pub manifest: Manifest,
    /// The levels with memory, coarse to fine.
    pub levels: Vec<LevelInspection>,
}

/// One level of a bank, the generic block counted where nothing else is said.
#[derive(Clone, PartialEq, Debug)]
pub struct LevelInspection {
    /// The level, 0 the coarsest.
    pub level: usize,
    /// Blocks, the generic one not counted.
    pub n_blocks: u64,
    /// Blocks updated at least once.
    pub n_touched: u64,
    /// Parameters, the generic block not counted.
    pub n_parameters: u64,
    /// Bytes of the weights of all blocks, the generic one too, touched or not.
    pub bytes: u64,
    /// Mean number of updates of the touched blocks; 0 when there are none.
    pub mean_updates: f64,
    /// Most updates of one block.
    pub max_updates: u64,
    /// L2 norm of the M3 (of LoRA memory B, of KV memory the values) of all touched blocks together: how far the
    /// memory is from adding nothing.
    pub m3_norm: f64,
}

/// Reads a `memory` folder: only touched blocks are read, each checked.
pub fn inspect(memory_folder: &Path) -> Result<Inspection> {
    wait(memory_folder, async { inspect_checkpoint(&Checkpoint::open_folder(memory_folder).await?).await })
}

/// Reads a checkpoint, wherever it lies: as [`inspect`].
pub async fn inspect_checkpoint(checkpoint: &Checkpoint) -> Result<Inspection> {
    let (spec, optimizer) = (checkpoint.spec(), checkpoint.optimizer().await?);
    let mut levels = Vec::new();
    for level in spec.levels() {
        let (n_blocks, len) = (spec.n_blocks(level), spec.block_len(level));
        let entries = checkpoint.entries(level);
        let updates = |entry: &Entry| optimizer.steps(entry, level);
        let mut m3_squared = 0f64;
        let column = Column { level, tensor: 0 };
        let mut pieces =
            std::pin::pin!(checkpoint.read(Arc::clone(checkpoint.values()), column, entries.to_vec()));
        while let Some(piece) = pieces.try_next().await? {
            let squared =
                |block: &Bytes| m3_squared_norm(spec, level, &bytemuck::pod_collect_to_vec::<u8, f32>(block));
            m3_squared += piece.iter().map(squared).sum::<f64>();
        }
        levels.push(LevelInspection {
            level,
            n_blocks: n_blocks as u64,
            n_touched: entries.len() as u64,
            n_parameters: n_blocks as u64 * len as u64,
            bytes: (n_blocks as u64 + 1) * len as u64 * size_of::<f32>() as u64,
            mean_updates: entries.iter().map(updates).sum::<u64>() as f64 / entries.len().max(1) as f64,
            max_updates: entries.iter().map(updates).max().unwrap_or_default(),
            m3_norm: m3_squared.sqrt(),
        });
    }
    Ok(Inspection { manifest: checkpoint.manifest().clone(), levels })
}

fn m3_squared_norm(spec: &BlockSpec, level: usize, block: &[f32]) -> f64 {
    let of = |BlockPart { layer, part, range }: BlockPart| {
        let first = started(spec, layer, part, range.len());
        squared_norm(&block[range][first..])
    };
    spec.parts(level).into_iter().map(of).sum()
}
