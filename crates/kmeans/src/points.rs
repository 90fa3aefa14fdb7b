use rayon::prelude::*;

use crate::{Error, Result};

/// Rows that one task of a pass over all points reads.
const CHUNK_ROWS: usize = 4096;

/// All the points, where they lie: rows are read by index and never copied as a whole.
pub(crate) struct Points<'a> {
    values: &'a [f32], // [N, D]
    dim: usize,
    /// `|x|²` of every point, `[N]`, added up in the order of the kernel's dot products: the
    /// distance of two equal points is then exactly 0.
    norms: Vec<f32>,
}

impl<'a> Points<'a> {
    /// Fails on a wrong length, on no points or too many, and on a value that is not finite.
    pub(crate) fn new(values: &'a [f32], dim: usize) -> Result<Self> {
        let n_points = check_shape(values, dim)?;
        let mut norms = vec![0f32; n_points];
        let chunks = norms.par_chunks_mut(CHUNK_ROWS).zip(values.par_chunks(CHUNK_ROWS * dim));
        chunks.for_each(|(norms, rows)| {
            norms.iter_mut().zip(rows.chunks_exact(dim)).for_each(|(norm, row)| *norm = norm_squared(row));
        });
        if let Some(row) = norms.iter().position(|norm| !norm.is_finite()) {
            return Err(Error::NonFinite { row, norm_squared: norms[row] });
        }
        Ok(Self { values, dim, norms })
    }

    pub(crate) fn len(&self) -> usize {
        self.norms.len()
    }

    pub(crate) fn dim(&self) -> usize {
        self.dim
    }

    pub(crate) fn row(&self, index: u32) -> &'a [f32] {
        &self.values[index as usize * self.dim..][..self.dim]
    }

    pub(crate) fn norm_squared(&self, index: u32) -> f32 {
        self.norms[index as usize]
    }
}

/// The number of rows, at least 1 and at most what a `u32` counts.
fn check_shape(values: &[f32], dim: usize) -> Result<usize> {
    if dim == 0 {
        return Err(Error::ZeroDimension);
    }
    if !values.len().is_multiple_of(dim) {
        return Err(Error::Length { values: values.len(), dim });
    }
    let found = values.len() / dim;
    if found == 0 || found > u32::MAX as usize {
        return Err(Error::PointCount { found, max: u32::MAX });
    }
    Ok(found)
}

/// `|x|²`, one product after the other.
pub(crate) fn norm_squared(row: &[f32]) -> f32 {
    row.iter().fold(0.0, |sum, value| sum + value * value)
}
