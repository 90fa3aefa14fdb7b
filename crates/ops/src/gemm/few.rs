//! Products of few rows of f32, which are limited by how fast the right operand comes from memory: it is read once from
//! its first byte to its last, as it is held, and widened in registers. One row has sums of four panels at a time, since
//! a sum alone would wait for itself.
//!
//! An element is summed in the order that products of many rows have, so that its bits do not depend on how many rows
//! there are.

use std::sync::OnceLock;

use super::kernel::{COLUMNS, Instructions, N, ROWS, Register};
use super::{Addend, Buffers, INNER, Output, Part, View, is_near};
use crate::Precision;
use crate::buffer::output_lanes;

/// Rows that are few.
pub(super) const FEW: usize = 32;

/// Panels that are multiplied together.
pub(super) const PANELS: usize = 4;

/// Lanes between rows that are copied: an odd number of cache lines.
const PADDING: usize = 16;

/// Where numbers of a right operand are, by how they are held.
#[derive(Clone, Copy)]
pub(super) enum Numbers {
    F32(*const u32),
    Bf16(*const u16),
    Int8(*const i8),
}

/// A slice of some panels: `c [rows, 32 a panel]` = from + a `[rows, k]` · b `[k, 32 a panel]`.
pub(super) struct Slice {
    k: usize,
    a: *const u32,
    a_row: usize,
    b: Numbers,
    /// Numbers between panels.
    panel: usize,
    c: *mut f32,
    c_row: usize,
    from: *const f32,
    from_row: usize,
}

/// Multiplies up to 8 rows with one panel, or up to two with four.
///
/// # Safety
/// All addresses of the slice are valid, and the processor has the instructions of the kernel.
pub(super) type Kernel = unsafe fn(&Slice, (usize, usize));

pub(super) fn kernel(instructions: Instructions) -> Kernel {
    match instructions {
        Instructions::Portable => by_rows::<[f32; 8]>,
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 => x86::avx2,
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512 => x86::avx512,
    }
}

/// The fastest kernel of this processor.
pub(super) fn best() -> Kernel {
    static BEST: OnceLock<Kernel> = OnceLock::new();
    let best = || *Instructions::available(Precision::F32).last().unwrap_or(&Instructions::Portable);
    *BEST.get_or_init(|| kernel(best()))
}

/// The product of up to 32 rows of f32 with a part of a packed operand.
///
/// # Safety
/// As [`super::multiply_all`], and the processor has the kernel's instructions.
pub(super) unsafe fn multiply(
    kernel: Kernel,
    (m, a): (usize, View),
    part: &Part,
    output: Output,
    buffers: &mut Buffers,
) {
    let Part { right, first_k, k, columns } = part;
    let (mut first, mut a_row) = (a.data.as_ptr().cast::<u32>(), a.stride);
    if m > 1 && !is_near(a.stride) {
        a_row = k.next_multiple_of(2 * PADDING) + PADDING;
        output_lanes(&mut buffers.left, m * a_row);
        for (i, to) in buffers.left.chunks_exact_mut(a_row).enumerate() {
            to.iter_mut().zip(&a.data[i * a.stride..][..*k]).for_each(|(to, from)| *to = from.to_bits());
        }
        first = buffers.left.as_ptr();
    }
    let mut column = columns.start;
    while column < columns.end {
        let n_panels = if m <= 2 && column + PANELS * COLUMNS <= columns.end { PANELS } else { 1 };
        let width = (n_panels * COLUMNS).min(columns.end - column);
        let output = output.skip(0, column - columns.start);
        let mut inner = 0;
        loop {
            let n_inner = INNER.min(k - inner);
            let lane = column / COLUMNS * right.panel_len() + (first_k + inner) * COLUMNS;
            let from = if inner > 0 { Addend::Itself } else { output.from };
            for row in (0..m).step_by(ROWS) {
                // SAFETY: rows and panels are in bounds (the view is checked, and the panels cover the part); the rest is
                // the caller's promise.
                unsafe {
                    let (c, from, from_row) = Output { from, ..output }.rows(row);
                    let (a, b, panel) = (first.add(row * a_row + inner), right.held(lane), right.panel_len());
                    let slice =
                        Slice { k: n_inner, a, a_row, b, panel, c, c_row: output.row, from, from_row };
                    let n_rows = ROWS.min(m - row);
                    match width {
                        width if width < COLUMNS => narrow(kernel, &slice, n_rows, width),
                        _ => kernel(&slice, (n_rows, n_panels)),
                    }
                }
            }
            inner += n_inner;
            if inner >= *k {
                break;
            }
        }
        column += width;
    }
}

/// A panel of fewer than 32 columns: computed beside the destination, then copied.
///
/// # Safety
/// As the kernel's, for `width` columns.
unsafe fn narrow(kernel: Kernel, slice: &Slice, n_rows: usize, width: usize) {
    let mut sums = [0f32; ROWS * COLUMNS];
    let beside = Slice { c: sums.as_mut_ptr(), c_row: COLUMNS, from: std::ptr::null(), ..*slice };
    // SAFETY: the buffer holds all rows; the rest is the caller's promise.
    unsafe {
        kernel(&beside, (n_rows, 1));
        for (i, sums) in sums.chunks_exact(COLUMNS).take(n_rows).enumerate() {
            for (j, &sum) in sums[..width].iter().enumerate() {
                let from = match slice.from.is_null() {
                    true => 0.0,
                    false => *slice.from.add(i * slice.from_row + j),
                };
                *slice.c.add(i * slice.c_row + j) = from + sum;
            }
        }
    }
}

/// # Safety
/// As [`Kernel`].
#[inline(always)]
unsafe fn by_rows<V: Register>(slice: &Slice, (n_rows, n_panels): (usize, usize)) {
    // SAFETY: the caller's promise.
    unsafe {
        match slice.b {
            Numbers::F32(b) => by_size::<V>(slice, (n_rows, n_panels), |at| V::load(b.add(at))),
            Numbers::Bf16(b) => by_size::<V>(slice, (n_rows, n_panels), |at| V::load_bf16(b.add(at))),
            Numbers::Int8(b) => by_size::<V>(slice, (n_rows, n_panels), |at| V::load_int8(b.add(at))),
        }
    }
}

/// # Safety
/// As [`Kernel`]; `load` gives the numbers of the slice from a place on.
#[inline(always)]
unsafe fn by_size<V: Register>(
    slice: &Slice,
    (n_rows, n_panels): (usize, usize),
    load: impl Fn(usize) -> V::Lanes + Copy,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match (n_rows, n_panels) {
            (1, PANELS) => sums::<V, 1, PANELS>(slice, 0, load),
            (2, PANELS) => sums::<V, 2, PANELS>(slice, 0, load),
            // As many sums as the processor has registers for.
            _ if V::WIDTH < 16 => {
                for row in (0..n_rows).step_by(4) {
                    match n_rows - row {
                        1 => sums::<V, 1, 1>(slice, row, load),
                        2 => sums::<V, 2, 1>(slice, row, load),
                        3 => sums::<V, 3, 1>(slice, row, load),
                        _ => sums::<V, 4, 1>(slice, row, load),
                    }
                }
            }
            (1, _) => sums::<V, 1, 1>(slice, 0, load),
            (2, _) => sums::<V, 2, 1>(slice, 0, load),
            (3, _) => sums::<V, 3, 1>(slice, 0, load),
            (4, _) => sums::<V, 4, 1>(slice, 0, load),
            (5, _) => sums::<V, 5, 1>(slice, 0, load),
            (6, _) => sums::<V, 6, 1>(slice, 0, load),
            (7, _) => sums::<V, 7, 1>(slice, 0, load),
            _ => sums::<V, 8, 1>(slice, 0, load),
        }
    }
}

/// `R` rows from `row` on, of `P` panels.
///
/// # Safety
/// As [`by_size`].
#[inline(always)]
unsafe fn sums<V: Register, const R: usize, const P: usize>(
    slice: &Slice,
    row: usize,
    load: impl Fn(usize) -> V::Lanes + Copy,
) {
    for column in (0..COLUMNS).step_by(N * V::WIDTH) {
        // SAFETY: the caller's promise; rows and columns stay inside the slice.
        unsafe {
            let mut sums = [[[V::zero(); N]; P]; R];
            let a = slice.a.add(row * slice.a_row);
            for k in 0..slice.k {
                for p in 0..P {
                    let at = p * slice.panel + k * COLUMNS + column;
                    let right: [V::Lanes; N] = [load(at), load(at + V::WIDTH)];
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let left = V::splat(a.add(i * slice.a_row + k));
                        for (sum, right) in sums[p].iter_mut().zip(right) {
                            *sum = sum.add_product(left, right);
                        }
                    }
                }
            }
            for (i, sums) in sums.into_iter().enumerate() {
                for (p, sums) in sums.into_iter().enumerate() {
                    for (j, sum) in sums.into_iter().enumerate() {
                        let column = p * COLUMNS + column + j * V::WIDTH;
                        let sum = match slice.from.is_null() {
                            true => sum,
                            false => sum.add(slice.from.add((row + i) * slice.from_row + column)),
                        };
                        sum.store(slice.c.add((row + i) * slice.c_row + column));
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{__m256, __m512};

    use super::{Slice, by_rows};

    /// # Safety
    /// As [`super::Kernel`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2(slice: &Slice, size: (usize, usize)) {
        // SAFETY: the caller's promise.
        unsafe { by_rows::<__m256>(slice, size) }
    }

    /// # Safety
    /// As [`super::Kernel`].
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512(slice: &Slice, size: (usize, usize)) {
        // SAFETY: the caller's promise.
        unsafe { by_rows::<__m512>(slice, size) }
    }
}
