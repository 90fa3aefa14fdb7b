//! Layers of a bidirectional encoder (BERT, arXiv 1810.04805), forward only, for embedding texts.
//!
//! Sequences lie packed one after another without padding: N rows in all. Everything runs on the calling thread
//! and over buffers that the caller keeps: threads are busy with a batch each, whose activations stay near them.
//! A row's result depends on its own sequence only, to the bit, and neither on the rows beside it nor on threads.

use crate::Precision;
use crate::buffer::Shared;
use crate::gemm::{Addend, Output, Right, Threads, View, multiply};
use crate::math::{dot, exp, exp_of_differences, max, scale, sigmoid, sum};

/// Query rows of a tile of attention.
const ROWS: usize = 64;

/// y = x·Wᵀ + bias, with the weights packed once and used for every batch.
pub struct Dense {
    weight: Right, // [I, O]
    bias: Vec<f32>,
    inputs: usize,
}

impl Dense {
    /// From `weight` [O, I] and `bias` [O].
    ///
    /// # Panics
    /// When the bias is empty or the weights are not as many as O·I.
    pub fn new(weight: &[f32], bias: Vec<f32>) -> Self {
        let outputs = bias.len();
        assert!(
            outputs > 0 && weight.len().is_multiple_of(outputs),
            "{} weights, {outputs} biases",
            weight.len()
        );
        let inputs = weight.len() / outputs;
        let view = View::transposed(weight, inputs);
        let weight = Right::pack(Precision::F32, view, (inputs, outputs), Threads::All);
        Self { weight, bias, inputs }
    }

    /// `x` [N, I] to `y` [N, O].
    ///
    /// # Panics
    /// When the shapes do not fit.
    pub fn forward(&self, x: &[f32], y: &mut [f32]) {
        let (n, outputs) = (x.len() / self.inputs.max(1), self.bias.len());
        assert_eq!((x.len(), y.len()), (n * self.inputs, n * outputs), "elements of x and y");
        // Every row adds the same one: the rows of the addend lie 0 apart.
        let from = Addend::Other { values: Shared::of(&self.bias), offset: 0, row: 0 };
        let to = Output { to: Shared::new(y), offset: 0, row: outputs, from };
        // SAFETY: y is [n, outputs] (above) and uniquely borrowed, and the bias has `outputs` elements.
        unsafe { multiply((n, View::rows(x, self.inputs)), self.weight.all(), to) }
    }
}

/// What is applied to the inner layer of an FFN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x·Φ(x), Φ being the normal distribution function.
    Gelu,
    /// Its older approximation by tanh.
    GeluTanh,
    /// max(x, 0)
    Relu,
}

impl Activation {
    /// Replaces each element by its activation, to about 1e-6.
    pub fn forward(self, x: &mut [f32]) {
        match self {
            Self::Gelu => x.iter_mut().for_each(|x| *x = gelu(*x)),
            Self::GeluTanh => x.iter_mut().for_each(|x| *x = gelu_tanh(*x)),
            Self::Relu => x.iter_mut().for_each(|x| *x = relu(*x)),
        }
    }
}

#[inline(always)]
fn relu(x: f32) -> f32 {
    if x > 0.0 { x } else { 0.0 }
}

/// x·Φ(x) = max(x, 0) − |x|·Φ(−|x|), where no digits cancel. Φ(−|x|) = ½·erfc(|x|/√2) by Abramowitz & Stegun
/// 7.1.26: a polynomial in 1 / (1 + p·|x|/√2) times e^(−x²/2), to 1e-7.
#[inline(always)]
fn gelu(x: f32) -> f32 {
    const P: f32 = 0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2;
    let size = x.abs();
    let t = 1.0 / (1.0 + P * size);
    let p = 1.061_405_4_f32;
    let p = p * t - 1.453_152_1;
    let p = p * t + 1.421_413_8;
    let p = p * t - 0.284_496_72;
    let p = p * t + 0.254_829_6;
    relu(x) - 0.5 * size * (p * t) * exp(-0.5 * x * x)
}

/// ½·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))), and ½·(1 + tanh(u)) is the sigmoid of 2u.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    use std::f32::consts::{FRAC_2_SQRT_PI, SQRT_2};
    x * sigmoid(SQRT_2 * FRAC_2_SQRT_PI * (x + 0.044_715 * x * x * x))
}

/// (x − mean) / √(variance + eps) · gain + bias over rows (arXiv 1607.06450).
pub struct LayerNorm {
    gain: Vec<f32>,
    bias: Vec<f32>,
    eps: f32,
}

impl LayerNorm {
    /// From `gain` [D] and `bias` [D].
    ///
    /// # Panics
    /// When they are empty or differ in length.
    pub fn new(gain: Vec<f32>, bias: Vec<f32>, eps: f32) -> Self {
        assert!(!gain.is_empty() && gain.len() == bias.len(), "{} gains, {} biases", gain.len(), bias.len());
        Self { gain, bias, eps }
    }

    /// Replaces `x` [N, D] by the norm of x + `residual` [N, D].
    ///
    /// # Panics
    /// When the shapes do not fit.
    pub fn forward(&self, x: &mut [f32], residual: &[f32]) {
        let d = self.gain.len();
        assert!(
            x.len() == residual.len() && x.len().is_multiple_of(d),
            "{} elements, {} to add",
            x.len(),
            residual.len()
        );
        for (x, residual) in x.chunks_exact_mut(d).zip(residual.chunks_exact(d)) {
            x.iter_mut().zip(residual).for_each(|(x, residual)| *x += residual);
            let mean = sum(x) / d as f32;
            x.iter_mut().for_each(|x| *x -= mean);
            let inverse = 1.0 / (dot(x, x) / d as f32 + self.eps).sqrt();
            for ((x, gain), bias) in x.iter_mut().zip(&self.gain).zip(&self.bias) {
                *x = *x * inverse * gain + bias;
            }
        }
    }
}

/// Attention of every position to all positions of its own sequence. Holds the buffers it works in.
pub struct SelfAttention {
    heads: usize,
    head_width: usize,
    keys: Right,
    values: Right,
    scores: Vec<f32>,
}

impl SelfAttention {
    /// For H heads of width K.
    pub fn new(heads: usize, head_width: usize) -> Self {
        let empty = || Right::empty(Precision::F32);
        Self { heads, head_width, keys: empty(), values: empty(), scores: vec![] }
    }

    /// softmax(q·kᵀ/√K)·v per head: of `qkv` [N, 3·H·K], the queries, keys and values of a row one after the
    /// other, to `y` [N, H·K]. `lengths` are those of the sequences, N in all.
    ///
    /// # Panics
    /// When the shapes do not fit.
    pub fn forward(&mut self, qkv: &[f32], lengths: &[usize], y: &mut [f32]) {
        let d = self.heads * self.head_width;
        let n: usize = lengths.iter().sum();
        assert_eq!((qkv.len(), y.len()), (n * 3 * d, n * d), "elements of qkv and y");
        let mut first = 0;
        for &length in lengths.iter().filter(|&&length| length > 0) {
            for head in 0..self.heads {
                let qkv = &qkv[first * 3 * d + head * self.head_width..];
                self.head(qkv, length, &mut y[first * d + head * self.head_width..]);
            }
            first += length;
        }
    }

    /// One head of a sequence of `length` rows, at least one, which are 3·H·K apart in `qkv` and H·K in `y`.
    fn head(&mut self, qkv: &[f32], length: usize, y: &mut [f32]) {
        let (d, width) = (self.heads * self.head_width, self.head_width);
        let row = 3 * d;
        self.keys.repack(View::transposed(&qkv[d..], row), (width, length), Threads::One);
        self.values.repack(View::rows(&qkv[2 * d..], row), (length, width), Threads::One);
        self.scores.resize(ROWS.min(length) * length, 0.0);
        let factor = 1.0 / (width as f32).sqrt();
        for first in (0..length).step_by(ROWS) {
            let m = ROWS.min(length - first);
            let scores = &mut self.scores[..m * length];
            let queries = View::rows(&qkv[first * row..], row);
            let to = Output { to: Shared::new(scores), offset: 0, row: length, from: Addend::Zero };
            // SAFETY: the scores are [m, length] and uniquely borrowed.
            unsafe { multiply((m, queries), self.keys.all(), to) }
            let mut sums = [0f32; ROWS];
            for (scores, sum) in scores.chunks_exact_mut(length).zip(&mut sums) {
                *sum = exp_of_differences(scores, max(scores), factor);
            }
            let y = &mut y[first * d..];
            assert!((m - 1) * d + width <= y.len(), "rows of y");
            let to = Output { to: Shared::new(y), offset: 0, row: d, from: Addend::Zero };
            // SAFETY: the last of the m rows, d apart and `width` wide, ends in y (above), uniquely borrowed.
            unsafe { multiply((m, View::rows(scores, length)), self.values.all(), to) }
            // A row of values is shorter than one of scores.
            for (y, sum) in y.chunks_mut(d).zip(&sums[..m]) {
                scale(&mut y[..width], 1.0 / sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The integral of the normal density by Simpson's rule, which needs no erf of another library.
    fn normal_distribution(x: f64) -> f64 {
        let n = 2000;
        let h = x / f64::from(n);
        let density = |u: f64| (-0.5 * u * u).exp() / std::f64::consts::TAU.sqrt();
        let weight = |i: i32| if i == 0 || i == n { 1.0 } else { 2.0 + 2.0 * f64::from(i % 2) };
        0.5 + (0..=n).map(|i| weight(i) * density(h * f64::from(i))).sum::<f64>() * h / 3.0
    }

    #[test]
    fn activations_are_close_to_their_definitions() {
        for i in -1200..=1200 {
            let x = f64::from(i) * 0.01;
            let tanh = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            for (activation, expected) in [
                (Activation::Gelu, x * normal_distribution(x)),
                (Activation::GeluTanh, 0.5 * x * (1.0 + tanh.tanh())),
                (Activation::Relu, x.max(0.0)),
            ] {
                let mut found = [x as f32];
                activation.forward(&mut found);
                // An f32 is within 6e-8 of its size.
                let error = (f64::from(found[0]) - expected).abs();
                assert!(error < 3e-7 * x.abs().max(1.0), "{activation:?}({x}): error {error}");
            }
        }
    }
}
