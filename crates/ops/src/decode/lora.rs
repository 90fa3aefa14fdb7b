use std::ops::Range;

use rayon::prelude::*;

use super::Held;
use crate::Precision;
use crate::buffer::Shared;
use crate::gemm::{
    Addend, Output, Right, Short, Threads, View, bf16, multiply_all, panels_of_columns, panels_of_rows,
};

/// Low-rank matrices for a layer from I to O, packed once: A [R, I], then B [R, O], stored transposed.
pub struct LoraWeights {
    a: Right, // [I, R]
    b: Right, // [R, O]
}

impl LoraWeights {
    /// From R·(I + O) numbers.
    ///
    /// # Panics
    /// When they are not a multiple of I + O.
    pub fn new(values: &[f32], (i, o): (usize, usize), held: Held) -> Self {
        let r = rank(values.len(), (i, o));
        match held {
            Held::F32 => {
                let pack = |view, shape| Right::pack(Precision::F32, view, shape, Threads::All);
                let (a, b) = values.split_at(r * i);
                Self { a: pack(View::transposed(a, i), (i, r)), b: pack(View::rows(b, o), (r, o)) }
            }
            Held::Bf16 => {
                let rounded: Vec<u16> = values.iter().map(|&x| bf16(x) as u16).collect();
                Self::of_bf16(&rounded, (i, o))
            }
        }
    }

    /// From the bits of bf16.
    ///
    /// # Panics
    /// As [`LoraWeights::new`].
    pub fn of_bf16(values: &[u16], (i, o): (usize, usize)) -> Self {
        let r = rank(values.len(), (i, o));
        let (a, b) = values.split_at(r * i);
        Self {
            a: Right::hold(Short::Bf16(panels_of_rows(a, (i, r))), (i, r)),
            b: Right::hold(Short::Bf16(panels_of_columns(b, (r, o))), (r, o)),
        }
    }

    /// Bytes of its numbers.
    pub fn bytes(&self) -> usize {
        self.a.bytes() + self.b.bytes()
    }
}

fn rank(len: usize, (i, o): (usize, usize)) -> usize {
    let fits = i > 0 && o > 0 && len > 0 && len.is_multiple_of(i + o);
    assert!(fits, "{len} numbers of low-rank matrices of a layer from {i} to {o}");
    len / (i + o)
}

/// Consecutive rows of x that one pair of matrices serves.
#[derive(Clone)]
pub struct LoraRun<'a> {
    /// The pair.
    pub weights: &'a LoraWeights,
    /// The rows.
    pub rows: Range<usize>,
}

/// Where the O numbers of each row of a layer's output are: from `column` on in rows of `row` numbers.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// The first of them.
    pub column: usize,
    /// Numbers from row to row.
    pub row: usize,
}

/// y += α·(x·Aᵀ)·Bᵀ over the rows of each run, `x` [N, I], the numbers of y being at a place of N rows (arXiv
/// 2510.02375 §3: LoRA memory). Weights are read once a run, however many rows it has.
///
/// # Panics
/// When runs overlap, are out of order or reach beyond N, and when the shapes do not fit.
pub fn add_lora(x: &[f32], (y, place): (&mut [f32], Place), alpha: f32, runs: &[LoraRun]) {
    let mut end = 0;
    for LoraRun { weights, rows } in runs {
        let i = weights.a.inner();
        let fits = rows.start >= end && rows.end > rows.start && rows.end * i <= x.len();
        let fits = fits && place.column + weights.b.columns() <= place.row && rows.end * place.row <= y.len();
        assert!(fits, "run {rows:?} after {end}, of {} and {} numbers at {place:?}", x.len(), y.len());
        end = rows.end;
    }
    let y = Shared::new(y);
    let run = |inner: &mut Vec<f32>, LoraRun { weights, rows }: &LoraRun, threads| {
        let (m, i, r) = (rows.len(), weights.a.inner(), weights.a.columns());
        inner.resize(m * r, 0.0);
        let to = Output { to: Shared::new(inner), offset: 0, row: r, from: Addend::Zero };
        let x = View::rows(&x[rows.start * i..rows.end * i], i);
        // SAFETY: the inner layer is [m, r] and this call's own.
        unsafe { multiply_all((m, x), weights.a.all(), to, threads) }
        inner.iter_mut().for_each(|x| *x *= alpha);
        let offset = rows.start * place.row + place.column;
        let to = Output { to: y, offset, row: place.row, from: Addend::Itself };
        // SAFETY: the rows of runs do not overlap and lie in y, which is uniquely borrowed (above).
        unsafe { multiply_all((m, View::rows(inner, r)), weights.b.all(), to, threads) }
    };
    if runs.len() < rayon::current_num_threads() {
        let mut inner = vec![];
        runs.iter().for_each(|one| run(&mut inner, one, Threads::All));
    } else {
        runs.par_iter().for_each_init(Vec::new, |inner, one| run(inner, one, Threads::One));
    }
}
