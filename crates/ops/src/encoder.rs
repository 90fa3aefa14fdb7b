//! Layers of a bidirectional encoder (BERT, arXiv 1810.04805), forward only, for embedding texts.
//!
//! Sequences lie packed one after another without padding: N rows in all. Everything runs on the calling thread
//! and over buffers that the caller keeps: threads are busy with a batch each, whose activations stay near them.
//! A row's result depends on its own sequence only, to the bit, and neither on the rows beside it nor on threads.

use crate::Precision;
use crate::buffer::Shared;
use crate::gemm::{Addend, Output, Right, Threads, View, multiply};
use crate::math::{dot, exp_of_differences, max, scale, sum};

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
