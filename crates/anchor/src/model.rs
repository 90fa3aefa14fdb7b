use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use ops::{AttentionShape, CrossEntropy, RopeTable, Run, TokenLoss};

use crate::{AnchorConfig, Error, FetchedMemory, KvCache, Result, init};

/// A batch of token ids, row-major [B, T].
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Token ids.
    pub tokens: &'a [u32],
    /// First position (among all that attention can reach, cached ones included) that each token sees:
    /// the beginning of its document.
    pub starts: &'a [u32],
    /// Sequences, B.
    pub batch: usize,
    /// Positions, T.
    pub len: usize,
}

/// What a loss is computed against.
pub type Targets<'a> = CrossEntropy<'a>;

/// The decoder of method.md §4: pre-norm, RMSNorm, QK-norm over the full width, RoPE, SwiGLU, no biases.
pub struct Anchor {
    config: AnchorConfig,
    variables: BTreeMap<String, Var>,
    weights: Weights,
    rope: RopeTable,
}

struct Weights {
    token_embedding: Tensor, // [V, D]
    layers: Vec<Layer>,
    final_norm: Tensor,     // [D]
    output: Option<Tensor>, // [V, D], none when tied
}

struct Layer {
    attention_norm: Tensor,   // [D]
    query: Tensor,            // [H·K, D]
    key: Tensor,              // [H·K, D]
    value: Tensor,            // [H·K, D]
    query_norm: Tensor,       // [H·K]
    key_norm: Tensor,         // [H·K]
    attention_output: Tensor, // [D, H·K]
    ffn_norm: Tensor,         // [D]
    ffn: Tensor,              // [1, 3, F, D]
}

impl Anchor {
    /// A freshly initialised anchor.
    ///
    /// # Errors
    /// When the configuration fits no model.
    pub fn new(config: AnchorConfig, seed: u64, (device, dtype): (&Device, DType)) -> Result<Self> {
        config.check()?;
        let mut variables = BTreeMap::new();
        for (name, shape) in config.parameters() {
            let values = init::values(&config, &name, &shape, seed);
            let tensor = Tensor::from_vec(values, shape, device)?.to_dtype(dtype)?;
            variables.insert(name, Var::from_tensor(&tensor)?);
        }
        Ok(Self::from_variables(config, variables))
    }

    /// `variables` are those of `config.parameters()`; their gradients are computed.
    pub(crate) fn from_variables(config: AnchorConfig, variables: BTreeMap<String, Var>) -> Self {
        let weights = Weights::of(&config, |name| variables[name].as_tensor().clone());
        let rope = RopeTable::new(config.max_seq_len, config.head_width, config.rope_base);
        Self { config, variables, weights, rope }
    }

    /// The same weights outside the autograd graph: for evaluation, generation and frozen training.
    pub fn freeze(mut self) -> Self {
        self.weights = Weights::of(&self.config, |name| self.variables[name].as_detached_tensor());
        self
    }

    /// The configuration it was built with.
    pub fn config(&self) -> &AnchorConfig {
        &self.config
    }

    /// Every parameter by name, in name order.
    pub fn variables(&self) -> &BTreeMap<String, Var> {
        &self.variables
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        self.weights.token_embedding.device()
    }

    /// The type of the weights.
    pub fn dtype(&self) -> DType {
        self.weights.token_embedding.dtype()
    }

    /// Hidden states after the final norm, [B, T, D]. With a cache, `input` continues what it holds.
    ///
    /// # Errors
    /// When the parts of the batch disagree, a token or position is out of range, or the memory was made
    /// for another anchor or batch.
    pub fn hidden(
        &self,
        input: Input,
        memory: &FetchedMemory,
        mut cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let Input { tokens, starts, batch, len } = input;
        for (what, found) in [("tokens", tokens.len()), ("document starts", starts.len())] {
            if found != batch * len {
                return Err(Error::Batch { batch, len, what, found });
            }
        }
        memory.check((self.config.n_layers, self.config.d_model), (batch, len))?;
        let mut x = ops::embedding(&self.weights.token_embedding, tokens, (batch, len))?;
        for (i, layer) in self.weights.layers.iter().enumerate() {
            x = self.attend(i, layer, x, input, cache.as_deref_mut())?;
            x = self.feed_forward(i, layer, x, memory)?;
        }
        if let Some(cache) = cache {
            cache.advance(len);
        }
        Ok(self.norm(&x, &self.weights.final_norm)?)
    }

    /// Scores of the next token, [.., V], from hidden states [.., D].
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(ops::linear(hidden, self.output())?)
    }

    /// The loss of a batch and of each of its B·T tokens.
    ///
    /// # Errors
    /// As [`Anchor::hidden`], and when the targets do not match the batch.
    pub fn loss(
        &self,
        input: Input,
        targets: Targets,
        memory: &FetchedMemory,
    ) -> Result<(Tensor, TokenLoss)> {
        let hidden = self.hidden(input, memory, None)?;
        Ok(ops::linear_cross_entropy(&hidden, self.output(), targets)?)
    }

    fn output(&self) -> &Tensor {
        self.weights.output.as_ref().unwrap_or(&self.weights.token_embedding)
    }

    fn norm(&self, x: &Tensor, gain: &Tensor) -> candle_core::Result<Tensor> {
        ops::rms_norm(x, gain, self.config.norm_eps)
    }

    /// x + attention(norm(x))
    fn attend(
        &self,
        index: usize,
        layer: &Layer,
        x: Tensor,
        input: Input,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let first_position = cache.as_ref().map_or(0, |cache| cache.len());
        let normed = self.norm(&x, &layer.attention_norm)?;
        let q = self.norm(&ops::linear(&normed, &layer.query)?, &layer.query_norm)?;
        let k = self.norm(&ops::linear(&normed, &layer.key)?, &layer.key_norm)?;
        let v = ops::linear(&normed, &layer.value)?;
        let q = ops::rope(&q, &self.rope, first_position)?;
        let k = ops::rope(&k, &self.rope, first_position)?;
        let (k, v) = match cache {
            Some(cache) => cache.append(index, k, v)?,
            None => (k, v),
        };
        let shape = AttentionShape {
            batch: input.batch,
            queries: input.len,
            keys: k.dim(1)?,
            heads: self.config.n_heads,
            head_width: self.config.head_width,
        };
        let mixed = ops::attention(&q, &k, &v, input.starts, shape)?;
        Ok((x + ops::linear(&mixed, &layer.attention_output)?)?)
    }

    /// x + FFN(norm(x)) + Σ_levels memory(norm(x))
    fn feed_forward(&self, index: usize, layer: &Layer, x: Tensor, memory: &FetchedMemory) -> Result<Tensor> {
        let (batch, len, _) = x.dims3()?;
        let normed = self.norm(&x, &layer.ffn_norm)?;
        let everything = [Run { block: 0, first_row: 0, n_rows: batch * len }];
        let mut x = ops::gated_ffn(&x, &normed, &layer.ffn, &everything)?;
        for (weights, runs) in memory.layer(index, len) {
            x = ops::gated_ffn(&x, &normed, weights, &runs)?;
        }
        Ok(x)
    }
}

impl Weights {
    fn of(config: &AnchorConfig, get: impl Fn(&str) -> Tensor) -> Self {
        let layer = |i: usize| {
            let get = |name: &str| get(&format!("layers.{i}.{name}"));
            Layer {
                attention_norm: get("attention_norm"),
                query: get("query"),
                key: get("key"),
                value: get("value"),
                query_norm: get("query_norm"),
                key_norm: get("key_norm"),
                attention_output: get("attention_output"),
                ffn_norm: get("ffn_norm"),
                ffn: get("ffn"),
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
