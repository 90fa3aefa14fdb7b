//! AdamW (Loshchilov & Hutter, arXiv 1711.05101) in one pass over weights, moments and gradient.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::buffer::{read, with_mut};

/// Elements a task takes; fixed, so that sums never depend on the thread count.
const CHUNK: usize = 16_384;

/// The numbers of one update; `step` counts from 1.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay: weights shrink by `learning_rate · weight_decay`.
    pub weight_decay: f64,
    /// Updates done including this one, for the bias correction.
    pub step: u64,
    /// Factor on the gradient: the clip of the global norm.
    pub gradient_scale: f64,
}

/// Updates `weights` and their moments (each as long) in place from `gradient`.
///
/// # Errors
/// When the moments or the gradient have another length than the weights, or when they are not f32 on the CPU.
pub fn adamw_step(
    weights: &Tensor,
    gradient: &Tensor,
    m: &mut [f32],
    v: &mut [f32],
    adamw: AdamW,
) -> Result<()> {
    let n = weights.elem_count();
    if gradient.elem_count() != n || m.len() != n || v.len() != n {
        candle_core::bail!(
            "adamw: {n} weights, {} gradients, {} first and {} second moments",
            gradient.elem_count(),
            m.len(),
            v.len()
        );
    }
    let gradient = read(gradient)?;
    with_mut(weights, |weights| adamw.update(weights, &gradient, m, v))
}

/// Σ x² in f64, in a fixed order.
///
/// # Errors
/// When x is not f32 on the CPU.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    let parts: Vec<f64> = read(x)?
        .par_chunks(CHUNK)
        .map(|x| x.chunks(256).map(|x| f64::from(crate::math::dot(x, x))).sum())
        .collect();
    Ok(parts.iter().sum())
}

impl AdamW {
    fn update(&self, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        let a = self;
        let (beta1, beta2, eps, scale) =
            (a.beta1 as f32, a.beta2 as f32, a.eps as f32, a.gradient_scale as f32);
        let keep = (1.0 - a.learning_rate * a.weight_decay) as f32;
        let rate = (a.learning_rate / (1.0 - a.beta1.powf(a.step as f64))) as f32;
        let correction2 = (1.0 / (1.0 - a.beta2.powf(a.step as f64))) as f32;
        p.par_chunks_mut(CHUNK)
            .zip(m.par_chunks_mut(CHUNK))
            .zip(v.par_chunks_mut(CHUNK))
            .zip(g.par_chunks(CHUNK))
            .for_each(|(((p, m), v), g)| {
                for i in 0..p.len() {
                    let g = g[i] * scale;
                    m[i] = beta1 * m[i] + (1.0 - beta1) * g;
                    v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
                    p[i] = p[i] * keep - rate * m[i] / ((v[i] * correction2).sqrt() + eps);
                }
            });
    }
}
