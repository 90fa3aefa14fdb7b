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

/// y += the norm of each row of `x` [N, D], as [`rms_norm_rows`] has it.
///
/// # Panics
/// When the shapes do not fit.
pub fn add_rms_norm_rows(x: &[f32], gain: &[f32], eps: f64, y: &mut [f32]) {
    let mut normed = vec![0.0; x.len()];
    rms_norm_rows(x, gain, eps, &mut normed);
    assert_eq!(y.len(), normed.len(), "elements of y and x");
    y.iter_mut().zip(normed).for_each(|(y, normed)| *y += normed);
}

/// The norm of every row, then its heads rotated by its position: `row(i)` is row i of x, and `y` [N, H·K] what
/// becomes of all. The `gain` is as long as what it norms, the whole row [H·K] or each head [K]; without one there is
/// no norm.
///
/// # Panics
/// When a position lies outside the table, and when the shapes do not fit.
pub fn norm_rope_rows<'a>(
    row: impl Fn(usize) -> &'a [f32] + Sync,
    gain: Option<&[f32]>,
    (table, eps): (&RopeTable, f64),
    positions: &[u32],
    y: &mut [f32],
) {
    let Some(d) = y.len().checked_div(positions.len()) else { return };
    let normed = gain.map_or(d, <[f32]>::len);
    assert!(
        y.len() == positions.len() * d && normed > 0 && d.is_multiple_of(normed),
        "{} elements of y, {normed} gains",
        y.len()
    );
    let norm = RmsNorm { eps: eps as f32 };
    y.par_chunks_exact_mut(d).with_min_len(FEW_ROWS).enumerate().for_each(|(i, y)| {
        match gain {
            Some(gain) => {
                let parts = y.chunks_exact_mut(normed).zip(row(i).chunks_exact(normed));
                parts.for_each(|(y, x)| norm.row(x, gain, y));
            }
            None => y.copy_from_slice(row(i)),
        }
        table.rotate(y, positions[i] as usize, false);
    });
}
