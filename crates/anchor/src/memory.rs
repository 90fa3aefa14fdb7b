//! Fetched memory as the leaves of the autograd graph: the touched blocks, never the bank.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use cluster_tree::{ClusterId, ClusterPath};
use memory_bank::{Block, BlockSpec};
use ops::Run;

use crate::{Error, Result};

/// The blocks that `paths` need, each once, levels in order: what to fetch for a batch.
pub fn unique_ids(paths: &[ClusterPath], spec: &BlockSpec) -> Vec<ClusterId> {
    let wanted: BTreeSet<ClusterId> =
        paths.iter().flat_map(|path| path.ids().filter(|id| spec.width[usize::from(id.level)] > 0)).collect();
    wanted.into_iter().collect()
}

/// The memory of one batch: per level the unique blocks as variables, and each sequence's block.
///
/// With no level it is the plain anchor.
#[derive(Default)]
pub struct FetchedMemory {
    levels: Vec<Level>,
    shape: Option<(usize, usize)>, // (n_layers, d_model)
}

struct Level {
    ids: Vec<ClusterId>,
    /// One a layer, [U, 3, R, D]: variables, until they are frozen.
    layers: Vec<Tensor>,
    /// Index into `ids` per sequence.
    block_of_sequence: Vec<usize>,
}

impl FetchedMemory {
    /// No memory: the plain anchor.
    pub fn none() -> Self {
        Self::default()
    }

    /// Moves `blocks` to the device as variables of `dtype`, for sequences that follow `paths`.
    ///
    /// # Errors
    /// When a path's block is missing or has another length than `spec` says.
    pub fn to_device(
        blocks: &[Block],
        paths: &[ClusterPath],
        spec: &BlockSpec,
        (device, dtype): (&Device, DType),
    ) -> Result<Self> {
        let by_id: BTreeMap<ClusterId, &Block> = blocks.iter().map(|block| (block.id, block)).collect();
        let build = |level: usize| -> Result<Level> {
            let used: BTreeSet<u32> = paths.iter().map(|path| path.index(level)).collect();
            let ids: Vec<ClusterId> =
                used.into_iter().map(|index| ClusterId { level: level as u8, index }).collect();
            let place = |path: &ClusterPath| {
                ids.binary_search(&ClusterId { level: level as u8, index: path.index(level) })
                    .expect("ids were gathered from these paths")
            };
            let block_of_sequence: Vec<usize> = paths.iter().map(place).collect();
            let mut values = Vec::with_capacity(ids.len());
            for (i, &id) in ids.iter().enumerate() {
                let sequence = || block_of_sequence.iter().position(|&b| b == i).unwrap_or_default();
                let block = by_id.get(&id).ok_or_else(|| Error::BlockNotFetched {
                    id,
                    sequence: sequence(),
                    n_blocks: blocks.len(),
                })?;
                let (expected, found) = (spec.block_len(level), block.values.len());
                if expected != found {
                    return Err(Error::BlockLength { id, expected, found });
                }
                values.push(&block.values[..]);
            }
            let shape = (ids.len(), 3, spec.width[level], spec.d_model);
            let layer_len = spec.block_len(level) / spec.n_layers;
            let layer = |layer: usize| -> Result<Tensor> {
                let rows: Vec<&[f32]> = values.iter().map(|v| &v[layer * layer_len..][..layer_len]).collect();
                let tensor = Tensor::from_vec(rows.concat(), shape, device)?.to_dtype(dtype)?;
                Ok(Var::from_tensor(&tensor)?.into_inner())
            };
            let layers = (0..spec.n_layers).map(layer).collect::<Result<_>>()?;
            Ok(Level { ids, layers, block_of_sequence })
        };
        let levels = spec.levels().map(build).collect::<Result<_>>()?;
        Ok(Self { levels, shape: Some((spec.n_layers, spec.d_model)) })
    }

    /// The same memory outside the autograd graph: for evaluation and generation.
    pub fn freeze(mut self) -> Self {
        let layers = self.levels.iter_mut().flat_map(|level| &mut level.layers);
        layers.for_each(|weights| *weights = weights.detach());
        self
    }

    /// The gradients of all blocks, summed over the sequences that share one.
    ///
    /// # Errors
    /// When the graph that made `grads` did not use this memory.
    pub fn grads(&self, grads: &GradStore) -> Result<Vec<Block>> {
        let mut blocks = vec![];
        for level in &self.levels {
            let first = blocks.len();
            let block_len = level.layers.iter().map(Tensor::elem_count).sum::<usize>() / level.ids.len();
            let block = |&id| Block { id, values: Vec::with_capacity(block_len) };
            blocks.extend(level.ids.iter().map(block));
            for weights in &level.layers {
                let gradient = grads.get(weights).ok_or_else(|| {
                    candle_core::Error::Msg(
                        "a memory block is not part of the graph that was differentiated".into(),
                    )
                })?;
                let gradient = gradient.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?;
                let gradient = gradient.to_vec1::<f32>()?;
                let len = gradient.len() / level.ids.len();
                for (block, values) in blocks[first..].iter_mut().zip(gradient.chunks_exact(len)) {
                    block.values.extend_from_slice(values);
                }
            }
        }
        Ok(blocks)
    }

    /// Fails unless this is memory for an anchor of this shape and a batch of `batch` x `len` tokens.
    pub(crate) fn check(
        &self,
        (n_layers, d_model): (usize, usize),
        (batch, len): (usize, usize),
    ) -> Result<()> {
        match self.shape {
            Some((layers, width)) if (layers, width) != (n_layers, d_model) => Err(Error::MemoryShape {
                found_layers: layers,
                found_width: width,
                layers: n_layers,
                width: d_model,
            }),
            _ => match self.levels.iter().find(|level| level.block_of_sequence.len() != batch) {
                Some(level) => {
                    let found = level.block_of_sequence.len();
                    Err(Error::Batch { batch, len, what: "memory paths", found })
                }
                None => Ok(()),
            },
        }
    }

    /// Per level, the weights of one layer and the runs of rows by block, `rows_per_sequence` each.
    pub(crate) fn layer(
        &self,
        layer: usize,
        rows_per_sequence: usize,
    ) -> impl Iterator<Item = (&Tensor, Vec<Run>)> {
        self.levels.iter().map(move |level| {
            let mut runs: Vec<Run> = vec![];
            for (sequence, &block) in level.block_of_sequence.iter().enumerate() {
                match runs.last_mut() {
                    Some(run) if run.block == block => run.n_rows += rows_per_sequence,
                    _ => {
                        let first_row = sequence * rows_per_sequence;
                        runs.push(Run { block, first_row, n_rows: rows_per_sequence });
                    }
                }
            }
            (&level.layers[layer], runs)
        })
    }
}
