use std::ops::Range;

use rayon::prelude::*;

use super::Held;
use super::lora::{LoraRun, Place, add_lora};
use crate::buffer::{Shared, output};
use crate::gemm::{
    Addend, COLUMNS, Output, Right, Short, TOGETHER_COLUMNS, Threads, View, bf16, multiply, multiply_all,
    panels_of_columns, panels_of_rows, task_size,
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

    /// What is added to the products of M1 and M2 from column `first` on.
    fn before(&self, first: usize) -> Addend {
        match &self.biases {
            // Every row adds the same one: the rows of the addend lie 0 apart.
            Some((inner, _)) => Addend::Other { values: Shared::of(inner), offset: first, row: 0 },
            None => Addend::Zero,
        }
    }

    /// Of a row from column `first` on.
    fn add_outer_bias(&self, first: usize, y: &mut [f32]) {
        let Some((_, outer)) = &self.biases else { return };
        y.iter_mut().zip(&outer[first..]).for_each(|(y, bias)| *y += bias);
    }

    /// hidden = f(a) ⊙ b, a and b being a row's products with M1 and M2 at the columns from `first` on, with the
    /// scales of all three matrices.
    fn activate(&self, activation: Activation, products: (&[f32], &[f32]), first: usize, hidden: &mut [f32]) {
        match &self.scales {
            None => activation.gate(products, hidden),
            Some(scales) => {
                let of = |matrix: usize| &scales[matrix * self.width + first..][..hidden.len()];
                activation.gate_scaled(products, [of(0), of(1), of(2)], hidden);
            }
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

/// y += Σ_levels (f(x·M1ᵀ) ⊙ (x·M2ᵀ))·M3 over the rows of each run of each level, in the order of the levels, `x`
/// and `y` [N, D] (arXiv 2510.02375 §3), f being the activation. Weights are read once a run, however many rows it
/// has. All levels are one parallel loop into the hidden layers and one out of them: small ones cost no more than
/// their numbers.
///
/// # Panics
/// When runs of a level overlap, are out of order or reach beyond N, and when the shapes do not fit.
pub fn add_ffn(x: &[f32], y: &mut [f32], d: usize, activation: Activation, levels: &[Vec<FfnRun>]) {
    assert_eq!(x.len(), y.len(), "elements of x and y");
    for level in levels {
        let mut end = 0;
        for FfnRun { weights, rows } in level {
            let fits = rows.start >= end && rows.end > rows.start && rows.end * d <= x.len();
            assert!(fits && weights.w_out.columns() == d, "run {rows:?} after {end}, of {} numbers", x.len());
            end = rows.end;
        }
    }
    let (mut n_products, mut n_hidden) = (0, 0);
    let mut runs = vec![];
    for run in levels.iter().flatten() {
        runs.push(Hidden { run, first_product: n_products, first: n_hidden });
        n_products += run.rows.len() * 2 * run.weights.width;
        n_hidden += run.rows.len() * hidden_row(run.weights.width);
    }
    if runs.is_empty() {
        return;
    }
    let (mut products, mut hidden) = (output(n_products), output(n_hidden));
    let (all_products, all_hidden) = (Shared::new(&mut products), Shared::new(&mut hidden));
    let pieces = pieces(&runs);
    pieces.par_iter().with_max_len(1).for_each(|piece| {
        // SAFETY: pieces are disjoint parts of what each run has for itself.
        unsafe { piece.compute((x, d), activation, (all_products, all_hidden)) }
    });
    let (hidden, y) = (&hidden[..], Shared::new(y));
    let (n, [rows, columns]) = (x.len() / d, task_size(x.len() / d, d));
    let tasks = (0..n).step_by(rows).flat_map(|row| (0..d).step_by(columns).map(move |column| (row, column)));
    tasks.collect::<Vec<_>>().into_par_iter().with_max_len(1).for_each(|(row, column)| {
        for of in &runs {
            // SAFETY: tasks write disjoint rows and columns of y, which is uniquely borrowed.
            unsafe { of.add(hidden, row..n.min(row + rows), column..d.min(column + columns), (y, d)) }
        }
    });
}

/// Numbers between rows of a hidden layer: an odd number of cache lines, so that they are read where they are.
fn hidden_row(width: usize) -> usize {
    width.next_multiple_of(COLUMNS) + 16
}

/// Where the products [rows, 2R] and the hidden layer [rows, R] of a run are.
struct Hidden<'a> {
    run: &'a FfnRun<'a>,
    first_product: usize,
    first: usize,
}

impl Hidden<'_> {
    /// y += hidden·M3 for those of these rows that it has, at these columns.
    ///
    /// # Safety
    /// No other task reaches these rows and columns of y [N, D].
    unsafe fn add(&self, hidden: &[f32], rows: Range<usize>, columns: Range<usize>, (y, d): (Shared, usize)) {
        let FfnRun { weights, rows: own } = self.run;
        let rows = rows.start.max(own.start)..rows.end.min(own.end);
        if rows.is_empty() {
            return;
        }
        let row = hidden_row(weights.width);
        let left = View::rows(&hidden[self.first + (rows.start - own.start) * row..], row);
        let offset = rows.start * d + columns.start;
        let to = Output { to: y, offset, row: d, from: Addend::Itself };
        // SAFETY: the rows are of y (checked by the caller of this), the rest is the caller's promise.
        unsafe { multiply((rows.len(), left), weights.w_out.all().columns(columns.clone()), to) }
        for row in rows {
            // SAFETY: as above.
            weights.add_outer_bias(columns.start, unsafe { y.slice(row * d + columns.start, columns.len()) });
        }
    }
}

/// Some rows of a run, counted from its first, and columns of its hidden layer.
struct Piece<'a> {
    of: &'a Hidden<'a>,
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Piece<'_> {
    /// The products and the hidden layer of this piece.
    ///
    /// # Safety
    /// No other task reaches them.
    unsafe fn compute(
        &self,
        (x, d): (&[f32], usize),
        activation: Activation,
        (products, hidden): (Shared, Shared),
    ) {
        let Self { of, rows, columns } = self;
        let FfnRun { weights, rows: own } = of.run;
        let (m, r, row) = (rows.len(), weights.width, hidden_row(weights.width));
        let left = View::rows(&x[(own.start + rows.start) * d..], d);
        let first = of.first_product + rows.start * 2 * r;
        let product = |part: Range<usize>| {
            let from = weights.before(part.start);
            let to = Output { to: products, offset: first + part.start, row: 2 * r, from };
            // SAFETY: the caller's promise; rows and columns are the run's.
            unsafe { multiply((m, left), weights.w_in.all().columns(part), to) }
        };
        // Both halves at once where their panels are not apart.
        if columns.len() == r {
            product(0..2 * r);
        } else {
            product(columns.clone());
            product(r + columns.start..r + columns.end);
        }
        for i in 0..m {
            let (at, to) =
                (first + i * 2 * r + columns.start, of.first + (rows.start + i) * row + columns.start);
            let n = columns.len();
            // SAFETY: as above; the products were just written.
            let (a, b, hidden) =
                unsafe { (products.slice(at, n), products.slice(at + r, n), hidden.slice(to, n)) };
            weights.activate(activation, (a, b), columns.start, hidden);
        }
    }
}

/// The runs in pieces of about equal work, some for each thread.
fn pieces<'a>(runs: &'a [Hidden<'a>]) -> Vec<Piece<'a>> {
    let work = |of: &Hidden| of.run.rows.len() * of.run.weights.width;
    let a_piece = runs.iter().map(work).sum::<usize>().div_ceil(4 * rayon::current_num_threads()).max(1);
    let mut pieces = vec![];
    for of in runs {
        let (m, r) = (of.run.rows.len(), of.run.weights.width);
        let [rows, _] = task_size(m, r);
        // Halves that do not begin a panel are not divided.
        let columns = match r.is_multiple_of(COLUMNS) {
            true => a_piece.div_ceil(rows.min(m)).next_multiple_of(TOGETHER_COLUMNS).min(r),
            false => r,
        };
        for row in (0..m).step_by(rows) {
            for column in (0..r).step_by(columns) {
                let columns = column..r.min(column + columns);
                pieces.push(Piece { of, rows: row..m.min(row + rows), columns });
            }
        }
    }
    pieces
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
    let to = Output { to: Shared::new(&mut products), offset: 0, row: 2 * r, from: weights.before(0) };
    // SAFETY: the products are [m, 2r] and this call's own.
    unsafe { multiply_all((m, View::rows(x, d)), weights.w_in.all(), to, Threads::All) }
    for (column, parts) in [(0, &lora.gate), (r, &lora.up)] {
        let place = Place { column, row: 2 * r };
        parts.iter().for_each(|runs| add_lora(x, (&mut products, place), lora.alpha, runs));
    }
    let mut hidden = vec![0.0; m * r];
    let rows = products.par_chunks_exact(2 * r).zip(hidden.par_chunks_exact_mut(r));
    rows.for_each(|(products, hidden)| weights.activate(activation, products.split_at(r), 0, hidden));
    let to = Output { to: Shared::new(y), offset: 0, row: d, from: Addend::Itself };
    // SAFETY: y is [m, d] and uniquely borrowed.
    unsafe { multiply_all((m, View::rows(&hidden, r)), weights.w_out.all(), to, Threads::All) }
    let place = Place { column: 0, row: d };
    lora.down.iter().for_each(|runs| add_lora(&hidden, (y, place), lora.alpha, runs));
    y.chunks_exact_mut(d).for_each(|y| weights.add_outer_bias(0, y));
}
