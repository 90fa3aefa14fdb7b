//! Fetched memory as the leaves of a backward pass: the touched blocks, never the bank.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Shape, Tensor};
use cluster_tree::{ClusterId, ClusterPath};
use memory_bank::{Block, BlockSpec};
use ops::{FfnPart, Gradients, Run, Traced};

use crate::{Error, Result};

/// The blocks that `paths` need, each once, levels in order: what to fetch for a batch.
pub fn unique_ids(paths: &[ClusterPath], spec: &BlockSpec) -> Vec<ClusterId> {
    let wanted: BTreeSet<ClusterId> =
        paths.iter().flat_map(|path| path.ids().filter(|id| spec.width[usize::from(id.level)] > 0)).collect();
    wanted.into_iter().collect()
}

/// The memory of one batch: per level the unique blocks, and each sequence's block.
///
/// With no level it is the plain anchor.
#[derive(Default)]
pub struct FetchedMemory {
    levels: Vec<Level>,
    frozen: bool,
    shape: Option<(usize, usize)>, // (n_layers, d_model)
}

struct Level {
    ids: Vec<ClusterId>,
    /// Per block its layers, each [3, R, D].
    blocks: Vec<Vec<Tensor>>,
    /// Index into `ids` per sequence.
    block_of_sequence: Vec<usize>,
}

impl FetchedMemory {
    /// No memory: the plain anchor.
    pub fn none() -> Self {
        Self::default()
    }

    /// Moves `blocks` to the device in `dtype`, to be trained, for sequences that follow `paths`.
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
            let shape = Shape::from((spec.n_layers, 3, spec.width[level], spec.d_model));
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
                values.push((&block.values[..], shape.clone()));
            }
            let layers_of = |tensor: Tensor| {
                let tensor = tensor.to_device(device)?.to_dtype(dtype)?;
                (0..spec.n_layers).map(|layer| tensor.get(layer)).collect::<candle_core::Result<_>>()
            };
            let tensors = ops::on_pool(|| ops::tensors_of(&values))?;
            let blocks = tensors.into_iter().map(layers_of).collect::<candle_core::Result<_>>()?;
            Ok(Level { ids, blocks, block_of_sequence })
        };
        let levels = spec.levels().map(build).collect::<Result<_>>()?;
        Ok(Self { levels, frozen: false, shape: Some((spec.n_layers, spec.d_model)) })
    }

    /// The same memory without gradients: for evaluation and generation.
    pub fn freeze(self) -> Self {
        Self { frozen: true, ..self }
    }

    /// Slots that the gradients of all blocks take: one a block and layer.
    pub(crate) fn n_slots(&self) -> usize {
        self.levels.iter().flat_map(|level| &level.blocks).map(Vec::len).sum()
    }

    /// Takes the gradients of all blocks, which begin at `first_slot`; none when they are frozen.
    pub(crate) fn take_gradients(&self, gradients: &mut Gradients, first_slot: usize) -> Result<Vec<Block>> {
        let (mut ids, mut of_blocks) = (vec![], vec![]);
        let mut slots = first_slot..;
        for level in self.levels.iter().filter(|_| !self.frozen) {
            for (&id, layers) in level.ids.iter().zip(&level.blocks) {
                let mut take = |slot| {
                    gradients.take(slot).ok_or_else(|| {
                        candle_core::Error::Msg(format!("an operation dropped the gradient of {id}"))
                    })
                };
                ids.push(id);
                of_blocks.push(
                    slots.by_ref().take(layers.len()).map(&mut take).collect::<candle_core::Result<_>>()?,
                );
            }
        }
        let values = ops::values_of(&of_blocks)?;
        Ok(ids.into_iter().zip(values).map(|(id, values)| Block { id, values }).collect())
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

    /// Per level, the weights of one layer and the rows they serve, `rows_per_sequence` a sequence. Their
    /// gradients go to the slots from `first_slot` on, or nowhere.
    pub(crate) fn parts(
        &self,
        layer: usize,
        rows_per_sequence: usize,
        first_slot: Option<usize>,
    ) -> Vec<FfnPart> {
        let mut slot = first_slot.filter(|_| !self.frozen);
        let mut parts = vec![];
        for level in &self.levels {
            let mut block = |layers: &Vec<Tensor>| {
                let weights = layers[layer].clone();
                let traced = match slot {
                    Some(slot) => Traced::leaf(weights, slot + layer),
                    None => Traced::constant(weights),
                };
                slot = slot.map(|slot| slot + layers.len());
                traced
            };
            let blocks = level.blocks.iter().map(&mut block).collect();
            parts.push(FfnPart { blocks, runs: level.runs(rows_per_sequence), bias: None });
        }
        parts
    }
}

impl Level {
    fn runs(&self, rows_per_sequence: usize) -> Vec<Run> {
        let mut runs: Vec<Run> = vec![];
        for (sequence, &block) in self.block_of_sequence.iter().enumerate() {
            match runs.last_mut() {
                Some(run) if run.block == block => run.n_rows += rows_per_sequence,
                _ => {
                    let first_row = sequence * rows_per_sequence;
                    runs.push(Run { block, first_row, n_rows: rows_per_sequence });
                }
            }
        }
        runs
    }
}
