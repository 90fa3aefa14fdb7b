use candle_core::{DType, Result, Tensor};

use super::{Argument, Grid, Matrix, device, gemm, launch, output, pointer, suffix};
use crate::cross_entropy::{CrossEntropy, TokenLoss};
use crate::gemm::Write;
use crate::{Tape, Traced};

/// Rows whose logits exist at one time.
const ROWS: usize = 2048;

/// The body of `linear_cross_entropy`.
pub(crate) fn linear_cross_entropy(
    tape: &mut Tape,
    hidden: &Traced,
    weight: &Traced,
    options: CrossEntropy,
) -> Result<(f64, TokenLoss)> {
    let (v, d) = weight.value().dims2()?;
    let n = options.targets.len();
    let (h, place) = (hidden.value(), hidden.value().device());
    let (cuda, name, dtype) = (device(h)?, suffix(h)?, h.dtype());
    let w = weight.value().to_dtype(dtype)?;
    let targets = Tensor::from_slice(options.targets, n, place)?;
    let losses = output((n, 2), DType::F32, place)?;
    let (mut dhidden, mut dweight) = (None, None);
    if let Some(gradients) = tape.gradients() {
        dhidden = gradients.device_buffer(hidden, dtype)?;
        dweight = gradients.device_buffer(weight, DType::F32)?;
    }
    let rows = ROWS.min(n);
    let with_gradient = dhidden.is_some() || dweight.is_some();
    let logits = output((rows, v), DType::F32, place)?;
    let dlogits = output((if with_gradient { rows } else { 0 }, v), dtype, place)?;
    let weights = Matrix::rows(&w, d, 0)?;
    for first in (0..n).step_by(ROWS) {
        let m = ROWS.min(n - first);
        let h_rows = Matrix::rows(h, d, first)?;
        let arguments = [
            Argument::Pointer(pointer(&logits, DType::F32)?),
            Argument::Pointer(if with_gradient { pointer(&dlogits, dtype)? } else { 0 }),
            Argument::Pointer(pointer(&targets.narrow(0, first, m)?, DType::U32)?),
            Argument::Pointer(pointer(&losses.narrow(0, first, m)?, DType::F32)?),
            Argument::Int(v as i32),
            Argument::Float(options.scale as f32),
            Argument::Float(options.z_loss as f32),
        ];
        let (of_logits, of_dlogits) = (Matrix::rows(&logits, v, 0)?, Matrix::rows(&dlogits, v, 0)?);
        // SAFETY: hidden is n rows of d, w v rows of d, the logits at least m rows of v.
        unsafe {
            gemm(&cuda, (m, v, d), [h_rows, weights.transposed()], of_logits, Write::Over)?;
            launch(&cuda, &format!("cross_entropy_{name}"), Grid::rows(m), &arguments)?;
            if let Some((dhidden, into)) = &dhidden {
                let to = Matrix::rows(dhidden, d, first)?;
                gemm(&cuda, (m, d, v), [of_dlogits, weights], to, *into)?;
            }
            if let Some((dweight, into)) = &dweight {
                let into = if first == 0 { *into } else { Write::Add };
                let to = Matrix::rows(dweight, d, 0)?;
                gemm(&cuda, (v, d, m), [of_dlogits.transposed(), h_rows], to, into)?;
            }
        }
    }
    let losses = losses.to_vec2::<f32>()?;
    let total: f64 = losses.iter().map(|row| f64::from(row[1])).sum();
    Ok((total * options.scale, losses.into_iter().map(|row| row[0]).collect()))
}
