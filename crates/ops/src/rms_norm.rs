//! RMSNorm with a gain (Zhang & Sennrich, arXiv 1910.07467).

use candle_core::{D, Result, Tensor};
use rayon::prelude::*;

use crate::buffer::{output, read, tensor};
use crate::gemm::Write;
use crate::math::dot;
use crate::{Tape, Traced};

/// Rows a task takes; fixed, so that the sums of the gain's gradient never depend on the thread count.
const ROWS: usize = 64;

/// y = x / √(mean(x²) + eps) · gain over the last dimension.
///
/// `x` [.., D], `gain` [D]; y has the shape of x.
///
/// # Errors
/// When the gain is not as long as the rows of x.
pub fn rms_norm(tape: &mut Tape, x: &Traced, gain: &Traced, eps: f64) -> Result<Traced> {
    check(x, gain)?;
    #[cfg(feature = "cuda")]
    if crate::on_gpu(x.value()) {
        return crate::cuda::norm(tape, x, gain, eps, None);
    }
    if !crate::fused(x.value()) {
        return tape.composed(&[x, gain], |inputs| composed(&inputs[0], &inputs[1], eps));
    }
    let norm = RmsNorm { eps: eps as f32 };
    let y = norm.forward(x.value(), gain.value())?;
    if !tape.records(&[x, gain]) {
        return Ok(Traced::constant(y));
    }
    let (x, gain) = (x.clone(), gain.clone());
    let (x_again, gain_again) = (x.value().clone(), gain.value().clone());
    let y = tape.record(y, move |dy, gradients| {
        let (x_values, g, dy) = (read(x.value())?, read(gain.value())?, read(&dy)?);
        norm.backward((&x, &x_values), (&gain, &g), gradients, |row, dy_row| {
            dy_row.copy_from_slice(&dy[row * g.len()..][..g.len()]);
        })
    });
    Ok(y.made_again_by(move || norm.forward(&x_again, &gain_again)))
}

/// base + the norm of x, as [`rms_norm`] has it: what is added to the residual stream is normed first.
///
/// # Errors
/// As [`rms_norm`], and when the base has another shape than x.
pub fn add_rms_norm(tape: &mut Tape, base: &Traced, x: &Traced, gain: &Traced, eps: f64) -> Result<Traced> {
    check(x, gain)?;
    if base.value().dims() != x.value().dims() {
        candle_core::bail!("rms norm: base {:?} for x {:?}", base.value().dims(), x.value().dims());
    }
    if !crate::fused(x.value()) {
        return tape.composed(&[base, x, gain], |inputs| &inputs[0] + composed(&inputs[1], &inputs[2], eps)?);
    }
    let norm = RmsNorm { eps: eps as f32 };
    let mut y = output(x.value().elem_count());
    {
        let (base, x, gain) = (read(base.value())?, read(x.value())?, read(gain.value())?);
        let d = gain.len();
        let chunks = y.par_chunks_mut(d * ROWS).zip(x.par_chunks(d * ROWS)).zip(base.par_chunks(d * ROWS));
        chunks.for_each(|((y, x), base)| {
            for ((y, x), base) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(base.chunks_exact(d)) {
                norm.row(x, &gain, y);
                y.iter_mut().zip(base).for_each(|(y, base)| *y += base);
            }
        });
    }
    let y = tensor(y, x.value().shape())?;
    if !tape.records(&[base, x, gain]) {
        return Ok(Traced::constant(y));
    }
    let (base, x, gain) = (base.place(), x.clone(), gain.clone());
    Ok(tape.record(y, move |dy, gradients| {
        {
            let (x_values, g, dy) = (read(x.value())?, read(gain.value())?, read(&dy)?);
            norm.backward((&x, &x_values), (&gain, &g), gradients, |row, dy_row| {
                dy_row.copy_from_slice(&dy[row * g.len()..][..g.len()]);
            })?;
        }
        gradients.give(&base, dy)
    }))
}

pub(crate) fn check(x: &Traced, gain: &Traced) -> Result<()> {
    if gain.value().dims() != [x.value().dim(D::Minus1)?] {
        candle_core::bail!("rms norm: gain {:?} for x {:?}", gain.value().dims(), x.value().dims());
    }
    Ok(())
}

pub(crate) fn composed(x: &Tensor, gain: &Tensor, eps: f64) -> Result<Tensor> {
    let inverse = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    x.broadcast_mul(&inverse)?.broadcast_mul(&gain.to_dtype(x.dtype())?)
}

#[derive(Clone, Copy)]
pub(crate) struct RmsNorm {
    pub(crate) eps: f32,
}

impl RmsNorm {
    fn inverse_rms(&self, x: &[f32]) -> f32 {
        1.0 / (dot(x, x) / x.len() as f32 + self.eps).sqrt()
    }

    fn forward(&self, x: &Tensor, gain: &Tensor) -> Result<Tensor> {
        let mut y = output(x.elem_count());
        {
            let (x, gain) = (read(x)?, read(gain)?);
            let d = gain.len();
            y.par_chunks_mut(d * ROWS).zip(x.par_chunks(d * ROWS)).for_each(|(y, x)| {
                for (y, x) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                    self.row(x, &gain, y);
                }
            });
        }
        tensor(y, x.shape())
    }

    pub(crate) fn row(&self, x: &[f32], gain: &[f32], y: &mut [f32]) {
        let r = self.inverse_rms(x);
        for ((y, x), gain) in y.iter_mut().zip(x).zip(gain) {
            *y = x * r * gain;
        }
    }

    /// Gradients of all rows of x, and of the gain summed over them; `output_gradient` fills in that of one row
    /// of the norm's output.
    pub(crate) fn backward(
        &self,
        (x, x_values): (&Traced, &[f32]),
        (gain, gain_values): (&Traced, &[f32]),
        gradients: &mut crate::Gradients,
        output_gradient: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<()> {
        let d = gain_values.len();
        let mut parts: Vec<Vec<f32>> = vec![];
        let mut rows = |dx: &mut [f32], into: Write| {
            let chunks = dx.par_chunks_mut(d * ROWS).zip(x_values.par_chunks(d * ROWS)).enumerate();
            parts = chunks
                .map(|(chunk, (dx, x))| {
                    let (mut dgain, mut dy) = (vec![0f32; d], vec![0f32; d]);
                    for (row, (dx, x)) in dx.chunks_exact_mut(d).zip(x.chunks_exact(d)).enumerate() {
                        output_gradient(chunk * ROWS + row, &mut dy);
                        self.backward_row(x, gain_values, (&mut dy, &mut dgain), (dx, into));
                    }
                    dgain
                })
                .collect();
        };
        match x.is_constant() {
            true => rows(&mut output(x_values.len()), Write::Over),
            false => gradients.write(x, rows)?,
        }
        gradients.write(gain, |dgain, into| {
            if into == Write::Over {
                dgain.fill(0.0);
            }
            for part in &parts {
                dgain.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            }
        })
    }

    /// Gradient of one row: dx = r·(g ⊙ dy) − x · (g ⊙ dy)·x · r³/D, dgain += dy ⊙ x · r. Overwrites `dy`.
    fn backward_row(
        &self,
        x: &[f32],
        gain: &[f32],
        (dy, dgain): (&mut [f32], &mut [f32]),
        (dx, into): (&mut [f32], Write),
    ) {
        let r = self.inverse_rms(x);
        for (((dy, gain), dgain), x) in dy.iter_mut().zip(gain).zip(dgain).zip(x) {
            *dgain += *dy * x * r;
            *dy *= gain;
        }
        let c = dot(dy, x) * r * r * r / x.len() as f32;
        match into {
            Write::Over => {
                for ((dx, dy), x) in dx.iter_mut().zip(dy).zip(x) {
                    *dx = *dy * r - x * c;
                }
            }
            Write::Add => {
                for ((dx, dy), x) in dx.iter_mut().zip(dy).zip(x) {
                    *dx += *dy * r - x * c;
                }
            }
        }
    }
}
