//! RMSNorm with a gain (Zhang & Sennrich, arXiv 1910.07467).

use candle_core::{CpuStorage, CustomOp2, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::buffer::{output, tensor_like, values, with};
use crate::math::dot;

/// Rows a task takes; fixed, so that the sums of the gain's gradient never depend on the thread count.
const ROWS: usize = 64;

/// y = x / √(mean(x²) + eps) · gain over the last dimension.
///
/// `x` [.., D], `gain` [D]; y has the shape of x.
pub fn rms_norm(x: &Tensor, gain: &Tensor, eps: f64) -> Result<Tensor> {
    if gain.dims() != [x.dim(D::Minus1)?] {
        candle_core::bail!("rms norm: gain {:?} for x {:?}", gain.dims(), x.dims());
    }
    if crate::fused(x) {
        return x.contiguous()?.apply_op2(gain, RmsNorm { eps: eps as f32 });
    }
    let inverse = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    x.broadcast_mul(&inverse)?.broadcast_mul(gain)
}

struct RmsNorm {
    eps: f32,
}

impl RmsNorm {
    fn inverse_rms(&self, x: &[f32]) -> f32 {
        1.0 / (dot(x, x) / x.len() as f32 + self.eps).sqrt()
    }

    /// Gradients of x [rows, D] and, summed over the rows, of the gain.
    fn backward_rows(&self, dx: &mut [f32], x: &[f32], gain: &[f32], dy: &[f32]) -> Vec<f32> {
        let d = gain.len();
        let mut dgain = vec![0f32; d];
        let mut dy_gain = vec![0f32; d];
        for ((dx, x), dy) in dx.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(dy.chunks_exact(d)) {
            let r = self.inverse_rms(x);
            for i in 0..d {
                dy_gain[i] = dy[i] * gain[i];
                dgain[i] += dy[i] * x[i] * r;
            }
            let c = dot(&dy_gain, x) * r * r * r / d as f32;
            for i in 0..d {
                dx[i] = dy_gain[i] * r - x[i] * c;
            }
        }
        dgain
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        gain: &CpuStorage,
        gain_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, gain) = (values(x, x_layout)?, values(gain, gain_layout)?);
        let d = gain.len();
        let mut y = output(x.len());
        y.par_chunks_mut(d * ROWS).zip(x.par_chunks(d * ROWS)).for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                let r = self.inverse_rms(x);
                for i in 0..d {
                    y[i] = x[i] * r * gain[i];
                }
            }
        });
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gain: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let d = gain.elem_count();
        let (dx, dgain) = with(x, |x_values| {
            with(gain, |gain| {
                with(dy, |dy| {
                    let mut dx = output(x_values.len());
                    let parts: Vec<Vec<f32>> = dx
                        .par_chunks_mut(d * ROWS)
                        .zip(x_values.par_chunks(d * ROWS))
                        .zip(dy.par_chunks(d * ROWS))
                        .map(|((dx, x), dy)| self.backward_rows(dx, x, gain, dy))
                        .collect();
                    let mut dgain = vec![0f32; d];
                    for part in parts {
                        dgain.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
                    }
                    (dx, dgain)
                })
            })
        })???;
        Ok((Some(tensor_like(dx, x)?), Some(tensor_like(dgain, gain)?)))
    }
}
