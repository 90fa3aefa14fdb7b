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

/// Updates `weights` and their moments `[m, v]` (each as long) in place from `gradient`.
///
/// # Errors
/// When the moments or the gradient have another length than the weights, or when they are not contiguous f32.
pub fn adamw_step(weights: &Tensor, gradient: &Tensor, [m, v]: [&Tensor; 2], adamw: AdamW) -> Result<()> {
    let n = weights.elem_count();
    if gradient.elem_count() != n || m.elem_count() != n || v.elem_count() != n {
        candle_core::bail!(
            "adamw: {n} weights, {} gradients, {} first and {} second moments",
            gradient.elem_count(),
            m.elem_count(),
            v.elem_count()
        );
    }
    let numbers = adamw.numbers();
    #[cfg(feature = "cuda")]
    if crate::on_gpu(weights) {
        return crate::cuda::adamw_step([weights, gradient, m, v], numbers);
    }
    let gradient = read(gradient)?;
    with_mut(weights, |weights| {
        with_mut(m, |m| with_mut(v, |v| numbers.update([weights, m, v], &gradient)))
    })??
}

/// Σ x² in f64, in a fixed order.
///
/// # Errors
/// When x is not contiguous f32.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    #[cfg(feature = "cuda")]
    if crate::on_gpu(x) {
        return crate::cuda::sum_of_squares(x);
    }
    let parts: Vec<f64> = read(x)?
        .par_chunks(CHUNK)
        .map(|x| x.chunks(256).map(|x| f64::from(crate::math::dot(x, x))).sum())
        .collect();
    Ok(parts.iter().sum())
}

/// What an update needs of [`AdamW`], in f32; laid out as `AdamW` of kernels.cu.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Numbers {
    beta1: f32,
    beta2: f32,
    eps: f32,
    gradient_scale: f32,
    /// What weight decay leaves of a weight.
    keep: f32,
    /// Learning rate with the correction of the first moment.
    rate: f32,
    /// Correction of the second moment.
    correction2: f32,
}

impl AdamW {
    fn numbers(&self) -> Numbers {
        let corrected = |beta: f64| 1.0 / (1.0 - beta.powf(self.step as f64));
        Numbers {
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            eps: self.eps as f32,
            gradient_scale: self.gradient_scale as f32,
            keep: (1.0 - self.learning_rate * self.weight_decay) as f32,
            rate: (self.learning_rate * corrected(self.beta1)) as f32,
            correction2: corrected(self.beta2) as f32,
        }
    }
}

impl Numbers {
    fn update(&self, [p, m, v]: [&mut [f32]; 3], g: &[f32]) {
        let Self { beta1, beta2, eps, gradient_scale, keep, rate, correction2 } = *self;
        p.par_chunks_mut(CHUNK)
            .zip(m.par_chunks_mut(CHUNK))
            .zip(v.par_chunks_mut(CHUNK))
            .zip(g.par_chunks(CHUNK))
            .for_each(|(((p, m), v), g)| {
                for i in 0..p.len() {
                    let g = g[i] * gradient_scale;
                    m[i] = beta1 * m[i] + (1.0 - beta1) * g;
                    v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
                    p[i] = p[i] * keep - rate * m[i] / ((v[i] * correction2).sqrt() + eps);
                }
            });
    }
}
