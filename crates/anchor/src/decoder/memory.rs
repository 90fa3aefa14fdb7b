use std::sync::Arc;

use cluster_tree::ClusterId;
use memory_bank::{BlockPart, BlockSpec, Encoded, MemoryPart};
use ops::decode::{FfnWeights, Held, KvWeights, LoraWeights};

use crate::memory::check_fits;
use crate::{AnchorConfig, Error, Result};

/// A memory block packed for products, as the caches hold it: its numbers are as they were encoded.
pub struct PackedBlock {
    id: ClusterId,
    spec: BlockSpec,
    /// Layer by layer, as [`BlockSpec::parts`] has them.
    parts: Vec<PackedPart>,
}

/// A part of a block.
enum PackedPart {
    Ffn(FfnWeights),
    Lora(LoraWeights),
    Kv(KvWeights),
}

impl PackedBlock {
    /// Packs a block of a bank of these sizes, on all threads. Integers of LoRA memory are held as f32, since a scale
    /// of theirs is of a part of a row.
    ///
    /// # Errors
    /// When it has another length than the spec says.
    pub fn pack(id: ClusterId, block: &Encoded, spec: &BlockSpec) -> Result<Self> {
        spec.check(id)?;
        let (expected, found) = (spec.block_len(usize::from(id.level)), block.len());
        if expected != found {
            return Err(Error::BlockLength { id, expected, found });
        }
        let parts = spec.parts(usize::from(id.level));
        let pack = |part: BlockPart| PackedPart::pack(part, block, spec);
        let parts = ops::on_pool(|| parts.into_iter().map(pack).collect());
        Ok(Self { id, spec: spec.clone(), parts })
    }

    /// The cluster it belongs to.
    pub fn id(&self) -> ClusterId {
        self.id
    }

    /// Bytes of its numbers.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(PackedPart::bytes).sum::<usize>() as u64
    }

    /// Fails unless it is for an anchor of this shape.
    pub(super) fn check(&self, config: &AnchorConfig) -> Result<()> {
        check_fits(&self.spec, config)
    }

    /// What widens the FFN of a layer.
    pub(super) fn ffn(&self, layer: usize) -> Option<&FfnWeights> {
        match self.part(layer, MemoryPart::Ffn)? {
            PackedPart::Ffn(weights) => Some(weights),
            _ => None,
        }
    }

    /// What is added to the matrix of a layer that `part` is of.
    pub(super) fn lora(&self, layer: usize, part: MemoryPart) -> Option<&LoraWeights> {
        match self.part(layer, part)? {
            PackedPart::Lora(weights) => Some(weights),
            _ => None,
        }
    }

    /// The pairs beside those of a layer's attention.
    pub(super) fn kv(&self, layer: usize) -> Option<&KvWeights> {
        match self.part(layer, MemoryPart::Kv)? {
            PackedPart::Kv(weights) => Some(weights),
            _ => None,
        }
    }

    fn part(&self, layer: usize, part: MemoryPart) -> Option<&PackedPart> {
        let kinds = self.spec.kind.parts();
        let of_kind = kinds.iter().position(|of| *of == part)?;
        let place = self.spec.memory_layers().position(|with| with == layer)?;
        self.parts.get(place * kinds.len() + of_kind)
    }
}

/// Numbers of a part, as its block holds them.
enum Numbers<'a> {
    F32(&'a [f32]),
    /// Their bits.
    Bf16(Vec<u16>),
    Int8 {
        values: &'a [i8],
        scales: &'a [f32],
    },
}

impl PackedPart {
    fn pack(BlockPart { layer, part, range }: BlockPart, block: &Encoded, spec: &BlockSpec) -> Self {
        let (row_len, widths) = (spec.row_len(), spec.inner_of(layer));
        let numbers = match block {
            Encoded::F32(values) => Numbers::F32(&values[range]),
            Encoded::Bf16(values) => {
                Numbers::Bf16(values[range].iter().map(|value| value.to_bits()).collect())
            }
            Encoded::Int8 { scales, values } => {
                let rows = range.start / row_len..range.end / row_len;
                Numbers::Int8 { values: &values[range], scales: &scales[rows] }
            }
        };
        match part {
            MemoryPart::Ffn => Self::Ffn(match numbers {
                Numbers::F32(values) => FfnWeights::new(values, spec.d_model, Held::F32),
                Numbers::Bf16(values) => FfnWeights::of_bf16(&values, spec.d_model),
                Numbers::Int8 { values, scales } => FfnWeights::of_int8(values, scales, spec.d_model),
            }),
            MemoryPart::Lora(matrix) => {
                let sizes = matrix.widths(spec.d_model, widths);
                Self::Lora(match numbers {
                    Numbers::F32(values) => LoraWeights::new(values, sizes, Held::F32),
                    Numbers::Bf16(values) => LoraWeights::of_bf16(&values, sizes),
                    Numbers::Int8 { values, scales } => {
                        LoraWeights::new(&widened(values, scales, row_len), sizes, Held::F32)
                    }
                })
            }
            MemoryPart::Kv => {
                let sizes = (widths.key_value, widths.head);
                Self::Kv(match numbers {
                    Numbers::F32(values) => KvWeights::new(values, sizes, Held::F32),
                    Numbers::Bf16(values) => KvWeights::of_bf16(&values, sizes),
                    Numbers::Int8 { values, scales } if row_len.is_multiple_of(widths.head) => {
                        KvWeights::of_int8(values, (scales, row_len), sizes)
                    }
                    // Heads of several widths: a scale is not of whole ones.
                    Numbers::Int8 { values, scales } => {
                        KvWeights::new(&widened(values, scales, row_len), sizes, Held::F32)
                    }
                })
            }
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Ffn(weights) => weights.bytes(),
            Self::Lora(weights) => weights.bytes(),
            Self::Kv(weights) => weights.bytes(),
        }
    }
}

/// Integers times the scales of their rows.
fn widened(values: &[i8], scales: &[f32], row_len: usize) -> Vec<f32> {
    let row = |(row, scale): (&[i8], &f32)| row.iter().map(|&x| f32::from(x) * scale).collect::<Vec<_>>();
    values.chunks_exact(row_len).zip(scales).flat_map(row).collect()
}

/// The blocks of a path, coarse to fine; none is the plain anchor. Sequences that share a block share its `Arc`.
#[derive(Clone, Default)]
pub struct PathMemory(Arc<[Arc<PackedBlock>]>);

impl PathMemory {
    /// The memory of these blocks.
    pub fn new(blocks: Vec<Arc<PackedBlock>>) -> Self {
        Self(blocks.into())
    }

    /// The blocks.
    pub fn blocks(&self) -> &[Arc<PackedBlock>] {
        &self.0
    }
}
