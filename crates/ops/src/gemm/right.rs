//! The right operand of a product: packed once, used many times, and held in as many bits as its use wants.

use std::ops::Range;

use rayon::prelude::*;

use super::few::Numbers;
use super::kernel::COLUMNS;
use super::short::Short;
use super::{Threads, View, pack};
use crate::Precision;
use crate::buffer::output_lanes;

/// A right operand [k, n] packed into panels.
pub(crate) struct Right {
    lanes: Vec<u32>,
    /// Instead of the lanes, numbers that are widened to f32 when they are used.
    short: Option<Short>,
    k: usize,
    n: usize,
    precision: Precision,
}

impl Right {
    pub(crate) fn pack(precision: Precision, view: View, (k, n): (usize, usize), threads: Threads) -> Self {
        let mut right = Self::empty(precision);
        right.repack(view, (k, n), threads);
        right
    }

    /// An operand whose numbers are held short, and each widened to f32 for its product.
    pub(crate) fn hold(short: Short, (k, n): (usize, usize)) -> Self {
        assert_eq!(short.len(), n.div_ceil(COLUMNS) * k * COLUMNS, "numbers of a held operand {k} x {n}");
        Self { short: Some(short), k, n, ..Self::empty(Precision::F32) }
    }

    /// An operand to be packed later, in buffers that are kept.
    pub(crate) fn empty(precision: Precision) -> Self {
        Self { lanes: vec![], short: None, k: 0, n: 0, precision }
    }

    /// Bytes of its numbers.
    pub(crate) fn bytes(&self) -> usize {
        size_of_val(&self.lanes[..]) + self.short.as_ref().map_or(0, Short::bytes)
    }

    /// The numbers from lane `first` on, as they are held.
    pub(super) fn held(&self, first: usize) -> Numbers {
        match &self.short {
            None => Numbers::F32(self.lanes[first..].as_ptr()),
            Some(Short::Bf16(values)) => Numbers::Bf16(values[first..].as_ptr()),
            Some(Short::Int8(values)) => Numbers::Int8(values[first..].as_ptr()),
        }
    }

    /// The first of `len` lanes from `first` on, which are in `wide` if they are held short.
    pub(super) fn lanes(&self, first: usize, len: usize, wide: &mut Vec<u32>) -> *const u32 {
        match &self.short {
            None => self.lanes[first..first + len].as_ptr(),
            Some(short) => {
                output_lanes(wide, len);
                short.widen(first, wide);
                wide.as_ptr()
            }
        }
    }

    /// The numbers of a column `[k]` as f32.
    pub(crate) fn column(&self, column: usize, to: &mut [f32]) {
        assert!(self.precision == Precision::F32 && column < self.n && to.len() == self.k);
        let (mut wide, panel) = (vec![], column / COLUMNS * self.panel_len());
        for (k, to) in to.iter_mut().enumerate() {
            let at = panel + k * COLUMNS + column % COLUMNS;
            *to = match &self.short {
                None => f32::from_bits(self.lanes[at]),
                Some(short) => {
                    output_lanes(&mut wide, 1);
                    short.widen(at, &mut wide);
                    f32::from_bits(wide[0])
                }
            };
        }
    }

    /// Packs another matrix into the same buffer.
    pub(crate) fn repack(&mut self, view: View, (k, n): (usize, usize), threads: Threads) {
        view.check(k, n);
        (self.k, self.n, self.short) = (k, n, None);
        let len = self.panel_len();
        output_lanes(&mut self.lanes, n.div_ceil(COLUMNS) * len);
        if len == 0 {
            return;
        }
        let pack = |(p, panel): (usize, &mut [u32])| {
            pack::panel(self.precision, view, (k, n), p * COLUMNS, panel);
        };
        match threads {
            Threads::One => self.lanes.chunks_exact_mut(len).enumerate().for_each(pack),
            Threads::All => self.lanes.par_chunks_exact_mut(len).enumerate().for_each(pack),
        }
    }

    pub(super) fn panel_len(&self) -> usize {
        self.precision.lanes(self.k) * COLUMNS
    }

    pub(crate) fn precision(&self) -> Precision {
        self.precision
    }

    /// Whether a part may begin at the inner position `k`.
    pub(crate) fn begins_a_lane(&self, k: usize) -> bool {
        k.is_multiple_of(self.precision.positions())
    }

    /// Inner positions k.
    pub(crate) fn inner(&self) -> usize {
        self.k
    }

    /// Columns n.
    pub(crate) fn columns(&self) -> usize {
        self.n
    }

    /// All of it.
    pub(crate) fn all(&self) -> Part<'_> {
        Part { right: self, first_k: 0, k: self.k, columns: 0..self.n }
    }

    /// Inner positions `k`, whose first begins a lane, and columns whose first is a multiple of 32.
    pub(crate) fn part(&self, k: Range<usize>, columns: Range<usize>) -> Part<'_> {
        assert!(
            k.start.is_multiple_of(self.precision.positions()) && columns.start.is_multiple_of(COLUMNS),
            "part {k:?} x {columns:?} of a packed operand"
        );
        assert!(k.end <= self.k && columns.end <= self.n, "part {k:?} x {columns:?} out of bounds");
        Part { right: self, first_k: k.start, k: k.len(), columns }
    }
}

/// A range of the inner positions and of the columns of a packed operand.
#[derive(Clone)]
pub(crate) struct Part<'a> {
    pub(super) right: &'a Right,
    pub(super) first_k: usize,
    pub(super) k: usize,
    pub(super) columns: Range<usize>,
}

impl Part<'_> {
    /// Some of its columns, the first being a multiple of 32.
    pub(crate) fn columns(self, columns: Range<usize>) -> Self {
        let first = self.columns.start;
        Self { columns: first + columns.start..first + columns.end, ..self }
    }
}
