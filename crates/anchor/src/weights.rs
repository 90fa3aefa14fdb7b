//! The parameters of an anchor by use: layer after layer, and the rotations of each.

use std::collections::BTreeMap;

use candle_core::Tensor;
use ops::{RopeTable, Tape, Traced};

use crate::{AnchorConfig, AttentionBias, LayerShape, QkNorm, Rotation};

/// The parameters again, by use; their slots are their places in the order of names.
pub(crate) struct Weights {
    pub(crate) token_embedding: Traced, // [V, D]
    pub(crate) layers: Vec<Layer>,
    pub(crate) final_norm: Traced,     // [D]
    pub(crate) output: Option<Traced>, // [V, D], none when tied
}

#[derive(Clone)]
pub(crate) struct Layer {
    pub(crate) shape: LayerShape,
    pub(crate) attention_norm: Traced,              // [D]
    pub(crate) query: Projection,                   // [H·K, D]
    pub(crate) key: Projection,                     // [G·K, D]
    pub(crate) value: Projection,                   // [G·K, D]
    pub(crate) query_norm: Option<Traced>,          // [H·K] or [K]
    pub(crate) key_norm: Option<Traced>,            // [G·K] or [K]
    pub(crate) attention_output: Projection,        // [D, H·K]
    pub(crate) attention_post_norm: Option<Traced>, // [D]
    pub(crate) ffn_norm: Traced,                    // [D]
    pub(crate) ffn: Traced,                         // [3, F, D]
    pub(crate) ffn_inner_bias: Option<Traced>,      // [2·F]
    pub(crate) ffn_outer_bias: Option<Traced>,      // [D]
    pub(crate) ffn_post_norm: Option<Traced>,       // [D]
}

/// A matrix, and its bias if it has one.
#[derive(Clone)]
pub(crate) struct Projection {
    weight: Traced,
    bias: Option<Traced>,
}

impl Projection {
    pub(crate) fn apply(
        &self,
        tape: &mut Tape,
        base: Option<&Traced>,
        x: &Traced,
    ) -> candle_core::Result<Traced> {
        ops::affine(tape, base, x, &self.weight, self.bias.as_ref())
    }

    fn traced(&self) -> impl Iterator<Item = &Traced> {
        [&self.weight].into_iter().chain(&self.bias)
    }
}

impl Layer {
    /// All of its weights.
    pub(crate) fn traced(&self) -> impl Iterator<Item = &Traced> {
        let Self { attention_norm, query, key, value, attention_output, ffn_norm, ffn, .. } = self;
        let projections = [query, key, value, attention_output];
        let optional = [
            &self.query_norm,
            &self.key_norm,
            &self.attention_post_norm,
            &self.ffn_inner_bias,
            &self.ffn_outer_bias,
            &self.ffn_post_norm,
        ];
        let always = [attention_norm, ffn_norm, ffn];
        always
            .into_iter()
            .chain(projections.into_iter().flat_map(Projection::traced))
            .chain(optional.into_iter().flatten())
    }
}

impl Weights {
    /// `traced` makes a parameter, whose slot is given, a leaf or a constant.
    pub(crate) fn of(
        config: &AnchorConfig,
        parameters: &BTreeMap<String, Tensor>,
        traced: impl Fn(usize, Tensor) -> Traced,
    ) -> Self {
        let slots: BTreeMap<&str, usize> = parameters.keys().map(String::as_str).zip(0..).collect();
        let get = |name: &str| traced(slots[name], parameters[name].clone());
        let form = &config.form;
        let layer = |i: usize| {
            let get = |name: &str| get(&format!("layers.{i}.{name}"));
            let maybe = |there: bool, name: &str| there.then(|| get(name));
            let projection = |name: &str, biased: bool| Projection {
                weight: get(name),
                bias: maybe(biased, &format!("{name}_bias")),
            };
            let biased = form.attention.bias != AttentionBias::None;
            let normed = form.attention.qk_norm != QkNorm::None;
            Layer {
                shape: config.layer(i),
                attention_norm: get("attention_norm"),
                query: projection("query", biased),
                key: projection("key", biased),
                value: projection("value", biased),
                query_norm: maybe(normed, "query_norm"),
                key_norm: maybe(normed, "key_norm"),
                attention_output: projection("attention_output", form.attention.bias == AttentionBias::All),
                attention_post_norm: maybe(form.post_norms, "attention_post_norm"),
                ffn_norm: get("ffn_norm"),
                ffn: get("ffn"),
                ffn_inner_bias: maybe(form.ffn_bias, "ffn_inner_bias"),
                ffn_outer_bias: maybe(form.ffn_bias, "ffn_outer_bias"),
                ffn_post_norm: maybe(form.post_norms, "ffn_post_norm"),
            }
        };
        Self {
            token_embedding: get("token_embedding"),
            layers: (0..config.n_layers).map(layer).collect(),
            final_norm: get("final_norm"),
            output: (!config.tied_embeddings).then(|| get("output")),
        }
    }
}

/// The rotations of all layers and of local ones, which may be the same.
#[derive(Clone)]
pub(crate) struct Rotations {
    all: RopeTable,
    local: RopeTable,
}

impl Rotations {
    pub(crate) fn of(config: &AnchorConfig) -> Self {
        let (n, width, rotation) = (config.max_seq_len, config.head_width, config.form.rope);
        let all = rotation.table(n, width, config.rope_base);
        let local = match config.form.local.as_ref().and_then(|local| local.rope_base) {
            Some(base) => Rotation { single: rotation.single, ..Default::default() }.table(n, width, base),
            None => all.clone(),
        };
        Self { all, local }
    }

    pub(crate) fn of_layer(&self, layer: LayerShape) -> &RopeTable {
        if layer.window.is_some() { &self.local } else { &self.all }
    }
}
