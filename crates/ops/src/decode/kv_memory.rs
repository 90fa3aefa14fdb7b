use std::ops::Range;

use rayon::prelude::*;

use super::Held;
use crate::buffer::Shared;
use crate::gemm::{
    Addend, Output, Right, Short, Threads, View, bf16, multiply, panels_of_columns, panels_of_rows,
};
use crate::math::{exp_sub_sum, max, scale};
use crate::{KvMemoryShape, Precision};

/// Rows of a task.
const ROWS: usize = 32;

/// R pairs of keys and values, [2, R, G·K], packed once by heads.
pub struct KvWeights {
    heads: Vec<Head>,
    pairs: usize,
}

/// The pairs of one head.
struct Head {
    keys: Right,   // [K, R]
    values: Right, // [R, K]
    /// Of each key, then of each value, when they are integers.
    scales: Option<Vec<f32>>,
}

impl KvWeights {
    /// From numbers [2, R, width], of heads of `head_width`.
    ///
    /// # Panics
    /// When they are not twice as many rows of `width`, or that is not whole heads.
    pub fn new(values: &[f32], (width, head_width): (usize, usize), held: Held) -> Self {
        match held {
            Held::F32 => by_head(values, (width, head_width), |keys, values, r| {
                let pack = |view, shape| Right::pack(Precision::F32, view, shape, Threads::One);
                let keys = pack(View::transposed(keys, head_width), (head_width, r));
                (keys, pack(View::rows(values, head_width), (r, head_width)))
            }),
            Held::Bf16 => {
                let rounded: Vec<u16> = values.iter().map(|&x| bf16(x) as u16).collect();
                Self::of_bf16(&rounded, (width, head_width))
            }
        }
    }

    /// From the bits of bf16 [2, R, width].
    ///
    /// # Panics
    /// As [`KvWeights::new`].
    pub fn of_bf16(values: &[u16], widths: (usize, usize)) -> Self {
        by_head(values, widths, |keys, values, r| hold((keys, values), (widths.1, r), Short::Bf16))
    }

    /// From integers [2, R, width], and a scale for each `row_len` of them.
    ///
    /// # Panics
    /// As [`KvWeights::new`], and when rows of `row_len` are not whole heads and parts of a row of `width`, each with a
    /// scale.
    pub fn of_int8(
        values: &[i8],
        (scales, row_len): (&[f32], usize),
        (width, head_width): (usize, usize),
    ) -> Self {
        let fits = row_len > 0 && row_len.is_multiple_of(head_width) && width.is_multiple_of(row_len);
        assert!(fits && scales.len() * row_len == values.len(), "{} scales of {row_len}", scales.len());
        let mut weights = by_head(values, (width, head_width), |keys, values, r| {
            hold((keys, values), (head_width, r), Short::Int8)
        });
        let (n_rows, per_row) = (2 * weights.pairs, width / row_len);
        for (i, head) in weights.heads.iter_mut().enumerate() {
            let of = |row: usize| scales[row * per_row + i * head_width / row_len];
            head.scales = Some((0..n_rows).map(of).collect());
        }
        weights
    }

    /// Bytes of its numbers.
    pub fn bytes(&self) -> usize {
        let scales = |head: &Head| head.scales.as_ref().map_or(0, |scales| 4 * scales.len());
        self.heads.iter().map(|head| head.keys.bytes() + head.values.bytes() + scales(head)).sum()
    }
}

/// Keys and values of each head, [R, K] each, made operands by `make(keys, values, R)`.
fn by_head<T: Copy + Send + Sync>(
    values: &[T],
    (width, head_width): (usize, usize),
    make: impl Fn(&[T], &[T], usize) -> (Right, Right) + Sync,
) -> KvWeights {
    let fits = width > 0 && head_width > 0 && width.is_multiple_of(head_width);
    let fits = fits && !values.is_empty() && values.len().is_multiple_of(2 * width);
    assert!(fits, "{} numbers of pairs of width {width}, of heads of {head_width}", values.len());
    let pairs = values.len() / (2 * width);
    let head = |head: usize| {
        let of = |rows: &[T]| -> Vec<T> {
            rows.chunks_exact(width)
                .flat_map(|row| &row[head * head_width..][..head_width])
                .copied()
                .collect()
        };
        let (keys, values) = values.split_at(pairs * width);
        let (keys, values) = make(&of(keys), &of(values), pairs);
        Head { keys, values, scales: None }
    };
    KvWeights { heads: (0..width / head_width).into_par_iter().map(head).collect(), pairs }
}

fn hold<T: Copy + Default + Send + Sync>(
    (keys, values): (&[T], &[T]),
    (k, r): (usize, usize),
    short: impl Fn(Vec<T>) -> Short,
) -> (Right, Right) {
    let keys = Right::hold(short(panels_of_rows(keys, (k, r))), (k, r));
    (keys, Right::hold(short(panels_of_columns(values, (r, k))), (r, k)))
}

/// Consecutive rows of q that the same pairs serve.
#[derive(Clone)]
pub struct KvRun<'a> {
    /// The pairs, in parts, which share one softmax.
    pub weights: Vec<&'a KvWeights>,
    /// The rows.
    pub rows: Range<usize>,
}

/// y += softmax(q·keysᵀ·scale)·values per head over the rows of each run, `q` and `y` [N, H·K] (arXiv 2510.02375 §3:
/// KV memory).
///
/// # Panics
/// When runs overlap, are out of order, reach beyond N or have no weights, and when the shapes do not fit.
pub fn add_kv_memory(q: &[f32], y: &mut [f32], shape: KvMemoryShape, runs: &[KvRun]) {
    let KvMemoryShape { heads, kv_heads, head_width, .. } = shape;
    let d = heads * head_width;
    assert_eq!(q.len(), y.len(), "elements of q and y");
    let (mut end, mut tasks) = (0, vec![]);
    for run in runs {
        let rows = &run.rows;
        let fits = rows.start >= end && rows.end > rows.start && rows.end * d <= q.len();
        let of_shape = |weights: &&KvWeights| {
            weights.heads.len() == kv_heads
                && weights.heads.iter().all(|head| head.keys.inner() == head_width)
        };
        let fits = fits && !run.weights.is_empty() && run.weights.iter().all(of_shape);
        assert!(fits, "run {rows:?} after {end}, of {} numbers, for {shape:?}", q.len());
        end = rows.end;
        for first in rows.clone().step_by(ROWS) {
            tasks.extend((0..heads).map(|head| (run, first..rows.end.min(first + ROWS), head)));
        }
    }
    let y = Shared::new(y);
    tasks.into_par_iter().with_min_len(4).for_each_init(Vec::new, |scores, (run, rows, head)| {
        let kv_head = head / (heads / kv_heads);
        let first = rows.start * d + head * head_width;
        let q = View::rows(&q[first..(rows.end - 1) * d + (head + 1) * head_width], d);
        let to = Output { to: y, offset: first, row: d, from: Addend::Itself };
        let parts: Vec<&Head> = run.weights.iter().map(|weights| &weights.heads[kv_head]).collect();
        // SAFETY: the head's columns of these rows are this task's own and lie in y.
        unsafe { attend(&parts, (rows.len(), q), to, (shape.scale, scores)) }
    });
}

/// `m` rows of queries of one head.
///
/// # Safety
/// `to` reaches m rows of K numbers, which nobody else touches.
unsafe fn attend(parts: &[&Head], (m, q): (usize, View), to: Output, (factor, scores): (f32, &mut Vec<f32>)) {
    let n: usize = parts.iter().map(|head| head.keys.columns()).sum();
    scores.resize(m * n, 0.0);
    let shared = Shared::new(scores);
    let mut column = 0;
    for head in parts {
        let to = Output { to: shared, offset: column, row: n, from: Addend::Zero };
        // SAFETY: the scores are [m, n] and this task's own.
        unsafe { multiply((m, q), head.keys.all(), to) }
        column += head.keys.columns();
    }
    for row in scores.chunks_exact_mut(n) {
        scale_parts(parts, row, 0);
        scale(row, factor);
        let sum = exp_sub_sum(row, max(row));
        scale(row, 1.0 / sum);
        scale_parts(parts, row, 1);
    }
    let mut column = 0;
    for head in parts {
        // SAFETY: the caller's promise.
        unsafe { multiply((m, View::rows(&scores[column..], n)), head.values.all(), to) }
        column += head.keys.columns();
    }
}

/// Multiplies a row of numbers, one a pair, by the scales of keys (0) or of values (1).
fn scale_parts(parts: &[&Head], row: &mut [f32], which: usize) {
    let mut rest = row;
    for head in parts {
        let (of_head, others) = rest.split_at_mut(head.keys.columns());
        if let Some(scales) = &head.scales {
            let scales = &scales[which * of_head.len()..];
            of_head.iter_mut().zip(scales).for_each(|(x, scale)| *x *= scale);
        }
        rest = others;
    }
}
