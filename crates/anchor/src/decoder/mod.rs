//! The anchor as it serves: weights packed once, keys and values in pages, and steps of several sequences with
//! memory of their own.
//!
//! A sequence's scores have the same bits alone and among others, and however its tokens are cut into steps: they
//! depend on its tokens and its memory only. On the CPU; the general path is [`crate::Anchor::hidden`].

mod memory;
mod step;

use candle_core::{DType, Device};
use memory_bank::BlockDtype;
use ops::RopeTable;
use ops::decode::{FfnWeights, Held, KvShape, Matrix};

pub use memory::{PackedBlock, PathMemory};
pub use ops::decode::{KvPages, SequenceCache};
pub use step::{Logits, Scores, Segment};

use crate::{Anchor, AnchorConfig, Error, Result};

/// How a decoder is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecoderOptions {
    /// How the anchor's matrices are held: `F32` or `Bf16`. Activations and sums are f32.
    pub weights: BlockDtype,
}

/// An anchor with its matrices packed for steps of few rows.
pub struct Decoder {
    config: AnchorConfig,
    rope: RopeTable,
    token_embedding: Option<Matrix>, // [V, D], none when the output is tied to it
    layers: Vec<Layer>,
    final_norm: Vec<f32>, // [D]
    output: Matrix,       // [V, D]
}

struct Layer {
    attention_norm: Vec<f32>, // [D]
    qkv: Matrix,              // [3·H·K, D]
    query_norm: Vec<f32>,     // [H·K]
    key_norm: Vec<f32>,       // [H·K]
    attention_output: Matrix, // [D, H·K]
    ffn_norm: Vec<f32>,       // [D]
    ffn: FfnWeights,
}

impl Decoder {
    /// Packs a copy of the anchor's weights.
    ///
    /// # Errors
    /// On an anchor that is not of f32 on the CPU, and on int8, in which an anchor is not held.
    pub fn new(anchor: &Anchor, options: DecoderOptions) -> Result<Self> {
        if !matches!(anchor.device(), Device::Cpu) || anchor.dtype() != DType::F32 {
            let found = format!("{:?} on {:?}", anchor.dtype(), anchor.device().location());
            return Err(Error::Decoder { what: "an anchor of f32 on the CPU", found });
        }
        let held = match options.weights {
            BlockDtype::F32 => Held::F32,
            BlockDtype::Bf16 => Held::Bf16,
            BlockDtype::Int8 => {
                return Err(Error::Decoder { what: "weights held as f32 or bf16", found: "int8".into() });
            }
        };
        let config = anchor.config().clone();
        let values = |name: &str| -> Result<Vec<f32>> {
            Ok(anchor.parameters()[name].flatten_all()?.to_vec1::<f32>()?)
        };
        let (v, d, a) = (config.vocab_size, config.d_model, config.attention_width());
        let matrix = |name: &str, shape| -> Result<Matrix> { Ok(Matrix::new(&values(name)?, shape, held)) };
        let layer = |i: usize| -> Result<Layer> {
            let of = |name: &str| format!("layers.{i}.{name}");
            let qkv = [values(&of("query"))?, values(&of("key"))?, values(&of("value"))?].concat();
            Ok(Layer {
                attention_norm: values(&of("attention_norm"))?,
                qkv: Matrix::new(&qkv, (3 * a, d), held),
                query_norm: values(&of("query_norm"))?,
                key_norm: values(&of("key_norm"))?,
                attention_output: matrix(&of("attention_output"), (d, a))?,
                ffn_norm: values(&of("ffn_norm"))?,
                ffn: FfnWeights::new(&values(&of("ffn"))?, d, held),
            })
        };
        let (token_embedding, output) = match config.tied_embeddings {
            true => (None, "token_embedding"),
            false => (Some(matrix("token_embedding", (v, d))?), "output"),
        };
        Ok(Self {
            rope: RopeTable::new(config.max_seq_len, config.head_width, config.rope_base),
            token_embedding,
            layers: (0..config.n_layers).map(layer).collect::<Result<_>>()?,
            final_norm: values("final_norm")?,
            output: matrix(output, (v, d))?,
            config,
        })
    }

    /// The configuration of the anchor.
    pub fn config(&self) -> &AnchorConfig {
        &self.config
    }

    /// Bytes of the packed matrices.
    pub fn bytes(&self) -> usize {
        let layer = |layer: &Layer| layer.qkv.bytes() + layer.attention_output.bytes() + layer.ffn.bytes();
        let ends = self.output.bytes() + self.token_embedding.as_ref().map_or(0, Matrix::bytes);
        ends + self.layers.iter().map(layer).sum::<usize>()
    }

    /// Pages for the keys and values of `n_positions` of this anchor.
    pub fn pages(&self, n_positions: usize) -> KvPages {
        KvPages::new(self.kv_shape(), n_positions)
    }

    /// Bytes of the keys and values of a position.
    pub fn position_bytes(&self) -> usize {
        KvPages::position_bytes(self.kv_shape())
    }

    fn kv_shape(&self) -> KvShape {
        let AnchorConfig { n_layers, n_heads: heads, head_width, .. } = self.config;
        KvShape { n_layers, heads, head_width }
    }
}
