//! What decoders of the usual families differ in beside their sizes, as data: nothing here is named after one.

use ops::{Activation, RopeTable};
use serde::{Deserialize, Serialize};

/// What a decoder differs in from the native anchor of method.md §4, which is the default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Form {
    /// Queries, keys and values.
    pub attention: AttentionForm,
    /// How positions turn queries and keys.
    pub rope: Rotation,
    /// Layers that attend to what is near.
    pub local: Option<LocalLayers>,
    /// What gates the FFN, and memory that widens it.
    pub activation: Activation,
    /// Whether the FFN's matrices have biases.
    pub ffn_bias: bool,
    /// Whether what attention and the FFN (memory included) add to the residual stream is normed first.
    pub post_norms: bool,
    /// Factor of the embedded tokens; none is 1.
    pub embedding_scale: Option<f64>,
    /// Logits l become cap·tanh(l / cap).
    pub logit_cap: Option<f64>,
    /// Sizes of every layer, when they differ.
    pub layers: Vec<LayerSizes>,
}

impl Form {
    /// Whether it is the native anchor's: files leave it out then.
    pub fn is_native(&self) -> bool {
        *self == Self::default()
    }
}

/// Queries, keys and values.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AttentionForm {
    /// Heads of keys and values, G; none is as many as of queries.
    pub kv_heads: Option<usize>,
    /// What of queries and keys is normed before they turn.
    pub qk_norm: QkNorm,
    /// Which matrices have biases.
    pub bias: AttentionBias,
    /// Factor of the products of queries and keys; none is 1/√K.
    pub factor: Option<f64>,
    /// Scores s become cap·tanh(s / cap).
    pub cap: Option<f64>,
}

/// What of queries and keys is normed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    /// The whole row, with a gain [H·K].
    #[default]
    Full,
    /// Each head, with a gain [K] for all of them.
    Head,
    /// Nothing.
    None,
}

/// Which matrices of attention have biases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttentionBias {
    /// None.
    #[default]
    None,
    /// Those of queries, keys and values.
    Qkv,
    /// The output's, too.
    All,
}

/// How positions turn queries and keys, beside the base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rotation {
    /// How frequencies differ from base^(−2i/K).
    pub scaling: RopeScaling,
    /// Whether frequencies and angles are rounded to f32, as they were when most published models were trained.
    /// Far positions tell the difference.
    pub single: bool,
}

/// How the frequencies of a rotation differ from those of its base: what stretches a model to longer texts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    None,
    /// All are `factor` times smaller (Chen et al., arXiv 2306.15595).
    Linear {
        /// How much.
        factor: f64,
    },
    /// Those of long waves are `factor` times smaller, those of short ones stay, with a ramp between
    /// (Grattafiori et al., arXiv 2407.21783 §3.4.2).
    Llama3 {
        /// How much.
        factor: f64,
        /// Waves longer than `original_len` / this are long.
        low_freq_factor: f64,
        /// Waves shorter than `original_len` / this are short.
        high_freq_factor: f64,
        /// Positions that the model was trained for first.
        original_len: usize,
    },
}

impl RopeScaling {
    /// Scaled, a frequency of the base.
    fn scaled(self, frequency: f64) -> f64 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_len } => {
                let waves = original_len as f64 * frequency / std::f64::consts::TAU;
                let short =
                    ((waves - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                short * frequency + (1.0 - short) * frequency / factor
            }
        }
    }
}

impl Rotation {
    /// The table of `n_positions` for heads of even width.
    pub(crate) fn table(&self, n_positions: usize, head_width: usize, base: f64) -> RopeTable {
        if !self.single && self.scaling == RopeScaling::None {
            return RopeTable::new(n_positions, head_width, base);
        }
        let frequency = |i: usize| self.scaling.scaled(base.powf(-2.0 * i as f64 / head_width as f64));
        let frequencies: Vec<f64> = (0..head_width / 2).map(frequency).collect();
        RopeTable::of_frequencies(n_positions, &frequencies, self.single)
    }
}

/// Layers that attend to what is near.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalLayers {
    /// Positions that a token sees, its own the last.
    pub window: usize,
    /// Their indices, ascending.
    pub layers: Vec<usize>,
    /// Base of their rotation, which is not scaled; none is the rotation of the other layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_base: Option<f64>,
}

/// Sizes of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerSizes {
    /// Heads of queries, H.
    pub n_heads: usize,
    /// Heads of keys and values, G.
    pub kv_heads: usize,
    /// Width of the gated FFN, F.
    pub ffn_width: usize,
}
