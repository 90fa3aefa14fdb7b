//! The encoder: word pieces to one vector each.

use ops::{Activation, Dense, LayerNorm, SelfAttention};

use crate::Result;
use crate::settings::Settings;
use crate::weights::Weights;

/// The weights of an encoder.
pub(crate) struct Model {
    words: Vec<f32>,     // [V, D]
    positions: Vec<f32>, // [positions, D], the vector of the first segment added
    norm: LayerNorm,
    layers: Vec<Layer>,
    width: usize,
    heads: usize,
    inner: usize,
    activation: Activation,
}

struct Layer {
    /// Queries, keys and values in one product.
    qkv: Dense,
    attended: Dense,
    attention_norm: LayerNorm,
    inner: Dense,
    outer: Dense,
    norm: LayerNorm,
}

/// Buffers of a thread, kept from batch to batch.
pub(crate) struct Scratch {
    x: Vec<f32>,
    y: Vec<f32>,
    /// Queries, keys and values, or the inner layer of the FFN.
    wide: Vec<f32>,
    attention: SelfAttention,
}

impl Model {
    pub(crate) fn read(settings: &Settings, weights: &Weights) -> Result<Self> {
        let d = settings.width;
        let table =
            |name: &str, rows| weights.get(&format!("embeddings.{name}_embeddings.weight"), &[rows, d]);
        let mut positions = table("position", settings.positions)?;
        let segments = table("token_type", settings.types)?;
        for row in positions.chunks_exact_mut(d) {
            row.iter_mut().zip(&segments).for_each(|(x, segment)| *x += segment);
        }
        Ok(Self {
            words: table("word", settings.vocab)?,
            positions,
            norm: layer_norm(weights, "embeddings.LayerNorm", settings)?,
            layers: (0..settings.n_layers)
                .map(|l| Layer::read(settings, weights, l))
                .collect::<Result<_>>()?,
            width: d,
            heads: settings.heads,
            inner: settings.inner,
            activation: settings.activation,
        })
    }

    pub(crate) fn scratch(&self) -> Scratch {
        let attention = SelfAttention::new(self.heads, self.width / self.heads);
        Scratch { x: vec![], y: vec![], wide: vec![], attention }
    }

    /// The last layer's rows [N, D] of sequences of word pieces, all in the vocabulary and no longer than
    /// the positions.
    pub(crate) fn forward<'s>(&self, scratch: &'s mut Scratch, ids: &[u32], lengths: &[usize]) -> &'s [f32] {
        let d = self.width;
        let Scratch { x, y, wide, attention } = scratch;
        x.clear();
        for &id in ids {
            x.extend_from_slice(&self.words[id as usize * d..][..d]);
        }
        let mut rest = &mut x[..];
        for &length in lengths {
            let (sequence, after) = rest.split_at_mut(length * d);
            self.norm.forward(sequence, &self.positions[..length * d]);
            rest = after;
        }
        y.resize(x.len(), 0.0);
        for layer in &self.layers {
            wide.resize(3 * x.len(), 0.0);
            layer.qkv.forward(x, wide);
            attention.forward(wide, lengths, y);
            let attended = &mut wide[..x.len()];
            layer.attended.forward(y, attended);
            layer.attention_norm.forward(attended, x);
            x.copy_from_slice(attended);
            wide.resize(ids.len() * self.inner, 0.0);
            layer.inner.forward(x, wide);
            self.activation.forward(wide);
            layer.outer.forward(wide, y);
            layer.norm.forward(y, x);
            std::mem::swap(x, y);
        }
        x
    }
}

impl Layer {
    fn read(settings: &Settings, weights: &Weights, index: usize) -> Result<Self> {
        let (d, inner) = (settings.width, settings.inner);
        let name = |part: &str| format!("encoder.layer.{index}.{part}");
        let dense = |part: &str, outputs: usize, inputs: usize| -> Result<_> {
            let weight = weights.get(&format!("{}.weight", name(part)), &[outputs, inputs])?;
            Ok((weight, weights.get(&format!("{}.bias", name(part)), &[outputs])?))
        };
        let (mut qkv, mut qkv_bias) = (vec![], vec![]);
        for part in ["attention.self.query", "attention.self.key", "attention.self.value"] {
            let (weight, bias) = dense(part, d, d)?;
            qkv.extend(weight);
            qkv_bias.extend(bias);
        }
        let packed = |part, outputs, inputs| -> Result<Dense> {
            let (weight, bias) = dense(part, outputs, inputs)?;
            Ok(Dense::new(&weight, bias))
        };
        Ok(Self {
            qkv: Dense::new(&qkv, qkv_bias),
            attended: packed("attention.output.dense", d, d)?,
            attention_norm: layer_norm(weights, &name("attention.output.LayerNorm"), settings)?,
            inner: packed("intermediate.dense", inner, d)?,
            outer: packed("output.dense", d, inner)?,
            norm: layer_norm(weights, &name("output.LayerNorm"), settings)?,
        })
    }
}

fn layer_norm(weights: &Weights, name: &str, settings: &Settings) -> Result<LayerNorm> {
    let get = |part: &str| weights.get(&format!("{name}.{part}"), &[settings.width]);
    Ok(LayerNorm::new(get("weight")?, get("bias")?, settings.eps as f32))
}
