//! Packing of operands into lanes (see `kernel`).

use super::View;
use super::kernel::{COLUMNS, ROWS};
use crate::Precision;
use crate::buffer::output_lanes;

/// Rows that are transposed at a time.
const BLOCK: usize = 16;

/// Unused lanes between groups: a cache line.
const PADDING: usize = 16;

/// The bf16 nearest to `x`, ties to even, in the low half; NaN stays NaN.
#[inline(always)]
pub(crate) fn bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if x.is_nan() { (bits >> 16) | 0x40 } else { rounded }
}

#[inline(always)]
fn lane(first: f32, second: f32) -> u32 {
    bf16(first) | bf16(second) << 16
}

impl Precision {
    /// Inner positions in a lane.
    pub(super) fn positions(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 2,
        }
    }

    /// Lanes that hold `k` inner positions.
    pub(super) fn lanes(self, k: usize) -> usize {
        k.div_ceil(self.positions())
    }
}

/// `values` along the inner dimension as lanes, a missing last position being 0.
pub(super) fn convert_row(precision: Precision, values: &[f32], lanes: &mut [u32]) {
    match precision {
        Precision::F32 => lanes.iter_mut().zip(values).for_each(|(lane, x)| *lane = x.to_bits()),
        Precision::Bf16 => {
            let (pairs, rest) = values.as_chunks::<2>();
            for (to, &[a, b]) in lanes.iter_mut().zip(pairs) {
                *to = lane(a, b);
            }
            if let ([last], Some(to)) = (rest, lanes.last_mut()) {
                *to = lane(*last, 0.0);
            }
        }
    }
}

/// Packs the inner positions of one lane for as many outer neighbours as `to` has room for, the first being `from`.
#[inline(always)]
fn interleave(
    precision: Precision,
    view: &View,
    (k, lane_index): (usize, usize),
    from: usize,
    to: &mut [u32],
) {
    let width = to.len();
    let row = |k: usize| &view.data[k * view.stride + from..][..width];
    match precision {
        Precision::F32 => {
            for (to, x) in to.iter_mut().zip(row(lane_index)) {
                *to = x.to_bits();
            }
        }
        Precision::Bf16 => {
            let first = row(2 * lane_index);
            if 2 * lane_index + 1 < k {
                let second = row(2 * lane_index + 1);
                for i in 0..first.len() {
                    to[i] = lane(first[i], second[i]);
                }
            } else {
                for (to, &x) in to.iter_mut().zip(first) {
                    *to = lane(x, 0.0);
                }
            }
        }
    }
}

/// Packs the columns from `column` of a right operand [k, n] into one panel: lane (l, j) at `l·32 + j`, columns
/// beyond n being 0.
pub(super) fn panel(
    precision: Precision,
    view: View,
    (k, n): (usize, usize),
    column: usize,
    panel: &mut [u32],
) {
    let width = COLUMNS.min(n - column);
    let n_lanes = precision.lanes(k);
    if !view.transposed {
        for (l, to) in panel.chunks_exact_mut(COLUMNS).enumerate() {
            interleave(precision, &view, (k, l), column, &mut to[..width]);
            to[width..].fill(0);
        }
        return;
    }
    if width < COLUMNS {
        panel.fill(0);
    }
    let mut block = [[0u32; BLOCK]; BLOCK];
    for first in (0..n_lanes).step_by(BLOCK) {
        let lanes = BLOCK.min(n_lanes - first);
        let positions = precision.positions() * first..k.min(precision.positions() * (first + lanes));
        for j0 in (0..width).step_by(BLOCK) {
            let columns = BLOCK.min(width - j0);
            for (j, row) in block[..columns].iter_mut().enumerate() {
                let values = &view.data[(column + j0 + j) * view.stride..][positions.clone()];
                convert_row(precision, values, &mut row[..lanes]);
            }
            if lanes == BLOCK && columns == BLOCK {
                transpose(&block, &mut panel[first * COLUMNS + j0..]);
            } else {
                for l in 0..lanes {
                    for (j, row) in block[..columns].iter().enumerate() {
                        panel[(first + l) * COLUMNS + j0 + j] = row[l];
                    }
                }
            }
        }
    }
}

/// Writes `block[j][l]` to `to[l·32 + j]`.
fn transpose(block: &[[u32; BLOCK]; BLOCK], to: &mut [u32]) {
    assert!(to.len() >= (BLOCK - 1) * COLUMNS + BLOCK);
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has the instructions, and the last write ends inside `to`.
        unsafe { transpose_avx512(block, to.as_mut_ptr()) };
        return;
    }
    for l in 0..BLOCK {
        for (j, row) in block.iter().enumerate() {
            to[l * COLUMNS + j] = row[l];
        }
    }
}

/// Four rounds of a butterfly: 32-bit, 64-bit, then 128-bit quarters twice.
///
/// # Safety
/// The processor has AVX-512, and the 16 rows of 16 lanes at `to`, 32 apart, are valid.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn transpose_avx512(block: &[[u32; BLOCK]; BLOCK], to: *mut u32) {
    use std::arch::x86_64::*;
    // SAFETY: each row of the block is 16 lanes; the writes are the caller's promise.
    unsafe {
        let mut a = [_mm512_setzero_si512(); BLOCK];
        for (register, row) in a.iter_mut().zip(block) {
            *register = _mm512_loadu_si512(row.as_ptr().cast());
        }
        let mut b = a;
        for i in 0..8 {
            b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
            b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
        }
        for i in 0..4 {
            a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
            a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
            a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
            a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
        }
        // a[4g + c] holds, in its quarter q, column 4q + c of rows 4g .. 4g + 4.
        for c in 0..4 {
            let low01 = _mm512_shuffle_i32x4::<0b10_00_10_00>(a[c], a[4 + c]);
            let high01 = _mm512_shuffle_i32x4::<0b11_01_11_01>(a[c], a[4 + c]);
            let low23 = _mm512_shuffle_i32x4::<0b10_00_10_00>(a[8 + c], a[12 + c]);
            let high23 = _mm512_shuffle_i32x4::<0b11_01_11_01>(a[8 + c], a[12 + c]);
            let columns = [
                _mm512_shuffle_i32x4::<0b10_00_10_00>(low01, low23),
                _mm512_shuffle_i32x4::<0b10_00_10_00>(high01, high23),
                _mm512_shuffle_i32x4::<0b11_01_11_01>(low01, low23),
                _mm512_shuffle_i32x4::<0b11_01_11_01>(high01, high23),
            ];
            for (q, column) in columns.into_iter().enumerate() {
                _mm512_storeu_si512(to.add((4 * q + c) * COLUMNS).cast(), column);
            }
        }
    }
}

/// Packs the transposed left operand [m, k], element (i, k) at `data[k·stride + i]`, into groups of 8 rows:
/// lane l of row i of a group at `l·8 + i`. Returns the lanes from group to group.
pub(super) fn groups(
    precision: Precision,
    view: View,
    (m, k): (usize, usize),
    lanes: &mut Vec<u32>,
) -> usize {
    let n_lanes = precision.lanes(k);
    // Not a power of two: lane l of all groups would fall into one set of the first-level cache.
    let group = ROWS * n_lanes + PADDING;
    output_lanes(lanes, m.div_ceil(ROWS) * group);
    // Along the rows of the source, which are far apart.
    let whole = m - m % ROWS;
    for l in 0..n_lanes {
        let row = |k: usize| &view.data[k * view.stride..][..whole];
        let first = l * precision.positions();
        let (rows, _) = row(first).as_chunks::<ROWS>();
        let to = lanes[l * ROWS..].chunks_mut(group);
        if precision == Precision::F32 {
            for (to, row) in to.zip(rows) {
                to[..ROWS].copy_from_slice(&row.map(f32::to_bits));
            }
        } else if first + 1 < k {
            let (next_rows, _) = row(first + 1).as_chunks::<ROWS>();
            for ((to, row), next) in to.zip(rows).zip(next_rows) {
                to[..ROWS].copy_from_slice(&std::array::from_fn::<u32, ROWS, _>(|i| lane(row[i], next[i])));
            }
        } else {
            for (to, row) in to.zip(rows) {
                to[..ROWS].copy_from_slice(&row.map(|x| lane(x, 0.0)));
            }
        }
        if whole < m {
            interleave(
                precision,
                &view,
                (k, l),
                whole,
                &mut lanes[whole / ROWS * group + l * ROWS..][..m - whole],
            );
        }
    }
    group
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_to_nearest_even_as_the_half_crate_does() {
        for bits in (0..=u32::MAX).step_by(65_521 / 3) {
            let x = f32::from_bits(bits);
            let expected = half::bf16::from_f32(x);
            let found = half::bf16::from_bits(bf16(x) as u16);
            assert!(
                found == expected || (found.is_nan() && expected.is_nan()),
                "{x}: {found} against {expected}"
            );
        }
    }
}
