use rayon::prelude::*;

use super::FEW_ROWS;
use crate::RopeTable;
use crate::rms_norm::RmsNorm;

/// y = x / √(mean(x²) + eps) · gain for each row of `x` and `y` [N, D], D being the gain's length.
///
/// # Panics
/// When the shapes do not fit.
pub fn rms_norm_rows(x: &[f32], gain: &[f32], eps: f64, y: &mut [f32]) {
    let d = gain.len();
    assert!(
        x.len() == y.len() && x.len().is_multiple_of(d),
        "{} and {} elements in rows of {d}",
        x.len(),
        y.len()
    );
    let norm = RmsNorm { eps: eps as f32 };
    y.par_chunks_exact_mut(d)
        .with_min_len(FEW_ROWS)
        .zip(x.par_chunks_exact(d))
        .for_each(|(y, x)| norm.row(x, gain, y));
}

/// The norm of every row over its full width, then its heads rotated by its position: `row(i)` is row i of x, and
/// `y` [N, H·K] what becomes of all. `gain` [H·K].
///
/// # Panics
/// When a position lies outside the table, and when the shapes do not fit.
pub fn norm_rope_rows<'a>(
    row: impl Fn(usize) -> &'a [f32] + Sync,
    gain: &[f32],
    (table, eps): (&RopeTable, f64),
    positions: &[u32],
    y: &mut [f32],
) {
    let d = gain.len();
    assert_eq!(y.len(), positions.len() * d, "elements of y");
    let norm = RmsNorm { eps: eps as f32 };
    y.par_chunks_exact_mut(d).with_min_len(FEW_ROWS).enumerate().for_each(|(i, y)| {
        norm.row(row(i), gain, y);
        table.rotate(y, positions[i] as usize, false);
    });
}
