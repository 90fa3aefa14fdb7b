use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use memory_bank::Block;
use ops::{
    AttentionShape, CrossEntropy, FfnPart, Gradients, NormRope, Precision, RopeTable, Tape, TokenLoss, Traced,
};

use crate::{AnchorConfig, Error, FetchedMemory, KvCache, Result, init};

/// A batch of token ids, row-major [B, T].
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Token ids.
    pub tokens: &'a [u32],
    /// First position (among all that attention can reach, cached ones included) that each token sees:
    /// the beginning of its document. They do not fall within a sequence.
    pub starts: &'a [u32],
    /// Sequences, B.
    pub batch: usize,
    /// Positions, T.
    pub len: usize,
}

/// What a loss is computed against.
pub type Targets<'a> = CrossEntropy<'a>;

/// How a loss and its gradients are computed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Compute {
    /// How matrix products are made.
    pub precision: Precision,
    /// Whether the backward pass computes the activations of each block again instead of keeping them.
    pub checkpoint: bool,
}

/// The decoder of method.md §4: pre-norm, RMSNorm, QK-norm over the full width, RoPE, SwiGLU, no biases.
pub struct Anchor {
    config: AnchorConfig,
    parameters: BTreeMap<String, Tensor>,
    weights: Weights,
    rope: RopeTable,
}

/// The parameters again, by use; their slots are their places in the order of names.
struct Weights {
    token_embedding: Traced, // [V, D]
    layers: Vec<Layer>,
    final_norm: Traced,     // [D]
    output: Option<Traced>, // [V, D], none when tied
}

#[derive(Clone)]
struct Layer {
    attention_norm: Traced,   // [D]
    query: Traced,            // [H·K, D]
    key: Traced,              // [H·K, D]
    value: Traced,            // [H·K, D]
    query_norm: Traced,       // [H·K]
    key_norm: Traced,         // [H·K]
    attention_output: Traced, // [D, H·K]
    ffn_norm: Traced,         // [D]
    ffn: Traced,              // [3, F, D]
}

impl Layer {
    /// All of its weights.
    fn traced(&self) -> [&Traced; 9] {
        let Self { attention_norm, query, key, value, query_norm, key_norm, attention_output, ffn_norm, ffn } =
            self;
        [attention_norm, query, key, value, query_norm, key_norm, attention_output, ffn_norm, ffn]
    }
}

/// What every block of one pass needs beside its weights and the memory.
#[derive(Clone)]
struct Pass {
    config: AnchorConfig,
    rope: RopeTable,
    starts: Arc<[u32]>,
    batch: usize,
    len: usize,
}

impl Anchor {
    /// A freshly initialised anchor.
    ///
    /// # Errors
    /// When the configuration fits no model.
    pub fn new(config: AnchorConfig, seed: u64, (device, dtype): (&Device, DType)) -> Result<Self> {
        config.check()?;
        let mut parameters = BTreeMap::new();
        for (name, shape) in config.parameters() {
            let values = init::values(&config, &name, &shape, seed);
            let tensor = Tensor::from_vec(values, shape, device)?.to_dtype(dtype)?;
            parameters.insert(name, tensor);
        }
        Ok(Self::from_parameters(config, parameters))
    }

    /// `parameters` are those of `config.parameters()`; their gradients are computed.
    pub(crate) fn from_parameters(config: AnchorConfig, parameters: BTreeMap<String, Tensor>) -> Self {
        let weights = Weights::of(&config, &parameters, |slot, tensor| Traced::leaf(tensor, slot));
        let rope = RopeTable::new(config.max_seq_len, config.head_width, config.rope_base);
        Self { config, parameters, weights, rope }
    }

    /// The same weights without gradients: for evaluation, generation and frozen training.
    pub fn freeze(mut self) -> Self {
        self.weights = Weights::of(&self.config, &self.parameters, |_, tensor| Traced::constant(tensor));
        self
    }

    /// The configuration it was built with.
    pub fn config(&self) -> &AnchorConfig {
        &self.config
    }

    /// Every parameter by name, in name order: the i-th has slot i in gradients. They are updated in place.
    pub fn parameters(&self) -> &BTreeMap<String, Tensor> {
        &self.parameters
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        self.weights.token_embedding.value().device()
    }

    /// The type of the weights.
    pub fn dtype(&self) -> DType {
        self.weights.token_embedding.value().dtype()
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
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let pass = self.pass(input, memory)?;
        let hidden = ops::on_pool(|| {
            let mut tape = Tape::off(Precision::F32);
            let Some(cache) = cache else {
                return self.decoder(&mut tape, input, &pass, memory, false);
            };
            let mut x = self.embed(&mut tape, input)?;
            for (i, layer) in self.weights.layers.iter().enumerate() {
                x = pass.block(&mut tape, &x, layer, memory.parts(i, input.len, None), Some((i, cache)))?;
            }
            let hidden = pass.norm(&mut tape, &x, &self.weights.final_norm)?;
            cache.advance(input.len);
            Ok(hidden)
        })?;
        Ok(hidden.value().clone())
    }

    /// Scores of the next token, [.., V], from hidden states [.., D].
    ///
    /// # Errors
    /// When the hidden states have another width.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let hidden = Traced::constant(hidden.contiguous()?);
        let output = self.output();
        let logits = ops::on_pool(|| ops::linear(&mut Tape::off(Precision::F32), None, &hidden, output))?;
        Ok(logits.value().clone())
    }

    /// The loss of a batch and of each of its B·T tokens.
    ///
    /// # Errors
    /// As [`Anchor::hidden`], and when the targets do not match the batch.
    pub fn loss(&self, input: Input, targets: Targets, memory: &FetchedMemory) -> Result<(f64, TokenLoss)> {
        let pass = self.pass(input, memory)?;
        ops::on_pool(|| {
            let mut tape = Tape::off(Precision::F32);
            let hidden = self.decoder(&mut tape, input, &pass, memory, false)?;
            Ok(ops::linear_cross_entropy(&mut tape, &hidden, self.output(), targets)?)
        })
    }

    /// The loss of a batch, its gradients by parameter added to `gradients`, and those of the memory's blocks,
    /// each summed over the sequences that share it. Of [`Gradients::leaving_to`], a layer's leave before those of
    /// the layer below it are computed.
    ///
    /// # Errors
    /// As [`Anchor::loss`].
    pub fn loss_and_gradients(
        &self,
        (input, targets): (Input, Targets),
        memory: &FetchedMemory,
        compute: Compute,
        gradients: &mut Gradients,
    ) -> Result<(f64, Vec<Block>)> {
        let pass = self.pass(input, memory)?;
        let n_parameters = self.parameters.len();
        ops::on_pool(|| {
            let mut tape = Tape::recording(compute.precision, gradients, n_parameters + memory.n_slots());
            let hidden = self.decoder(&mut tape, input, &pass, memory, compute.checkpoint)?;
            if let Some(output) = &self.weights.output {
                tape.leaves_end(output.slots());
            }
            let (loss, _) = ops::linear_cross_entropy(&mut tape, &hidden, self.output(), targets)?;
            drop(hidden);
            tape.backward()?;
            Ok((loss, memory.take_gradients(gradients, n_parameters)?))
        })
    }

    /// Fails when the parts of the batch disagree.
    fn pass(&self, input: Input, memory: &FetchedMemory) -> Result<Pass> {
        let Input { tokens, starts, batch, len } = input;
        for (what, found) in [("tokens", tokens.len()), ("document starts", starts.len())] {
            if found != batch * len {
                return Err(Error::Batch { batch, len, what, found });
            }
        }
        if tokens.is_empty() {
            return Err(Error::Batch { batch, len, what: "tokens", found: 0 });
        }
        memory.check((self.config.n_layers, self.config.d_model), (batch, len))?;
        let config = self.config.clone();
        Ok(Pass { config, rope: self.rope.clone(), starts: starts.into(), batch, len })
    }

    /// Hidden states after the final norm.
    fn decoder(
        &self,
        tape: &mut Tape,
        input: Input,
        pass: &Pass,
        memory: &FetchedMemory,
        checkpoint: bool,
    ) -> candle_core::Result<Traced> {
        // What no layer has alone: the token embedding may be the output, too.
        tape.leaves_end(0..self.parameters.len());
        let mut x = self.embed(tape, input)?;
        for (i, layer) in self.weights.layers.iter().enumerate() {
            layer.traced().into_iter().for_each(|weight| tape.leaves_end(weight.slots()));
            let memory = memory.parts(i, input.len, Some(self.parameters.len()));
            x = match checkpoint {
                true => {
                    let (pass, layer) = (pass.clone(), layer.clone());
                    tape.checkpoint(&x, move |tape, x| pass.block(tape, x, &layer, memory.clone(), None))?
                }
                false => pass.block(tape, &x, layer, memory, None)?,
            };
        }
        tape.leaves_end(self.weights.final_norm.slots());
        pass.norm(tape, &x, &self.weights.final_norm)
    }

    fn embed(&self, tape: &mut Tape, input: Input) -> candle_core::Result<Traced> {
        ops::embedding(tape, &self.weights.token_embedding, input.tokens, (input.batch, input.len))
    }

    fn output(&self) -> &Traced {
        self.weights.output.as_ref().unwrap_or(&self.weights.token_embedding)
    }
}

impl Pass {
    fn norm(&self, tape: &mut Tape, x: &Traced, gain: &Traced) -> candle_core::Result<Traced> {
        ops::rms_norm(tape, x, gain, self.config.norm_eps)
    }

    /// One block of the decoder; with a cache, that of the layer of this index.
    fn block(
        &self,
        tape: &mut Tape,
        x: &Traced,
        layer: &Layer,
        memory: Vec<FfnPart>,
        cache: Option<(usize, &mut KvCache)>,
    ) -> candle_core::Result<Traced> {
        let x = self.attend(tape, x, layer, cache)?;
        self.feed_forward(tape, &x, layer, memory)
    }

    /// x + attention(norm(x))
    fn attend(
        &self,
        tape: &mut Tape,
        x: &Traced,
        layer: &Layer,
        cache: Option<(usize, &mut KvCache)>,
    ) -> candle_core::Result<Traced> {
        let first_position = cache.as_ref().map_or(0, |(_, cache)| cache.len());
        let normed = self.norm(tape, x, &layer.attention_norm)?;
        let mut linear = |weight: &Traced| ops::linear(tape, None, &normed, weight);
        let (q, k, v) = (linear(&layer.query)?, linear(&layer.key)?, linear(&layer.value)?);
        let rotation = NormRope { table: &self.rope, first_position, eps: self.config.norm_eps };
        let q = ops::norm_rope(tape, &q, &layer.query_norm, rotation)?;
        let k = ops::norm_rope(tape, &k, &layer.key_norm, rotation)?;
        let (k, v) = match cache {
            Some((index, cache)) => cache.append(index, &k, &v)?,
            None => (k, v),
        };
        let shape = AttentionShape {
            batch: self.batch,
            queries: self.len,
            keys: k.value().dim(1)?,
            heads: self.config.n_heads,
            head_width: self.config.head_width,
        };
        let mixed = ops::attention(tape, [&q, &k, &v], &self.starts, shape)?;
        ops::linear(tape, Some(x), &mixed, &layer.attention_output)
    }

    /// x + FFN(norm(x)) + Σ_levels memory(norm(x))
    fn feed_forward(
        &self,
        tape: &mut Tape,
        x: &Traced,
        layer: &Layer,
        memory: Vec<FfnPart>,
    ) -> candle_core::Result<Traced> {
        let normed = self.norm(tape, x, &layer.ffn_norm)?;
        let anchor = FfnPart::everywhere(layer.ffn.clone(), self.batch * self.len);
        ops::gated_ffn(tape, x, &normed, [vec![anchor], memory].concat())
    }
}

impl Weights {
    fn of(
        config: &AnchorConfig,
        parameters: &BTreeMap<String, Tensor>,
        traced: impl Fn(usize, Tensor) -> Traced,
    ) -> Self {
        let slots: BTreeMap<&str, usize> = parameters.keys().map(String::as_str).zip(0..).collect();
        let get = |name: &str| traced(slots[name], parameters[name].clone());
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
