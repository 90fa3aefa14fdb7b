use anchor::{Input, KvCache};
use candle_core::{DType, Device, Tensor};
use cluster_tree::ClusterPath;
use corpus::Tokenizer;
use memory_bank::BlockStore;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::choose::{Seen, choose};
use crate::engine::Sampling;
use crate::{Error, Model, Result};

/// The section `[generate]` of a run's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// Divides the scores before sampling; 0 takes the likeliest token.
    pub temperature: f64,
    /// Samples among the likeliest tokens that together have this probability.
    pub top_p: f64,
    /// Seeds the sampling; the n-th prompt of a call has a stream of its own.
    pub seed: u64,
    /// Texts that end a completion; they are not part of it.
    pub stop: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self { max_new_tokens: 64, temperature: 0.0, top_p: 1.0, seed: 1, stop: vec![] }
    }
}

impl Options {
    /// Fails on an option out of range.
    pub fn check(&self) -> Result<()> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(Error::Option { key: "temperature", expected: "0 or more", found: self.temperature });
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::Option { key: "top_p", expected: "a number in (0, 1]", found: self.top_p });
        }
        if self.max_new_tokens == 0 {
            return Err(Error::Option { key: "max_new_tokens", expected: "at least 1", found: 0.0 });
        }
        Ok(())
    }
}

/// A text to continue, and the memory it fetches.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// Its tokens, without the EOT that begins a document (it is added).
    pub tokens: Vec<u32>,
    /// The path of its memory blocks; none is the plain anchor. Routed once per context.
    pub path: Option<ClusterPath>,
}

/// What was generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The new text, up to the first stop text or EOT.
    pub text: String,
    /// The new tokens, those of the stop text included.
    pub tokens: Vec<u32>,
}

/// One sequence being continued.
struct Running {
    random: ChaCha8Rng,
    tokens: Vec<u32>,
    done: bool,
}

/// Continues every prompt, in one batch. Prompts are padded on the left, so that all of them end at the
/// same position and a step appends one column to the cache; attention never sees the padding.
///
/// # Errors
/// When an option is out of range, a prompt is too long, or memory cannot be fetched.
pub fn generate<S: BlockStore>(
    model: &Model<S>,
    tokenizer: &Tokenizer,
    prompts: &[Prompt],
    options: &Options,
) -> Result<Vec<Completion>> {
    options.check()?;
    let longest = prompts.iter().map(|prompt| prompt.tokens.len() + 1).max().unwrap_or(0);
    let limit = model.anchor.config().max_seq_len;
    if longest + options.max_new_tokens > limit {
        return Err(Error::TooLong { prompt: longest, new: options.max_new_tokens, limit });
    }
    if prompts.is_empty() {
        return Ok(vec![]);
    }
    let paths: Vec<_> = prompts.iter().map(|prompt| prompt.path.clone()).collect();
    let memory = model.memory(&paths)?;
    let pads: Vec<u32> = prompts.iter().map(|prompt| (longest - 1 - prompt.tokens.len()) as u32).collect();
    let (mut tokens, mut starts) = (vec![], vec![]);
    for (prompt, &pad) in prompts.iter().zip(&pads) {
        tokens.extend((0..=pad).map(|_| tokenizer.begin()));
        tokens.extend(&prompt.tokens);
        starts.extend((0..longest as u32).map(|position| position.min(pad)));
    }
    let mut running: Vec<Running> = (0..prompts.len())
        .map(|i| Running {
            random: ChaCha8Rng::seed_from_u64(options.seed.wrapping_add(i as u64)),
            tokens: vec![],
            done: false,
        })
        .collect();
    let mut cache = KvCache::default();
    let mut len = longest;
    for _ in 0..options.max_new_tokens {
        let input = Input { tokens: &tokens, starts: &starts, batch: prompts.len(), len };
        let hidden = model.anchor.hidden(input, &memory, Some(&mut cache))?;
        let logits = model.anchor.logits(&hidden.narrow(1, len - 1, 1)?.contiguous()?)?;
        // Some models have rows that no token of their tokenizer has.
        let n_spelled = logits.dim(2)?.min(tokenizer.vocab_size());
        tokens = next_tokens(&logits.narrow(2, 0, n_spelled)?, &mut running, options)?;
        for running in running.iter_mut().filter(|running| !running.done) {
            running.done = ended(tokenizer, &running.tokens, &options.stop)?;
        }
        if running.iter().all(|running| running.done) {
            break;
        }
        (starts, len) = (pads.clone(), 1);
    }
    let last = |prompt: &Prompt| prompt.tokens.last().copied();
    running
        .into_iter()
        .zip(prompts)
        .map(|(running, prompt)| complete(tokenizer, (last(prompt), running.tokens), &options.stop))
        .collect()
}

/// Chooses a token for each sequence; one that is done repeats its last.
fn next_tokens(logits: &Tensor, running: &mut [Running], options: &Options) -> Result<Vec<u32>> {
    let Options { temperature, top_p, .. } = *options;
    let sampling = Sampling { temperature, top_p, ..Sampling::default() };
    let rows = logits.squeeze(1)?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    let mut tokens = Vec::with_capacity(rows.len());
    for (row, running) in rows.iter().zip(running) {
        if !running.done {
            running.tokens.push(choose(row, &sampling, &Seen::new(), &mut running.random)?);
        }
        tokens.push(running.tokens.last().copied().unwrap_or_default());
    }
    Ok(tokens)
}

fn ended(tokenizer: &Tokenizer, tokens: &[u32], stop: &[String]) -> Result<bool> {
    if tokens.last().is_some_and(|last| tokenizer.ends().contains(last)) {
        return Ok(true);
    }
    let text = tokenizer.decode(tokens)?;
    Ok(stop.iter().any(|stop| text.contains(stop)))
}

/// What was generated behind the token `last`.
fn complete(
    tokenizer: &Tokenizer,
    (last, tokens): (Option<u32>, Vec<u32>),
    stop: &[String],
) -> Result<Completion> {
    let n = tokens.iter().position(|token| tokenizer.ends().contains(token)).unwrap_or(tokens.len());
    let mut text = tokenizer.decode_behind(last, &tokens[..n])?;
    let end = stop.iter().filter_map(|stop| text.find(stop)).min();
    text.truncate(end.unwrap_or(text.len()));
    Ok(Completion { text, tokens })
}
