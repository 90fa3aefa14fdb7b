use anchor::{Input, KvCache};
use candle_core::{DType, Device, Tensor};
use cluster_tree::ClusterPath;
use corpus::Tokenizer;
use memory_bank::BlockStore;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

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
        tokens.extend((0..=pad).map(|_| tokenizer.eot()));
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
        tokens = next_tokens(&logits, &mut running, options)?;
        for running in running.iter_mut().filter(|running| !running.done) {
            running.done = ended(tokenizer, &running.tokens, &options.stop)?;
        }
        if running.iter().all(|running| running.done) {
            break;
        }
        (starts, len) = (pads.clone(), 1);
    }
    running.into_iter().map(|running| complete(tokenizer, running.tokens, &options.stop)).collect()
}

/// Chooses a token for each sequence; one that is done repeats its last.
fn next_tokens(logits: &Tensor, running: &mut [Running], options: &Options) -> Result<Vec<u32>> {
    let rows = logits.squeeze(1)?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    let mut tokens = Vec::with_capacity(rows.len());
    for (row, running) in rows.iter().zip(running) {
        if !running.done {
            running.tokens.push(choose(row, options, &mut running.random)?);
        }
        tokens.push(running.tokens.last().copied().unwrap_or_default());
    }
    Ok(tokens)
}

/// Samples from softmax(logits / temperature) cut at top_p (nucleus sampling, arXiv 1904.09751).
fn choose(logits: &[f32], options: &Options, random: &mut ChaCha8Rng) -> Result<u32> {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
    let Some((best, &largest)) = best.filter(|(_, score)| score.is_finite()) else {
        return Err(Error::NotFinite);
    };
    if options.temperature == 0.0 {
        return Ok(best as u32);
    }
    let weight = |&x: &f32| (f64::from(x - largest) / options.temperature).exp();
    let mut weights: Vec<(u32, f64)> = (0u32..).zip(logits.iter().map(weight)).collect();
    weights.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
    let mut kept = 0.0;
    let n_kept = weights.iter().position(|(_, weight)| {
        kept += weight;
        kept >= options.top_p * total
    });
    weights.truncate(n_kept.map_or(weights.len(), |last| last + 1));
    let kept: f64 = weights.iter().map(|(_, weight)| weight).sum();
    let mut left = (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * kept;
    for &(token, weight) in &weights {
        left -= weight;
        if left < 0.0 {
            return Ok(token);
        }
    }
    Ok(weights[weights.len() - 1].0)
}

fn ended(tokenizer: &Tokenizer, tokens: &[u32], stop: &[String]) -> Result<bool> {
    if tokens.last() == Some(&tokenizer.eot()) {
        return Ok(true);
    }
    let text = tokenizer.decode(tokens)?;
    Ok(stop.iter().any(|stop| text.contains(stop)))
}

fn complete(tokenizer: &Tokenizer, tokens: Vec<u32>, stop: &[String]) -> Result<Completion> {
    let before_eot: Vec<u32> = tokens.iter().copied().take_while(|&token| token != tokenizer.eot()).collect();
    let mut text = tokenizer.decode(&before_eot)?;
    let end = stop.iter().filter_map(|stop| text.find(stop)).min();
    text.truncate(end.unwrap_or(text.len()));
    Ok(Completion { text, tokens })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(options: &Options, n: usize) -> Vec<u32> {
        let mut random = ChaCha8Rng::seed_from_u64(options.seed);
        (0..n).map(|_| choose(&[1.0, 3.0, 2.0, -4.0], options, &mut random).unwrap()).collect()
    }

    #[test]
    fn temperature_0_takes_the_likeliest_and_the_first_of_equals() {
        let options = Options::default();
        assert_eq!(draws(&options, 3), [1, 1, 1]);
        let mut random = ChaCha8Rng::seed_from_u64(0);
        assert_eq!(choose(&[2.0, 5.0, 5.0], &options, &mut random).unwrap(), 1);
    }

    #[test]
    fn sampling_follows_the_softmax_and_repeats_by_seed() {
        let options = Options { temperature: 1.0, ..Options::default() };
        let drawn = draws(&options, 20_000);
        assert_eq!(drawn, draws(&options, 20_000));
        let share = |token| drawn.iter().filter(|&&t| t == token).count() as f64 / 20_000.0;
        // softmax(1, 3, 2, −4) = 0.0900, 0.6648, 0.2446, 0.0006
        assert!((share(1) - 0.6648).abs() < 0.015 && (share(0) - 0.09).abs() < 0.01, "{}", share(1));
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_it() {
        let options = Options { temperature: 1.0, top_p: 0.7, ..Options::default() };
        let drawn = draws(&options, 2_000);
        assert!(drawn.contains(&2) && !drawn.contains(&0));
        let options = Options { top_p: 0.6, ..options };
        assert!(draws(&options, 200).iter().all(|&token| token == 1));
    }

    #[test]
    fn scores_that_are_not_finite_are_an_error() {
        let mut random = ChaCha8Rng::seed_from_u64(0);
        assert!(matches!(choose(&[f32::NAN, 1.0], &Options::default(), &mut random), Err(Error::NotFinite)));
    }
}
