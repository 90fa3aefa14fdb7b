//! The one sampler: a token from the scores of all.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::BTreeMap;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::engine::Sampling;
use crate::{Error, Result};

/// Candidates that are put in order at first; when more are needed, so many times as many.
const FIRST_RANKED: usize = 128;
const MORE_RANKED: usize = 16;

/// How often each token was generated; those that are only in the prompt 0 times.
pub(crate) type Seen = BTreeMap<u32, u32>;

/// Chooses a token by its score, `logits` [V], as `sampling` says. Takes one random number unless the temperature is 0.
///
/// Only as many candidates are put in order as the choice looks at.
///
/// # Errors
/// When a score is NaN or infinite, or none is finite.
pub(crate) fn choose(
    logits: &[f32],
    sampling: &Sampling,
    seen: &Seen,
    random: &mut ChaCha8Rng,
) -> Result<u32> {
    let scores = adjusted(logits, sampling, seen);
    let (best, largest) = likeliest(&scores)?;
    if sampling.temperature == 0.0 {
        return Ok(best);
    }
    let weight = |&x: &f32| (f64::from(x - largest) / sampling.temperature).exp();
    let weights = (0u32..).zip(scores.iter().map(weight));
    let mut candidates = Vec::with_capacity(scores.len());
    // The likeliest weighs 1.
    candidates.extend(weights.filter(|(_, weight)| *weight >= sampling.min_p));
    let mut candidates = Ranked::new(candidates);
    candidates.keep(sampling.top_k);
    let uniform = (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    Ok(match candidates.draw_early(sampling.top_p, uniform) {
        Some(token) => token,
        None => candidates.draw(sampling.top_p, uniform),
    })
}

/// The index of the highest score, the first of equals, and the score.
///
/// # Errors
/// When a score is NaN or +∞, or all are −∞.
pub(crate) fn likeliest(scores: &[f32]) -> Result<(u32, f32)> {
    // In lanes, which the compiler makes vectors of.
    const LANES: usize = 16;
    let (mut most, mut wrong) = ([f32::NEG_INFINITY; LANES], [false; LANES]);
    for chunk in scores.chunks(LANES) {
        for ((&score, most), wrong) in chunk.iter().zip(&mut most).zip(&mut wrong) {
            *wrong |= score.is_nan() | (score == f32::INFINITY);
            *most = if score > *most { score } else { *most };
        }
    }
    let largest = most.into_iter().fold(f32::NEG_INFINITY, f32::max);
    if wrong.contains(&true) || !largest.is_finite() {
        return Err(Error::NotFinite);
    }
    // Of two zeros, the positive one is the higher.
    let is_best = |score: &f32| score.total_cmp(&if largest == 0.0 { 0.0 } else { largest }).is_eq();
    let best = scores.iter().position(is_best).or_else(|| scores.iter().position(|&x| x == largest));
    best.map(|best| (best as u32, scores[best])).ok_or(Error::NotFinite)
}

/// The scores with penalties and biases; as they are without any.
fn adjusted<'a>(logits: &'a [f32], sampling: &Sampling, seen: &Seen) -> Cow<'a, [f32]> {
    let Sampling { presence_penalty, frequency_penalty, repetition_penalty, ref logit_bias, .. } = *sampling;
    let mut scores = Cow::Borrowed(logits);
    let penalties = (presence_penalty, frequency_penalty, repetition_penalty) != (0.0, 0.0, 1.0);
    for (&token, &count) in seen.iter().filter(|_| penalties) {
        let mut score = f64::from(logits[token as usize]);
        score = if score > 0.0 { score / repetition_penalty } else { score * repetition_penalty };
        if count > 0 {
            score -= presence_penalty + frequency_penalty * f64::from(count);
        }
        scores.to_mut()[token as usize] = score as f32;
    }
    for (&token, &bias) in logit_bias {
        scores.to_mut()[token as usize] += bias;
    }
    scores
}

/// Tokens with weights that need no sum of 1, the heaviest first as far as they are in order.
struct Ranked {
    weights: Vec<(u32, f64)>,
    n_sorted: usize,
}

/// Heaviest first, of equals the lower token.
fn by_rank(a: &(u32, f64), b: &(u32, f64)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

impl Ranked {
    fn new(weights: Vec<(u32, f64)>) -> Self {
        Self { weights, n_sorted: 0 }
    }

    /// Keeps the `n` heaviest; 0 is all.
    fn keep(&mut self, n: usize) {
        if n > 0 && n < self.weights.len() {
            self.weights.select_nth_unstable_by(n, by_rank);
            self.weights.truncate(n);
        }
    }

    /// The weight at a rank.
    fn at(&mut self, rank: usize) -> (u32, f64) {
        while rank >= self.n_sorted {
            self.sort(((MORE_RANKED - 1) * self.n_sorted).max(FIRST_RANKED));
        }
        self.weights[rank]
    }

    /// Puts `n` more in order, or all where that is a good part of them.
    fn sort(&mut self, n: usize) {
        let rest = &mut self.weights[self.n_sorted..];
        let n = if n > rest.len() / 8 { rest.len() } else { n };
        if n < rest.len() {
            rest.select_nth_unstable_by(n, by_rank);
        }
        rest[..n].sort_unstable_by(by_rank);
        self.n_sorted += n;
    }

    /// What [`Ranked::draw`] returns, where it can be told from the heaviest candidates alone; none where the order
    /// in which the others are summed could decide.
    fn draw_early(&mut self, top_p: f64, uniform: f64) -> Option<u32> {
        let n = self.weights.len();
        let total: f64 = self.weights.iter().map(|(_, weight)| weight).sum();
        // Two sums of n positive terms in different orders differ by less than n·ε of them, and so do the n rests
        // that are left of two numbers that far apart; twice that is more than both.
        let slack = 4.0 * n as f64 * f64::EPSILON * total;
        let (mut n_kept, mut kept) = (n, total);
        if top_p < 1.0 {
            (n_kept, kept) = (0, 0.0);
            loop {
                kept += self.weight(n_kept)?;
                n_kept += 1;
                let beyond = kept - top_p * total;
                if beyond.abs() <= slack {
                    return None;
                }
                if beyond > 0.0 {
                    break;
                }
            }
        }
        let mut left = uniform * kept;
        for rank in 0..n_kept {
            let (token, weight) = self.at(rank);
            left -= weight;
            if left.abs() <= slack {
                return None;
            }
            if left < 0.0 {
                return Some(token);
            }
        }
        None
    }

    fn weight(&mut self, rank: usize) -> Option<f64> {
        (rank < self.weights.len()).then(|| self.at(rank).1)
    }

    /// A candidate of the heaviest that together have `top_p` of all weight (nucleus sampling, arXiv 1904.09751), each
    /// as likely as it weighs: the one that the part `uniform` of their sum falls on, heaviest first.
    fn draw(&mut self, top_p: f64, uniform: f64) -> u32 {
        self.sort(self.weights.len());
        let weights = &mut self.weights;
        let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
        let mut kept = 0.0;
        let n_kept = weights.iter().position(|(_, weight)| {
            kept += weight;
            kept >= top_p * total
        });
        weights.truncate(n_kept.map_or(weights.len(), |last| last + 1));
        let kept: f64 = weights.iter().map(|(_, weight)| weight).sum();
        let mut left = uniform * kept;
        for &(token, weight) in &*weights {
            left -= weight;
            if left < 0.0 {
                return token;
            }
        }
        weights[weights.len() - 1].0
    }
}

#[cfg(test)]
mod tests;
