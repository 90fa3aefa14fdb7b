//! Right operands held in fewer bits than they are multiplied in: read from memory, which limits the products of a
//! few rows, they are a half or a quarter as large. Each is widened exactly, a slice of a panel at a time, in a
//! buffer that stays in the first-level cache.

use rayon::prelude::*;

use super::COLUMNS;

/// Rows that are transposed at a time.
const BLOCK: usize = 32;

/// Numbers in the order of the lanes of a [`super::Right`] in f32.
pub(crate) enum Short {
    /// The upper halves of f32.
    Bf16(Vec<u16>),
    /// Integers, whose scales are the user's business.
    Int8(Vec<i8>),
}

impl Short {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Bf16(values) => values.len(),
            Self::Int8(values) => values.len(),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Bf16(values) => size_of_val(&values[..]),
            Self::Int8(values) => values.len(),
        }
    }

    /// The numbers from `first` on, as many as `to` has room for, as f32.
    pub(super) fn widen(&self, first: usize, to: &mut [u32]) {
        match self {
            Self::Bf16(values) => {
                let from = &values[first..first + to.len()];
                to.iter_mut().zip(from).for_each(|(to, &from)| *to = u32::from(from) << 16);
            }
            Self::Int8(values) => {
                let from = &values[first..first + to.len()];
                to.iter_mut().zip(from).for_each(|(to, &from)| *to = f32::from(from).to_bits());
            }
        }
    }
}

/// The panels of a right operand [k, n], element (k, j) at `data[j·k_len + k]`: the transpose of n rows. Columns
/// beyond n are 0.
pub(crate) fn panels_of_rows<T: Copy + Default + Send + Sync>(data: &[T], (k, n): (usize, usize)) -> Vec<T> {
    assert_eq!(data.len(), k * n, "numbers of {n} rows of {k}");
    let mut panels = vec![T::default(); n.div_ceil(COLUMNS) * k * COLUMNS];
    panels.par_chunks_exact_mut((k * COLUMNS).max(1)).enumerate().for_each(|(p, panel)| {
        let rows = &data[p * COLUMNS * k..n.min((p + 1) * COLUMNS) * k];
        for first in (0..k).step_by(BLOCK) {
            let len = BLOCK.min(k - first);
            for (j, row) in rows.chunks_exact(k).enumerate() {
                let to = panel[first * COLUMNS + j..].iter_mut().step_by(COLUMNS);
                to.zip(&row[first..first + len]).for_each(|(to, &from)| *to = from);
            }
        }
    });
    panels
}

/// The panels of a right operand [k, n], element (k, j) at `data[k·n + j]`. Columns beyond n are 0.
pub(crate) fn panels_of_columns<T: Copy + Default + Send + Sync>(
    data: &[T],
    (k, n): (usize, usize),
) -> Vec<T> {
    assert_eq!(data.len(), k * n, "numbers of {k} rows of {n}");
    let mut panels = vec![T::default(); n.div_ceil(COLUMNS) * k * COLUMNS];
    panels.par_chunks_exact_mut((k * COLUMNS).max(1)).enumerate().for_each(|(p, panel)| {
        let (first, width) = (p * COLUMNS, COLUMNS.min(n - p * COLUMNS));
        for (to, from) in panel.chunks_exact_mut(COLUMNS).zip(data.chunks_exact(n)) {
            to[..width].copy_from_slice(&from[first..first + width]);
        }
    });
    panels
}
