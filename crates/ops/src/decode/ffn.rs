use std::ops::Range;

use rayon::prelude::*;

use super::Held;
use crate::Precision;
use crate::buffer::{Shared, output};
use crate::gemm::{
    Addend, COLUMNS, Output, Right, Short, TOGETHER_COLUMNS, Threads, View, bf16, multiply,
    panels_of_columns, panels_of_rows, task_size,
};
use crate::math::sigmoid;

/// The weights of a gated FFN of width R, packed once: M1, M2 and M3, [3, R, D], M3 being stored transposed.
pub struct FfnWeights {
    w_in: Right,  // [D, 2R]
    w_out: Right, // [R, D]
    /// Of each of the 3R rows, when they are integers.
    scales: Option<Vec<f32>>,
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
            width: r,
        }
    }

    /// Bytes of its numbers.
    pub fn bytes(&self) -> usize {
        self.w_in.bytes() + self.w_out.bytes() + self.scales.as_ref().map_or(0, |scales| 4 * scales.len())
    }

    /// hidden = silu(a) ⊙ b, a and b being a row's products with M1 and M2 at the columns from `first` on, with the
    /// scales of all three matrices.
    fn activate(&self, (a, b): (&[f32], &[f32]), first: usize, hidden: &mut [f32]) {
        match &self.scales {
            None => {
                for ((hidden, &a), b) in hidden.iter_mut().zip(a).zip(b) {
                    *hidden = a * sigmoid(a) * b;
                }
            }
            Some(scales) => {
                let of = |matrix: usize| &scales[matrix * self.width + first..][..hidden.len()];
                let (of_a, of_b, of_out) = (of(0), of(1), of(2));
                for (i, hidden) in hidden.iter_mut().enumerate() {
                    let a = a[i] * of_a[i];
                    *hidden = a * sigmoid(a) * (b[i] * of_b[i]) * of_out[i];
                }
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

/// y += Σ_levels (silu(x·M1ᵀ) ⊙ (x·M2ᵀ))·M3 over the rows of each run of each level, in the order of the levels, `x`
/// and `y` [N, D] (arXiv 2510.02375 §3). Weights are read once a run, however many rows it has. All levels are one
/// parallel loop into the hidden layers and one out of them: small ones cost no more than their numbers.
///
/// # Panics
/// When runs of a level overlap, are out of order or reach beyond N, and when the shapes do not fit.
pub fn add_ffn(x: &[f32], y: &mut [f32], d: usize, levels: &[Vec<FfnRun>]) {
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
    let place = |FfnRun { weights, rows }: &FfnRun<'_>| {
        let place = (n_products, n_hidden);
        n_products += rows.len() * 2 * weights.width;
        n_hidden += rows.len() * hidden_row(weights.width);
        place
    };
    let places: Vec<(usize, usize)> = levels.iter().flatten().map(place).collect();
    let (mut products, mut hidden) = (output(n_products), output(n_hidden));
    let layers = |(run, (first_product, first)): (_, (usize, usize))| Hidden { run, first_product, first };
    let runs: Vec<Hidden> = levels.iter().flatten().zip(places).map(layers).collect();
    let (all_products, all_hidden) = (Shared::new(&mut products), Shared::new(&mut hidden));
    let pieces = pieces(&runs);
    pieces.par_iter().with_max_len(1).for_each(|piece| {
        // SAFETY: pieces are disjoint parts of what each run has for itself.
        unsafe { piece.compute(x, d, (all_products, all_hidden)) }
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
        unsafe { multiply((rows.len(), left), weights.w_out.all().columns(columns), to) }
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
    unsafe fn compute(&self, x: &[f32], d: usize, (products, hidden): (Shared, Shared)) {
        let Self { of, rows, columns } = self;
        let FfnRun { weights, rows: own } = of.run;
        let (m, r, row) = (rows.len(), weights.width, hidden_row(weights.width));
        let left = View::rows(&x[(own.start + rows.start) * d..], d);
        let first = of.first_product + rows.start * 2 * r;
        // Both halves at once where their panels are not apart.
        let halves = match columns.len() == r {
            true => vec![0..2 * r],
            false => vec![columns.clone(), r + columns.start..r + columns.end],
        };
        for part in halves {
            let to = Output { to: products, offset: first + part.start, row: 2 * r, from: Addend::Zero };
            // SAFETY: the caller's promise; rows and columns are the run's.
            unsafe { multiply((m, left), weights.w_in.all().columns(part), to) }
        }
        for i in 0..m {
            let (at, to) =
                (first + i * 2 * r + columns.start, of.first + (rows.start + i) * row + columns.start);
            let n = columns.len();
            // SAFETY: as above; the products were just written.
            let (a, b, hidden) =
                unsafe { (products.slice(at, n), products.slice(at + r, n), hidden.slice(to, n)) };
            weights.activate((a, b), columns.start, hidden);
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
