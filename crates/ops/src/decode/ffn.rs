use std::ops::Range;

use rayon::prelude::*;

use super::Held;
use super::lora::{LoraRun, Place, add_lora};
use crate::buffer::Shared;
use crate::gemm::{
    Addend, Output, Right, Short, Threads, View, bf16, multiply_all, panels_of_columns, panels_of_rows,
};
use crate::{Activation, Precision};

/// The weights of a gated FFN of width R, packed once: M1, M2 and M3, [3, R, D], M3 being stored transposed.
pub struct FfnWeights {
    w_in: Right,  // [D, 2R]
    w_out: Right, // [R, D]
    /// Of each of the 3R rows, when they are integers.
    scales: Option<Vec<f32>>,
    /// What is added to the products of the first two [2R] and of the third [D].
    biases: Option<(Vec<f32>, Vec<f32>)>,
    width: usize,
}

impl FfnWeights {
    /// From numbers [3, R, D].
    ///
    /// # Panics
    /// When they are not whole rows of D, or not three times as many rows.
    pub fn new(values: &[f32], d: usize, held: Held) -> Self {
        let (r, inner) = sizes(values.len(), d);
        match held {
            Held::F32 => {
                let pack = |view, shape| Right::pack(Precision::F32, view, shape, Threads::All);
                let (w_in, w_out) = values.split_at(inner);
                Self {
                    w_in: pack(View::transposed(w_in, d), (d, 2 * r)),
                    w_out: pack(View::rows(w_out, d), (r, d)),
                    scales: None,
                    biases: None,
                    width: r,
                }
            }
            Held::Bf16 => {
                let rounded: Vec<u16> = values.iter().map(|&x| bf16(x) as u16).collect();
                Self::of_bf16(&rounded, d)
            }
        }
    }

    /// From the bits of bf16 [3, R, D].
    ///
    /// # Panics
    /// As [`FfnWeights::new`].
    pub fn of_bf16(values: &[u16], d: usize) -> Self {
        let (r, inner) = sizes(values.len(), d);
        let (w_in, w_out) = values.split_at(inner);
        Self {
            w_in: Right::hold(Short::Bf16(panels_of_rows(w_in, (d, 2 * r))), (d, 2 * r)),
            w_out: Right::hold(Short::Bf16(panels_of_columns(w_out, (r, d))), (r, d)),
            scales: None,
            biases: None,
            width: r,
        }
    }

    /// From integers [3, R, D] and the scale of each row [3, R].
    ///
    /// # Panics
    /// As [`FfnWeights::new`], and when there is not one scale a row.
    pub fn of_int8(values: &[i8], scales: &[f32], d: usize) -> Self {
        let (r, inner) = sizes(values.len(), d);
        assert_eq!(scales.len(), 3 * r, "scales of 3 x {r} rows");
        let (w_in, w_out) = values.split_at(inner);
        Self {
            w_in: Right::hold(Short::Int8(panels_of_rows(w_in, (d, 2 * r))), (d, 2 * r)),
            w_out: Right::hold(Short::Int8(panels_of_columns(w_out, (r, d))), (r, d)),
            scales: Some(scales.to_vec()),
            biases: None,
            width: r,
        }
    }

    /// With biases, of M1 and M2 [2R] and of M3 [D]; not of integers.
    ///
    /// # Panics
    /// When they have other lengths, or the weights are integers.
    pub fn with_biases(self, inner: Vec<f32>, outer: Vec<f32>) -> Self {
        let expected = (2 * self.width, self.w_out.columns());
        assert!(self.scales.is_none() && (inner.len(), outer.len()) == expected, "biases of {expected:?}");
        Self { biases: Some((inner, outer)), ..self }
    }

    /// Bytes of its numbers.
    pub fn bytes(&self) -> usize {
        self.w_in.bytes() + self.w_out.bytes() + self.scales.as_ref().map_or(0, |scales| 4 * scales.len())
    }

    /// What is added to the products of M1 and M2.
    fn before(&self) -> Addend {
        match &self.biases {
            // Every row adds the same one: the rows of the addend lie 0 apart.
            Some((inner, _)) => Addend::Other { values: Shared::of(inner), offset: 0, row: 0 },
            None => Addend::Zero,
        }
    }

    fn add_outer_bias(&self, y: &mut [f32]) {
        let Some((_, outer)) = &self.biases else { return };
        let rows = y.chunks_exact_mut(outer.len());
        rows.for_each(|y| y.iter_mut().zip(outer).for_each(|(y, bias)| *y += bias));
    }

    /// hidden = f(x·M1ᵀ) ⊙ (x·M2ᵀ) of a row of products [2R], with the scales of all three matrices.
    fn activate(&self, activation: Activation, products: &[f32], hidden: &mut [f32]) {
        match &self.scales {
            None => activation.gate(products, hidden),
            Some(scales) => activation.gate_scaled(products, scales, hidden),
        }
    }
}

/// R, and the numbers of M1 and M2.
fn sizes(len: usize, d: usize) -> (usize, usize) {
    assert!(d > 0 && len > 0 && len.is_multiple_of(3 * d), "{len} numbers of an FFN of d_model {d}");
    (len / (3 * d), len / 3 * 2)
}

/// Consecutive rows of x that one FFN serves.
#[derive(Clone)]
pub struct FfnRun<'a> {
    /// The FFN.
    pub weights: &'a FfnWeights,
    /// The rows.
    pub rows: Range<usize>,
}

/// y += (f(x·M1ᵀ) ⊙ (x·M2ᵀ))·M3 over the rows of each run, `x` and `y` [N, D] (arXiv 2510.02375 §3), f being the
/// activation. Weights are read once a run, however many rows it has.
///
/// # Panics
/// When runs overlap, are out of order or reach beyond N, and when the shapes do not fit.
pub fn add_ffn(x: &[f32], y: &mut [f32], d: usize, activation: Activation, runs: &[FfnRun]) {
    assert_eq!(x.len(), y.len(), "elements of x and y");
    let mut end = 0;
    for FfnRun { weights, rows } in runs {
        let fits = rows.start >= end && rows.end > rows.start && rows.end * d <= x.len();
        assert!(fits && weights.w_out.columns() == d, "run {rows:?} after {end}, of {} numbers", x.len());
        end = rows.end;
    }
    let y = Shared::new(y);
    let run = |(products, hidden): &mut (Vec<f32>, Vec<f32>), FfnRun { weights, rows }: &FfnRun, threads| {
        let (m, r, first) = (rows.len(), weights.width, rows.start * d);
        // An odd number of cache lines: rows of the hidden layer are then read where they are.
        let row = r.next_multiple_of(32) + 16;
        products.resize(m * 2 * r, 0.0);
        hidden.resize(m * row, 0.0);
        let to = Output { to: Shared::new(products), offset: 0, row: 2 * r, from: weights.before() };
        // SAFETY: the products are [m, 2r] and this call's own.
        unsafe { multiply_all((m, View::rows(&x[first..], d)), weights.w_in.all(), to, threads) }
        let rows = products.chunks_exact(2 * r).zip(hidden.chunks_exact_mut(row));
        rows.for_each(|(products, hidden)| weights.activate(activation, products, &mut hidden[..r]));
        let to = Output { to: y, offset: first, row: d, from: Addend::Itself };
        // SAFETY: the rows of runs do not overlap and lie in y, which is uniquely borrowed (above).
        unsafe { multiply_all((m, View::rows(hidden, row)), weights.w_out.all(), to, threads) }
        // SAFETY: as above.
        weights.add_outer_bias(unsafe { y.slice(first, m * d) });
    };
    if runs.len() < rayon::current_num_threads() {
        let mut buffers = (vec![], vec![]);
        runs.iter().for_each(|one| run(&mut buffers, one, Threads::All));
    } else {
        runs.par_iter().for_each_init(Default::default, |buffers, one| run(buffers, one, Threads::One));
    }
}

/// Additions to the three matrices of an FFN, of each in parts, and the rows that they serve.
#[derive(Clone, Default)]
pub struct FfnLoraRuns<'a> {
    /// To M1, under the activation.
    pub gate: Vec<Vec<LoraRun<'a>>>,
    /// To M2, beside it.
    pub up: Vec<Vec<LoraRun<'a>>>,
    /// To M3.
    pub down: Vec<Vec<LoraRun<'a>>>,
    /// What they are multiplied by.
    pub alpha: f32,
}

/// [`add_ffn`] of one FFN for all rows, with additions to its matrices; rows that these do not serve have the bits
/// that it gives them.
///
/// # Panics
/// As [`add_ffn`] and [`add_lora`], and when the weights are integers.
pub fn add_ffn_lora(
    (x, y, d): (&[f32], &mut [f32], usize),
    activation: Activation,
    weights: &FfnWeights,
    lora: &FfnLoraRuns,
) {
    assert!(x.len() == y.len() && weights.w_out.columns() == d, "elements of x and y, in rows of {d}");
    assert!(weights.scales.is_none(), "an FFN of integers");
    let (m, r) = (x.len() / d, weights.width);
    let mut products = vec![0.0; m * 2 * r];
    let to = Output { to: Shared::new(&mut products), offset: 0, row: 2 * r, from: weights.before() };
    // SAFETY: the products are [m, 2r] and this call's own.
    unsafe { multiply_all((m, View::rows(x, d)), weights.w_in.all(), to, Threads::All) }
    for (column, parts) in [(0, &lora.gate), (r, &lora.up)] {
        let place = Place { column, row: 2 * r };
        parts.iter().for_each(|runs| add_lora(x, (&mut products, place), lora.alpha, runs));
    }
    let mut hidden = vec![0.0; m * r];
    let rows = products.par_chunks_exact(2 * r).zip(hidden.par_chunks_exact_mut(r));
    rows.for_each(|(products, hidden)| weights.activate(activation, products, hidden));
    let to = Output { to: Shared::new(y), offset: 0, row: d, from: Addend::Itself };
    // SAFETY: y is [m, d] and uniquely borrowed.
    unsafe { multiply_all((m, View::rows(&hidden, r)), weights.w_out.all(), to, Threads::All) }
    let place = Place { column: 0, row: d };
    lora.down.iter().for_each(|runs| add_lora(&hidden, (y, place), lora.alpha, runs));
    weights.add_outer_bias(y);
}
