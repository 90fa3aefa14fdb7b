//! Matrix products in f32, and in bf16 with f32 sums, over operands packed once and used many times.
//!
//! The right operand is packed into panels of 32 columns ([`Right`]), where it may be held in fewer bits than it is
//! multiplied in; of the left one, near rows of f32 are read
//! where they are, other rows copied, and columns packed 8 rows at a time. An element's sum always runs over the
//! inner dimension in the same order, whatever the threads.

mod few;
mod kernel;
mod pack;
mod right;
mod short;

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use crate::Precision;
use crate::buffer::{Shared, output_lanes};
use crate::math::dot;
use kernel::Instructions;
pub(crate) use kernel::{COLUMNS, Kernel, ROWS, Tile};
pub(crate) use pack::bf16;
pub(crate) use right::{Part, Right};
pub(crate) use short::{Short, panels_of_columns, panels_of_rows};

/// Inner lanes of a pass: a panel's slice of 24 KiB stays in the first-level cache over all rows.
const INNER: usize = 192;

/// Rows of f32 that are fewer elements apart are read where they are, as are those an odd number of cache lines apart;
/// others would compete for the same few places of the first-level cache.
const NEAR: usize = 1024;

/// Rows of a task.
const TASK_ROWS: usize = 128;

/// Up to so many rows are one task's, so that the right operand is read from memory once.
const TOGETHER: usize = 64;

/// Columns of one row that are best multiplied together.
pub(crate) const TOGETHER_COLUMNS: usize = few::PANELS * COLUMNS;

/// Products with fewer rows than this do not repay packing the right operand.
const FEW_ROWS: usize = 5;

/// A read-only matrix of f32: element (i, j) is `data[i·stride + j]`, or `data[j·stride + i]` when transposed.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) transposed: bool,
}

impl<'a> View<'a> {
    /// A row-major matrix with `stride` elements between rows.
    pub(crate) fn rows(data: &'a [f32], stride: usize) -> Self {
        Self { data, stride, transposed: false }
    }

    /// The transpose of a row-major matrix with `stride` elements between its rows.
    pub(crate) fn transposed(data: &'a [f32], stride: usize) -> Self {
        Self { data, stride, transposed: true }
    }

    /// Fails when an element of its `m` rows and `n` columns lies outside the data.
    fn check(&self, m: usize, n: usize) {
        let (outer, inner) = if self.transposed { (n, m) } else { (m, n) };
        let end = if outer == 0 || inner == 0 { 0 } else { (outer - 1) * self.stride + inner };
        assert!(end <= self.data.len(), "matrix view of {m} x {n} out of bounds");
    }

    /// The view from row `row` on.
    pub(crate) fn skip_rows(self, row: usize) -> Self {
        let skipped = if self.transposed { row } else { row * self.stride };
        Self { data: &self.data[skipped.min(self.data.len())..], ..self }
    }
}

/// The fastest kernel of this processor.
pub(crate) fn best_kernel(precision: Precision) -> Kernel {
    Instructions::best(precision)
}

/// What a product does with the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Write {
    /// dst = a·b
    Over,
    /// dst += a·b
    Add,
}

/// Whether a product uses the thread pool or only the calling thread (inside a parallel loop).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    One,
    All,
}

/// The sizes of a product: a [m, k] times b [k, n].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
}

/// Where a product goes: element (i, j) at `to + i·row + j`.
#[derive(Clone, Copy)]
pub(crate) struct Output {
    pub(crate) to: Shared,
    pub(crate) offset: usize,
    pub(crate) row: usize,
    pub(crate) from: Addend,
}

/// What is added to a product.
#[derive(Clone, Copy)]
pub(crate) enum Addend {
    /// Nothing.
    Zero,
    /// What the destination holds.
    Itself,
    /// Another matrix: element (i, j) at `offset + i·row + j`.
    Other { values: Shared, offset: usize, row: usize },
}

impl From<Write> for Addend {
    fn from(into: Write) -> Self {
        match into {
            Write::Over => Self::Zero,
            Write::Add => Self::Itself,
        }
    }
}

impl Output {
    /// What goes to the rows and columns from these on.
    pub(crate) fn skip(self, rows: usize, columns: usize) -> Self {
        let from = match self.from {
            Addend::Other { values, offset, row } => {
                Addend::Other { values, offset: offset + rows * row + columns, row }
            }
            from => from,
        };
        Self { offset: self.offset + rows * self.row + columns, from, ..self }
    }

    /// Writes what is added to a product of `m` rows and `n` columns that is 0.
    ///
    /// # Safety
    /// All elements are valid, and no other task touches them.
    pub(crate) unsafe fn write_addend(self, (m, n): (usize, usize)) {
        for row in 0..m {
            // SAFETY: the caller's promise.
            unsafe {
                let (to, from, _) = self.rows(row);
                match from.is_null() {
                    true => to.write_bytes(0, n),
                    false => std::ptr::copy(from, to, n),
                }
            }
        }
    }

    /// Where the rows from `row` on go, and what is added to them with the distance between its rows; null is nothing.
    ///
    /// # Safety
    /// The row is one of the destination's and of what is added.
    unsafe fn rows(&self, row: usize) -> (*mut f32, *const f32, usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let c = self.to.at(self.offset + row * self.row);
            match self.from {
                Addend::Zero => (c, std::ptr::null(), 0),
                Addend::Itself => (c, c.cast_const(), self.row),
                Addend::Other { values, offset, row: distance } => {
                    (c, values.at(offset + row * distance).cast_const(), distance)
                }
            }
        }
    }
}

/// Buffers of the product that runs on a thread.
#[derive(Default)]
struct Buffers {
    /// A packed left operand.
    left: Vec<u32>,
    /// Lanes of a right operand that is held short.
    wide: Vec<u32>,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = const { RefCell::new(Buffers { left: vec![], wide: vec![] }) };
}

/// dst `[m, n]` = or += a `[m, k]` · b `[k, n]`, row-major with `dst_row` elements between rows.
pub(crate) fn gemm(
    precision: Precision,
    size: Size,
    (dst, dst_row): (&mut [f32], usize),
    (a, b): (View, View),
    (into, threads): (Write, Threads),
) {
    let Size { m, n, k } = size;
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * dst_row + n <= dst.len(), "matrix product writes out of bounds");
    a.check(m, k);
    b.check(k, n);
    if m < FEW_ROWS && !a.transposed {
        return few_rows(size, (dst, dst_row), (a, b), (into, threads));
    }
    let right = Right::pack(precision, b, (k, n), threads);
    let output = Output { to: Shared::new(dst), offset: 0, row: dst_row, from: into.into() };
    // SAFETY: the destination is checked above and uniquely borrowed.
    unsafe { multiply_all((m, a), right.all(), output, threads) }
}

/// The product of `m` rows with a packed operand, split over the threads.
///
/// # Safety
/// Every element that `output` reaches is valid and touched by no other task.
pub(crate) unsafe fn multiply_all((m, a): (usize, View), right: Part, output: Output, threads: Threads) {
    a.check(m, right.k);
    if m == 0 || right.columns.is_empty() {
        return;
    }
    if threads == Threads::One {
        // SAFETY: the caller's promise.
        return unsafe { multiply((m, a), right, output) };
    }
    let n_columns = right.columns.len();
    let [rows, columns] = task_size(m, n_columns);
    let (n_row_tasks, n_column_tasks) = (m.div_ceil(rows), n_columns.div_ceil(columns));
    (0..n_row_tasks * n_column_tasks).into_par_iter().for_each(|task| {
        let (row, column) = (task / n_column_tasks * rows, task % n_column_tasks * columns);
        let part = right.clone().columns(column..n_columns.min(column + columns));
        // SAFETY: tasks write disjoint rows and columns; the rest is the caller's promise.
        unsafe { multiply((rows.min(m - row), a.skip_rows(row)), part, output.skip(row, column)) }
    });
}

/// Rows and columns of a task, of `m` rows and `n_columns`.
pub(crate) fn task_size(m: usize, n_columns: usize) -> [usize; 2] {
    let n_threads = rayon::current_num_threads();
    let rows = match m <= TOGETHER {
        true => m,
        false => TASK_ROWS.min(m.div_ceil(n_threads).next_multiple_of(ROWS)),
    };
    // Few rows: the columns are split too.
    let n_panels = n_columns.div_ceil(COLUMNS);
    let n_column_tasks = (4 * n_threads).div_ceil(m.div_ceil(rows)).min(n_panels);
    [rows, n_panels.div_ceil(n_column_tasks) * COLUMNS]
}

/// The product of `m` rows with a part of a packed operand, on this thread.
///
/// # Safety
/// As [`multiply_all`].
pub(crate) unsafe fn multiply((m, a): (usize, View), part: Part, output: Output) {
    a.check(m, part.k);
    let precision = part.right.precision();
    if m <= few::FEW && precision == Precision::F32 && !a.transposed {
        // SAFETY: the caller's promise.
        return BUFFERS.with_borrow_mut(|buffers| unsafe {
            few::multiply(few::best(), (m, a), &part, output, buffers)
        });
    }
    let kernel = Instructions::best(precision);
    // SAFETY: the caller's promise.
    BUFFERS.with_borrow_mut(|buffers| unsafe { multiply_with(kernel, (m, a), &part, output, buffers) });
}

/// [`multiply`] with one of the kernels, in these buffers.
///
/// # Safety
/// As [`multiply_all`], and the processor has the kernel's instructions.
unsafe fn multiply_with(
    kernel: Kernel,
    (m, a): (usize, View),
    part: &Part,
    output: Output,
    Buffers { left: lanes, wide }: &mut Buffers,
) {
    let Part { right, first_k, k, columns } = part;
    let precision = right.precision();
    let n_lanes = precision.lanes(*k);
    let first_lane = precision.lanes(*first_k);
    let mut inner = 0;
    loop {
        let n_inner = INNER.min(n_lanes - inner);
        let left = left_lanes((m, a), (precision, inner..inner + n_inner, *k), lanes);
        for column in columns.clone().step_by(COLUMNS) {
            let panel = column / COLUMNS * right.panel_len() + (first_lane + inner) * COLUMNS;
            let b = right.lanes(panel, n_inner * COLUMNS, wide);
            let output = output.skip(0, column - columns.start);
            let from = if inner > 0 { Addend::Itself } else { output.from };
            let width = COLUMNS.min(columns.end - column);
            for g in 0..m.div_ceil(ROWS) {
                let n_rows = ROWS.min(m - g * ROWS);
                // SAFETY: the operands are in bounds (`check`, and the panels cover the part); the destination
                // and what is added to it are the caller's promise.
                unsafe {
                    let (c, from, from_row) = Output { from, ..output }.rows(g * ROWS);
                    let tile = Tile {
                        k: n_inner,
                        a: left.first.add(g * left.group),
                        a_row: left.row,
                        a_lane: left.lane,
                        b,
                        c,
                        c_row: output.row,
                        from,
                        from_row,
                    };
                    match width {
                        COLUMNS => kernel(&tile, n_rows),
                        _ => narrow(kernel, &tile, n_rows, width),
                    }
                }
            }
        }
        inner += n_inner;
        if inner >= n_lanes {
            break;
        }
    }
}

/// Whether rows of f32 so many elements apart may be read where they are.
fn is_near(stride: usize) -> bool {
    stride < NEAR || !stride.is_multiple_of(32) && stride.is_multiple_of(16)
}

/// Where the lanes of a left operand are: lane l of row i of group g at `first + g·group + i·row + l·lane`.
struct Left {
    first: *const u32,
    group: usize,
    row: usize,
    lane: usize,
}

/// The lanes `inner` of `m` rows with `k` inner positions, in `lanes` unless they can be read where they are.
fn left_lanes(
    (m, a): (usize, View),
    (precision, inner, k): (Precision, Range<usize>, usize),
    lanes: &mut Vec<u32>,
) -> Left {
    let n = inner.len();
    let positions = precision.positions() * inner.start..k.min(precision.positions() * inner.end);
    if a.transposed {
        let data = &a.data[(positions.start * a.stride).min(a.data.len())..];
        let group = pack::groups(precision, View { data, ..a }, (m, positions.len()), lanes);
        return Left { first: lanes.as_ptr(), group, row: 1, lane: ROWS };
    }
    match precision {
        Precision::F32 if is_near(a.stride) => {
            let first = a.data[inner.start.min(a.data.len())..].as_ptr().cast();
            Left { first, group: ROWS * a.stride, row: a.stride, lane: 1 }
        }
        _ => {
            output_lanes(lanes, m * n);
            for (i, to) in lanes.chunks_exact_mut(n.max(1)).enumerate() {
                pack::convert_row(precision, &a.data[i * a.stride..][positions.clone()], to);
            }
            Left { first: lanes.as_ptr(), group: ROWS * n, row: n, lane: 1 }
        }
    }
}

/// A tile of fewer than 32 columns: computed beside the destination, then copied.
///
/// # Safety
/// As the kernel's, for `width` columns.
unsafe fn narrow(kernel: Kernel, tile: &Tile, n_rows: usize, width: usize) {
    let mut sums = [0f32; ROWS * COLUMNS];
    let beside = Tile { c: sums.as_mut_ptr(), c_row: COLUMNS, from: std::ptr::null(), ..*tile };
    // SAFETY: the buffer holds a whole tile; the rest is the caller's promise.
    unsafe {
        kernel(&beside, n_rows);
        for i in 0..n_rows {
            for (j, &sum) in sums[i * COLUMNS..][..width].iter().enumerate() {
                let from = match tile.from.is_null() {
                    true => 0.0,
                    false => *tile.from.add(i * tile.from_row + j),
                };
                *tile.c.add(i * tile.c_row + j) = from + sum;
            }
        }
    }
}

/// A product of a few rows, as when decoding: the right operand is read once, where it is, in f32.
fn few_rows(
    Size { m, n, k }: Size,
    (dst, dst_row): (&mut [f32], usize),
    (a, b): (View, View),
    (into, threads): (Write, Threads),
) {
    let dst = Shared::new(dst);
    let columns = |columns: Range<usize>| {
        for i in 0..m {
            let a = &a.data[i * a.stride..][..k];
            // SAFETY: tasks have columns of their own; bounds are checked by the caller.
            let c = unsafe { dst.slice(i * dst_row + columns.start, columns.len()) };
            if into == Write::Over {
                c.fill(0.0);
            }
            if b.transposed {
                for (c, j) in c.iter_mut().zip(columns.clone()) {
                    *c += dot(a, &b.data[j * b.stride..][..k]);
                }
            } else {
                for (kk, &a) in a.iter().enumerate() {
                    let b = &b.data[kk * b.stride..][columns.clone()];
                    c.iter_mut().zip(b).for_each(|(c, b)| *c += a * b);
                }
            }
        }
    };
    match threads {
        Threads::One => columns(0..n),
        Threads::All => {
            let width = n.div_ceil(4 * rayon::current_num_threads()).next_multiple_of(COLUMNS);
            (0..n.div_ceil(width))
                .into_par_iter()
                .for_each(|task| columns(task * width..n.min((task + 1) * width)));
        }
    }
}

#[cfg(test)]
mod tests;
