//! The anchor as it serves: weights packed once, keys and values in pages, and steps of several sequences with
//! memory of their own.
//!
//! A sequence's scores have the same bits alone and among others, and however its tokens are cut into steps: they
//! depend on its tokens and its memory only. On the CPU; the general path is [`crate::Anchor::hidden`].

mod memory;
mod step;

use candle_core::{DType, Device};
use memory_bank::BlockDtype;
use ops::decode::{FfnWeights, Held, KvShape, Matrix};

pub use memory::{PackedBlock, PathMemory};
pub use ops::decode::{KvPages, SequenceCache};
pub use step::{Logits, Scores, Segment};

use crate::weights::Rotations;
use crate::{Anchor, AnchorConfig, Error, LayerShape, Result};

/// How a decoder is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecoderOptions {
    /// How the anchor's matrices are held: `F32` or `Bf16`. Activations and sums are f32.
    pub weights: BlockDtype,
}

/// An anchor with its matrices packed for steps of few rows.
pub struct Decoder {
    config: AnchorConfig,
    rope: Rotations,
    token_embedding: Option<Matrix>, // [V, D], none when the output is tied to it
    layers: Vec<Layer>,
    final_norm: Vec<f32>, // [D]
    output: Matrix,       // [V, D]
}

struct Layer {
    shape: LayerShape,
    attention_norm: Vec<f32>,              // [D]
    qkv: Matrix,                           // [(H + 2·G)·K, D]
    query_norm: Option<Vec<f32>>,          // [H·K] or [K]
    key_norm: Option<Vec<f32>>,            // [G·K] or [K]
    attention_output: Matrix,              // [D, H·K]
    attention_post_norm: Option<Vec<f32>>, // [D]
    ffn_norm: Vec<f32>,                    // [D]
    ffn: FfnWeights,
    ffn_post_norm: Option<Vec<f32>>, // [D]
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
        let (v, d) = (config.vocab_size, config.d_model);
        let matrix = |name: &str, shape| -> Result<Matrix> { Ok(Matrix::new(&values(name)?, shape, held)) };
        let has = |name: &str| anchor.parameters().contains_key(name);
        let maybe = |name: &str| has(name).then(|| values(name)).transpose();
        let layer = |i: usize| -> Result<Layer> {
            let of = |name: &str| format!("layers.{i}.{name}");
            let shape = config.layer(i);
            let (a, e) = (shape.query_width(), shape.kv_width());
            let qkv = [values(&of("query"))?, values(&of("key"))?, values(&of("value"))?].concat();
            let mut qkv = Matrix::new(&qkv, (a + 2 * e, d), held);
            if let Some(bias) = maybe(&of("query_bias"))? {
                qkv = qkv.with_bias([bias, values(&of("key_bias"))?, values(&of("value_bias"))?].concat());
            }
            let mut attention_output = matrix(&of("attention_output"), (d, a))?;
            if let Some(bias) = maybe(&of("attention_output_bias"))? {
                attention_output = attention_output.with_bias(bias);
            }
            let mut ffn = FfnWeights::new(&values(&of("ffn"))?, d, held);
            if let Some(inner) = maybe(&of("ffn_inner_bias"))? {
                ffn = ffn.with_biases(inner, values(&of("ffn_outer_bias"))?);
            }
            Ok(Layer {
                shape,
                attention_norm: values(&of("attention_norm"))?,
                qkv,
                query_norm: maybe(&of("query_norm"))?,
                key_norm: maybe(&of("key_norm"))?,
                attention_output,
                attention_post_norm: maybe(&of("attention_post_norm"))?,
                ffn_norm: values(&of("ffn_norm"))?,
                ffn,
                ffn_post_norm: maybe(&of("ffn_post_norm"))?,
            })
        };
        let (token_embedding, output) = match config.tied_embeddings {
            true => (None, "token_embedding"),
            false => (Some(matrix("token_embedding", (v, d))?), "output"),
        };
        Ok(Self {
            rope: Rotations::of(&config),
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
        KvPages::position_bytes(&self.kv_shape())
    }

    fn kv_shape(&self) -> KvShape {
        let kv_heads = self.config.layers().map(|layer| layer.kv_heads).collect();
        KvShape { kv_heads, head_width: self.config.head_width }
    }
}
