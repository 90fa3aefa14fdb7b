use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use memory_bank::{Block, LORA_ALPHA, LoraMatrix};
use ops::{
    AttentionShape, CrossEntropy, FfnLora, FfnPart, Gradients, KvMemoryShape, KvPart, NormRope, Precision,
    RopeTable, Scoring, Tape, TokenLoss, Traced,
};

use crate::memory::LayerMemory;
use crate::weights::{Layer, Projection, Rotations, Weights};
use crate::{AnchorConfig, Error, FetchedMemory, KvCache, LayerShape, Result, init};

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

/// The decoder that a configuration describes; by default that of method.md §4: pre-norm, RMSNorm, QK-norm over the
/// full width, RoPE, SwiGLU, no biases.
pub struct Anchor {
    config: AnchorConfig,
    parameters: BTreeMap<String, Tensor>,
    weights: Weights,
    rope: Rotations,
}

/// What every block of one pass needs beside its weights and the memory.
#[derive(Clone)]
struct Pass {
    config: AnchorConfig,
    rope: Rotations,
    /// Rotations by nothing, of positions of KV memory.
    unturned: Option<RopeTable>,
    starts: Arc<[u32]>,
    /// Those of local layers.
    local_starts: Arc<[u32]>,
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
        let rope = Rotations::of(&config);
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
        let first_position = cache.as_ref().map_or(0, |cache| cache.len());
        let pass = self.pass(input, memory, first_position)?;
        let hidden = ops::on_pool(|| {
            let mut tape = Tape::off(Precision::F32);
            let Some(cache) = cache else {
                return self.decoder(&mut tape, input, &pass, memory, false);
            };
            let mut x = self.embed(&mut tape, input)?;
            for (i, layer) in self.weights.layers.iter().enumerate() {
                let memory = memory.of_layer(i, input.len, None);
                x = pass.block(&mut tape, &x, layer, &memory, Some((i, cache)))?;
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
        match self.config.form.logit_cap {
            None => Ok(logits.value().clone()),
            Some(cap) => Ok(((logits.value() / cap)?.tanh()? * cap)?),
        }
    }

    /// The loss of a batch and of each of its B·T tokens.
    ///
    /// # Errors
    /// As [`Anchor::hidden`], and when the targets do not match the batch.
    pub fn loss(&self, input: Input, targets: Targets, memory: &FetchedMemory) -> Result<(f64, TokenLoss)> {
        let pass = self.pass(input, memory, 0)?;
        ops::on_pool(|| {
            let mut tape = Tape::off(Precision::F32);
            let hidden = self.decoder(&mut tape, input, &pass, memory, false)?;
            Ok(self.cross_entropy(&mut tape, &hidden, targets)?)
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
        let pass = self.pass(input, memory, 0)?;
        let n_parameters = self.parameters.len();
        ops::on_pool(|| {
            let mut tape = Tape::recording(compute.precision, gradients, n_parameters + memory.n_slots());
            let hidden = self.decoder(&mut tape, input, &pass, memory, compute.checkpoint)?;
            if let Some(output) = &self.weights.output {
                tape.leaves_end(output.slots());
            }
            let (loss, _) = self.cross_entropy(&mut tape, &hidden, targets)?;
            drop(hidden);
            tape.backward()?;
            Ok((loss, memory.take_gradients(gradients, n_parameters)?))
        })
    }

    fn cross_entropy(
        &self,
        tape: &mut Tape,
        hidden: &Traced,
        targets: Targets,
    ) -> candle_core::Result<(f64, TokenLoss)> {
        ops::linear_cross_entropy(tape, hidden, self.output(), self.config.form.logit_cap, targets)
    }

    /// Fails when the parts of the batch disagree.
    fn pass(&self, input: Input, memory: &FetchedMemory, first_position: usize) -> Result<Pass> {
        let Input { tokens, starts, batch, len } = input;
        for (what, found) in [("tokens", tokens.len()), ("document starts", starts.len())] {
            if found != batch * len {
                return Err(Error::Batch { batch, len, what, found });
            }
        }
        if tokens.is_empty() {
            return Err(Error::Batch { batch, len, what: "tokens", found: 0 });
        }
        memory.check(&self.config, (batch, len))?;
        let config = self.config.clone();
        let starts: Arc<[u32]> = starts.into();
        let local_starts = match &config.form.local {
            None => starts.clone(),
            Some(local) => {
                let reach = |i: usize| (first_position + i % len + 1).saturating_sub(local.window) as u32;
                starts.iter().enumerate().map(|(i, &start)| start.max(reach(i))).collect()
            }
        };
        let unturned =
            memory.is_kv().then(|| RopeTable::of_frequencies(len, &vec![0.0; config.head_width / 2], false));
        Ok(Pass { config, rope: self.rope.clone(), unturned, starts, local_starts, batch, len })
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
            layer.traced().for_each(|weight| tape.leaves_end(weight.slots()));
            let memory = memory.of_layer(i, input.len, Some(self.parameters.len()));
            x = match checkpoint {
                true => {
                    let (pass, layer) = (pass.clone(), layer.clone());
                    tape.checkpoint(&x, move |tape, x| pass.block(tape, x, &layer, &memory, None))?
                }
                false => pass.block(tape, &x, layer, &memory, None)?,
            };
        }
        tape.leaves_end(self.weights.final_norm.slots());
        pass.norm(tape, &x, &self.weights.final_norm)
    }

    fn embed(&self, tape: &mut Tape, input: Input) -> candle_core::Result<Traced> {
        let shape = (input.batch, input.len);
        let x = ops::embedding(tape, &self.weights.token_embedding, input.tokens, shape)?;
        match self.config.form.embedding_scale {
            None => Ok(x),
            Some(factor) => ops::scale(tape, &x, factor),
        }
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
        memory: &LayerMemory,
        cache: Option<(usize, &mut KvCache)>,
    ) -> candle_core::Result<Traced> {
        let x = self.attend(tape, x, (layer, memory), cache)?;
        self.feed_forward(tape, &x, (layer, memory))
    }

    /// x + attention(norm(x)), normed once more before it is added where the form has it so.
    fn attend(
        &self,
        tape: &mut Tape,
        x: &Traced,
        (layer, memory): (&Layer, &LayerMemory),
        cache: Option<(usize, &mut KvCache)>,
    ) -> candle_core::Result<Traced> {
        let first_position = cache.as_ref().map_or(0, |(_, cache)| cache.len());
        let normed = self.norm(tape, x, &layer.attention_norm)?;
        let mut project = |projection: &Projection, matrix| {
            let y = projection.apply(tape, None, &normed)?;
            ops::lora(tape, &y, &normed, memory.lora(matrix), LORA_ALPHA)
        };
        let q = project(&layer.query, LoraMatrix::Query)?;
        let k = project(&layer.key, LoraMatrix::Key)?;
        let v = project(&layer.value, LoraMatrix::Value)?;
        let q_projected = q.clone();
        let table = self.rope.of_layer(layer.shape);
        let rotation = NormRope { table, first_position, eps: self.config.norm_eps };
        let q = ops::norm_rope(tape, &q, layer.query_norm.as_ref(), rotation)?;
        let k = ops::norm_rope(tape, &k, layer.key_norm.as_ref(), rotation)?;
        let (k, v) = match cache {
            Some((index, cache)) => cache.append(index, &k, &v)?,
            None => (k, v),
        };
        let LayerShape { heads, kv_heads, head_width, window, .. } = layer.shape;
        let shape = AttentionShape {
            batch: self.batch,
            queries: self.len,
            keys: k.value().dim(1)?,
            heads,
            kv_heads,
            head_width,
            scoring: scoring(&self.config),
        };
        let starts = if window.is_some() { &self.local_starts } else { &self.starts };
        let mut mixed = ops::attention(tape, [&q, &k, &v], starts, shape)?;
        if let LayerMemory::Kv(parts) = memory {
            mixed = self.attend_memory(tape, (&mixed, &q_projected), layer, parts)?;
        }
        let output = |tape: &mut Tape, base: Option<&Traced>| {
            let y = layer.attention_output.apply(tape, base, &mixed)?;
            ops::lora(tape, &y, &mixed, memory.lora(LoraMatrix::Output), LORA_ALPHA)
        };
        match &layer.attention_post_norm {
            None => output(tape, Some(x)),
            Some(gain) => {
                let added = output(tape, None)?;
                ops::add_rms_norm(tape, x, &added, gain, self.config.norm_eps)
            }
        }
    }

    /// What attention mixed, and what KV memory adds to it: its queries are normed as others are, but no position
    /// turns them.
    fn attend_memory(
        &self,
        tape: &mut Tape,
        (mixed, q): (&Traced, &Traced),
        layer: &Layer,
        parts: &[KvPart],
    ) -> candle_core::Result<Traced> {
        let Some(table) = &self.unturned else { return Ok(mixed.clone()) };
        let unturned = NormRope { table, first_position: 0, eps: self.config.norm_eps };
        let q = ops::norm_rope(tape, q, layer.query_norm.as_ref(), unturned)?;
        ops::kv_memory(tape, mixed, &q, parts, kv_memory_shape(&self.config, layer.shape))
    }

    /// x + FFN(norm(x)) + Σ_levels memory(norm(x)), the sum normed once more before it is added where the form has it
    /// so.
    fn feed_forward(
        &self,
        tape: &mut Tape,
        x: &Traced,
        (layer, memory): (&Layer, &LayerMemory),
    ) -> candle_core::Result<Traced> {
        let normed = self.norm(tape, x, &layer.ffn_norm)?;
        let bias = layer.ffn_inner_bias.clone();
        let (base, activation) = (layer.ffn_post_norm.is_none().then_some(x), self.config.form.activation);
        let mut y = if memory.has_ffn_lora() {
            let of = |matrix| memory.lora(matrix).to_vec();
            let ffn = FfnLora {
                block: layer.ffn.clone(),
                bias,
                activation,
                gate: of(LoraMatrix::Gate),
                up: of(LoraMatrix::Up),
                down: of(LoraMatrix::Down),
                alpha: LORA_ALPHA,
            };
            ops::gated_ffn_lora(tape, base, &normed, &ffn)?
        } else {
            let mut parts =
                vec![FfnPart { bias, ..FfnPart::everywhere(layer.ffn.clone(), self.batch * self.len) }];
            if let LayerMemory::Ffn(memory) = memory {
                parts.extend_from_slice(memory);
            }
            ops::gated_ffn(tape, base, &normed, activation, parts)?
        };
        if let Some(bias) = &layer.ffn_outer_bias {
            y = ops::add_bias(tape, &y, bias)?;
        }
        match &layer.ffn_post_norm {
            None => Ok(y),
            Some(gain) => ops::add_rms_norm(tape, x, &y, gain, self.config.norm_eps),
        }
    }
}

/// What products of queries and keys become.
pub(crate) fn scoring(config: &AnchorConfig) -> Scoring {
    Scoring { factor: config.form.attention.factor, cap: config.form.attention.cap }
}

/// How KV memory of a layer is attended to: its scores have the factor of others, but are not capped.
pub(crate) fn kv_memory_shape(config: &AnchorConfig, layer: LayerShape) -> KvMemoryShape {
    let LayerShape { heads, kv_heads, head_width, .. } = layer;
    KvMemoryShape { heads, kv_heads, head_width, scale: scoring(config).factor(head_width) }
}
