use std::sync::Arc;

use cluster_tree::ClusterId;
use memory_bank::{BlockSpec, Encoded};
use ops::decode::{FfnWeights, Held};

use crate::{Error, Result};

/// A memory block packed for products, as the caches hold it: its numbers are as they were encoded.
pub struct PackedBlock {
    id: ClusterId,
    d_model: usize,
    layers: Vec<FfnWeights>,
}

impl PackedBlock {
    /// Packs a block of a bank of these sizes, on all threads.
    ///
    /// # Errors
    /// When it has another length than the spec says.
    pub fn pack(id: ClusterId, block: &Encoded, spec: &BlockSpec) -> Result<Self> {
        spec.check(id)?;
        let (expected, found) = (spec.block_len(usize::from(id.level)), block.len());
        if expected != found {
            return Err(Error::BlockLength { id, expected, found });
        }
        let d = spec.d_model;
        let layer_len = expected / spec.n_layers;
        let layer = |i: usize| {
            let range = i * layer_len..(i + 1) * layer_len;
            match block {
                Encoded::F32(values) => FfnWeights::new(&values[range], d, Held::F32),
                Encoded::Bf16(values) => {
                    let bits: Vec<u16> = values[range].iter().map(|value| value.to_bits()).collect();
                    FfnWeights::of_bf16(&bits, d)
                }
                Encoded::Int8 { scales, values } => {
                    let rows = layer_len / d;
                    FfnWeights::of_int8(&values[range], &scales[i * rows..(i + 1) * rows], d)
                }
            }
        };
        Ok(Self { id, d_model: d, layers: ops::on_pool(|| (0..spec.n_layers).map(layer).collect()) })
    }

    /// The cluster it belongs to.
    pub fn id(&self) -> ClusterId {
        self.id
    }

    /// Bytes of its numbers.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.bytes() as u64).sum()
    }

    /// Layers and d_model of the anchor it is for.
    pub(super) fn shape(&self) -> (usize, usize) {
        (self.layers.len(), self.d_model)
    }

    pub(super) fn layer(&self, layer: usize) -> &FfnWeights {
        &self.layers[layer]
    }
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
