//! Fetched memory as the leaves of a backward pass: the touched blocks, never the bank.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use cluster_tree::{ClusterId, ClusterPath};
use memory_bank::{Block, BlockPart, BlockSpec, LoraMatrix, MemoryKind, MemoryPart};
use ops::{FfnPart, Gradients, KvPart, LoraPart, Run, Traced};

use crate::{AnchorConfig, Error, Result};

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
    spec: Option<BlockSpec>,
}

struct Level {
    ids: Vec<ClusterId>,
    /// Per block its parts, in the order of [`BlockSpec::parts`].
    blocks: Vec<Vec<Tensor>>,
    /// Index into `ids` per sequence.
    block_of_sequence: Vec<usize>,
}

/// The memory of one layer, per level: weights, and the rows that they serve.
#[derive(Clone)]
pub(crate) enum LayerMemory {
    /// None: the layer alone.
    None,
    /// What widens its FFN.
    Ffn(Vec<FfnPart>),
    /// What is added to some of its matrices.
    Lora(Vec<(LoraMatrix, Vec<LoraPart>)>),
    /// Pairs beside those of its attention.
    Kv(Vec<KvPart>),
}

impl LayerMemory {
    /// What is added to a matrix.
    pub(crate) fn lora(&self, matrix: LoraMatrix) -> &[LoraPart] {
        let Self::Lora(parts) = self else { return &[] };
        parts.iter().find(|(of, _)| *of == matrix).map_or(&[], |(_, parts)| parts)
    }

    /// Whether something is added to the matrices of the FFN.
    pub(crate) fn has_ffn_lora(&self) -> bool {
        matches!(self, Self::Lora(parts) if parts.iter().any(|(of, _)| *of == LoraMatrix::Down))
    }
}

/// Fails unless memory of this spec is for an anchor of this shape.
pub(crate) fn check_fits(spec: &BlockSpec, config: &AnchorConfig) -> Result<()> {
    if (spec.n_layers, spec.d_model) != (config.n_layers, config.d_model) {
        return Err(Error::MemoryShape {
            found_layers: spec.n_layers,
            found_width: spec.d_model,
            layers: config.n_layers,
            width: config.d_model,
        });
    }
    if spec.kind == MemoryKind::Ffn {
        return Ok(());
    }
    let differs = |layer: &usize| spec.inner_of(*layer) != config.layer(*layer).widths();
    match (0..config.n_layers).find(differs) {
        None => Ok(()),
        Some(layer) => {
            let (found, expected) = (spec.inner_of(layer), config.layer(layer).widths());
            Err(Error::MemoryWidths { layer, found, expected })
        }
    }
}

/// The shape of a part of a block of width `r`, as operations take it.
fn part_shape(spec: &BlockSpec, BlockPart { layer, part, range }: &BlockPart, r: usize) -> Vec<usize> {
    match part {
        MemoryPart::Ffn => vec![3, r, spec.d_model],
        MemoryPart::Lora(_) => vec![range.len()],
        MemoryPart::Kv => vec![2, r, spec.inner_of(*layer).key_value],
    }
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
            let parts = spec.parts(level);
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
                values.push((&block.values[..], expected.into()));
            }
            let parts_of = |tensor: Tensor| {
                let tensor = tensor.to_device(device)?.to_dtype(dtype)?;
                let part = |part: &BlockPart| {
                    let shape = part_shape(spec, part, spec.width[level]);
                    tensor.narrow(0, part.range.start, part.range.len())?.reshape(shape)
                };
                parts.iter().map(part).collect::<candle_core::Result<_>>()
            };
            let tensors = ops::on_pool(|| ops::tensors_of(&values))?;
            let blocks = tensors.into_iter().map(parts_of).collect::<candle_core::Result<_>>()?;
            Ok(Level { ids, blocks, block_of_sequence })
        };
        let levels = spec.levels().map(build).collect::<Result<_>>()?;
        Ok(Self { levels, frozen: false, spec: Some(spec.clone()) })
    }

    /// The same memory without gradients: for evaluation and generation.
    pub fn freeze(self) -> Self {
        Self { frozen: true, ..self }
    }

    /// Slots that the gradients of all blocks take: one a part of a block.
    pub(crate) fn n_slots(&self) -> usize {
        self.levels.iter().flat_map(|level| &level.blocks).map(Vec::len).sum()
    }

    /// Takes the gradients of all blocks, which begin at `first_slot`; none when they are frozen.
    pub(crate) fn take_gradients(&self, gradients: &mut Gradients, first_slot: usize) -> Result<Vec<Block>> {
        let (mut ids, mut of_blocks) = (vec![], vec![]);
        let mut slots = first_slot..;
        for level in self.levels.iter().filter(|_| !self.frozen) {
            for (&id, parts) in level.ids.iter().zip(&level.blocks) {
                let mut take = |slot| {
                    gradients.take(slot).ok_or_else(|| {
                        candle_core::Error::Msg(format!("an operation dropped the gradient of {id}"))
                    })
                };
                ids.push(id);
                of_blocks.push(
                    slots.by_ref().take(parts.len()).map(&mut take).collect::<candle_core::Result<_>>()?,
                );
            }
        }
        let values = ops::values_of(&of_blocks)?;
        Ok(ids.into_iter().zip(values).map(|(id, values)| Block { id, values }).collect())
    }

    /// Fails unless this is memory for an anchor of this shape and a batch of `batch` x `len` tokens.
    pub(crate) fn check(&self, config: &AnchorConfig, (batch, len): (usize, usize)) -> Result<()> {
        if let Some(spec) = &self.spec {
            check_fits(spec, config)?;
        }
        match self.levels.iter().find(|level| level.block_of_sequence.len() != batch) {
            Some(level) => {
                let found = level.block_of_sequence.len();
                Err(Error::Batch { batch, len, what: "memory paths", found })
            }
            None => Ok(()),
        }
    }

    /// Whether it is KV memory, which reads queries that no position has turned.
    pub(crate) fn is_kv(&self) -> bool {
        self.spec.as_ref().is_some_and(|spec| spec.kind == MemoryKind::Kv)
    }

    /// The weights of one layer and the rows they serve, `rows_per_sequence` a sequence. Their gradients go to the
    /// slots from `first_slot` on, or nowhere.
    pub(crate) fn of_layer(
        &self,
        layer: usize,
        rows_per_sequence: usize,
        first_slot: Option<usize>,
    ) -> LayerMemory {
        let Some(spec) = &self.spec else { return LayerMemory::None };
        let Some(place) = spec.memory_layers().position(|with| with == layer) else {
            return LayerMemory::None;
        };
        let kinds = spec.kind.parts();
        // Of each part of the layer, per level its blocks and their rows.
        let of_part = |part: usize| {
            let index = place * kinds.len() + part;
            let mut slot = first_slot.filter(|_| !self.frozen);
            let of_level = move |level: &Level| {
                let block = |parts: &Vec<Tensor>| {
                    let weights = parts[index].clone();
                    let traced = match slot {
                        Some(slot) => Traced::leaf(weights, slot + index),
                        None => Traced::constant(weights),
                    };
                    slot = slot.map(|slot| slot + parts.len());
                    traced
                };
                (level.blocks.iter().map(block).collect::<Vec<_>>(), level.runs(rows_per_sequence))
            };
            self.levels.iter().map(of_level)
        };
        match spec.kind {
            MemoryKind::Ffn => {
                let part = |(blocks, runs)| FfnPart { blocks, runs, bias: None };
                LayerMemory::Ffn(of_part(0).map(part).collect())
            }
            MemoryKind::Kv => {
                LayerMemory::Kv(of_part(0).map(|(blocks, runs)| KvPart { blocks, runs }).collect())
            }
            MemoryKind::Lora { .. } => {
                let matrix = |(i, part): (usize, &MemoryPart)| match part {
                    MemoryPart::Lora(matrix) => {
                        let part = |(blocks, runs)| LoraPart { blocks, runs };
                        Some((*matrix, of_part(i).map(part).collect()))
                    }
                    _ => None,
                };
                LayerMemory::Lora(kinds.iter().enumerate().filter_map(matrix).collect())
            }
        }
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
