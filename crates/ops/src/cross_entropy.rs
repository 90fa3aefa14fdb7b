//! Output projection and cross-entropy in one, over chunks of rows: no [N, V] tensor ever exists.

use candle_core::{D, DType, Device, Result, Tensor};
use rayon::prelude::*;

use crate::buffer::{Shared, output, read, with_mut};
use crate::gemm::{Addend, Output, Right, Size, Threads, View, Write, gemm, multiply_all};
use crate::math::{exp_sub_sum, max, scale, soft_cap};
use crate::{IGNORE, Tape, Traced};

/// Rows whose logits exist at one time.
pub const LOGIT_ROWS: usize = 256;

/// What to compute beside the hidden states and the output matrix.
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropy<'a> {
    /// The next token of each of the N rows, or [`IGNORE`].
    pub targets: &'a [u32],
    /// Factor on the sum over rows: 1 / (scored tokens of the whole step) gives its mean.
    pub scale: f64,
    /// Weight of logsumexp² per row, which keeps logits from drifting (PaLM, arXiv 2204.02311 §5); 0 is off.
    pub z_loss: f64,
}

/// Negative log-likelihood (nats) of each row's target, without the z-loss; 0 where ignored.
pub type TokenLoss = Vec<f32>;

/// `scale · Σ (logsumexp(h·Wᵀ) − (h·Wᵀ)[target] + z_loss · logsumexp²)`, and the loss of each row.
///
/// `hidden` [.., D] of N rows, `weight` [V, D]; with a `cap`, logits l = h·Wᵀ become cap·tanh(l / cap) first. On a recording tape the gradients are made in the same pass,
/// so that a backward pass can follow at once.
///
/// # Errors
/// When the number of targets is not N, or one is not below V.
pub fn linear_cross_entropy(
    tape: &mut Tape,
    hidden: &Traced,
    weight: &Traced,
    cap: Option<f64>,
    options: CrossEntropy,
) -> Result<(f64, TokenLoss)> {
    let (v, d) = weight.value().dims2()?;
    let n = hidden.value().elem_count() / d;
    if options.targets.len() != n {
        candle_core::bail!("cross-entropy: {} targets for {n} rows", options.targets.len());
    }
    if let Some(target) = options.targets.iter().find(|&&t| t != IGNORE && t as usize >= v) {
        candle_core::bail!("cross-entropy: target {target} of a vocabulary of {v}");
    }
    if n == 0 {
        return Ok((0.0, vec![]));
    }
    #[cfg(feature = "cuda")]
    if crate::on_gpu(hidden.value()) && cap.is_none() {
        return crate::cuda::linear_cross_entropy(tape, hidden, weight, options);
    }
    if crate::fused(hidden.value()) {
        return fused(tape, hidden, weight, (cap, options));
    }
    let mut rows = vec![];
    let inputs = [hidden, weight];
    let loss =
        tape.composed(&inputs, |inputs| composed(&inputs[0], &inputs[1], (cap, options), &mut rows))?;
    if let Some(gradients) = tape.gradients() {
        gradients.give(&loss, loss.value().ones_like()?)?;
    }
    Ok((loss.value().to_dtype(DType::F64)?.to_scalar()?, rows))
}

/// The loss as a scalar, and into `rows` that of each row.
fn composed(
    hidden: &Tensor,
    weight: &Tensor,
    (cap, options): (Option<f64>, CrossEntropy),
    rows: &mut TokenLoss,
) -> Result<Tensor> {
    let (v, d) = weight.dims2()?;
    let n = hidden.elem_count() / d;
    let (device, dtype) = (hidden.device(), hidden.dtype());
    let mut logits = hidden.reshape((n, d))?.matmul(&weight.to_dtype(dtype)?.t()?)?;
    if let Some(cap) = cap {
        logits = ((logits / cap)?.tanh()? * cap)?;
    }
    let largest = logits.max_keepdim(D::Minus1)?.detach();
    let shifted = logits.broadcast_sub(&largest)?;
    let log_sum_exp = (shifted.exp()?.sum_keepdim(D::Minus1)?.log()? + largest)?;
    let scored = options.targets.iter().map(|&t| if t == IGNORE { 0f32 } else { 1.0 });
    let scored = Tensor::from_vec(scored.collect::<Vec<_>>(), (n, 1), device)?.to_dtype(dtype)?;
    let one_hot = options.targets.iter().flat_map(|&t| (0..v as u32).map(move |i| f32::from(i == t)));
    let one_hot = Tensor::from_vec(one_hot.collect::<Vec<_>>(), (n, v), device)?.to_dtype(dtype)?;
    let nll = ((&log_sum_exp - (logits * one_hot)?.sum_keepdim(D::Minus1)?)? * &scored)?;
    let z = ((log_sum_exp.sqr()? * options.z_loss)? * scored)?;
    let loss = ((&nll + z)?.sum_all()? * options.scale)?;
    *rows = nll.flatten_all()?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec1()?;
    Ok(loss)
}

fn fused(
    tape: &mut Tape,
    hidden: &Traced,
    weight: &Traced,
    (cap, options): (Option<f64>, CrossEntropy),
) -> Result<(f64, TokenLoss)> {
    let (v, d) = weight.value().dims2()?;
    let n = options.targets.len();
    let precision = tape.precision();
    let (h, w) = (read(hidden.value())?, read(weight.value())?);
    // Both are used by every chunk of rows.
    let into_logits = Right::pack(precision, View::transposed(&w, d), (d, v), Threads::All);
    let out_of_logits = match tape.records(&[hidden]) {
        true => Some(Right::pack(precision, View::rows(&w, d), (v, d), Threads::All)),
        false => None,
    };
    let (mut dhidden, mut dweight) = (None, None);
    if let Some(gradients) = tape.gradients() {
        (dhidden, dweight) = (gradients.buffer(hidden)?, gradients.buffer(weight)?);
    }
    let mut logits = output(LOGIT_ROWS.min(n) * v);
    let mut losses = Vec::with_capacity(n);
    for first in (0..n).step_by(LOGIT_ROWS) {
        let m = LOGIT_ROWS.min(n - first);
        let rows = View::rows(&h[first * d..], d);
        let logits = &mut logits[..m * v];
        let to = Output { to: Shared::new(logits), offset: 0, row: v, from: Addend::Zero };
        // SAFETY: the logits of m rows, uniquely borrowed.
        unsafe { multiply_all((m, rows), into_logits.all(), to, Threads::All) };
        let chunk = logits.par_chunks_mut(v).zip(&options.targets[first..first + m]);
        losses.par_extend(chunk.map_init(Vec::new, |capped, (logits, &target)| match cap {
            None => row(logits, target, options),
            Some(cap) => capped_row(logits, target, (cap as f32, options), capped),
        }));
        if let (Some((dhidden, into)), Some(right)) = (&dhidden, &out_of_logits) {
            with_mut(dhidden, |dhidden| {
                let dhidden = &mut dhidden[first * d..][..m * d];
                let to = Output { to: Shared::new(dhidden), offset: 0, row: d, from: (*into).into() };
                // SAFETY: the gradient of m rows, uniquely borrowed.
                unsafe { multiply_all((m, View::rows(logits, v)), right.all(), to, Threads::All) }
            })?;
        }
        if let Some((dweight, into)) = &dweight {
            let into = if first == 0 { *into } else { Write::Add };
            let size = Size { m: v, n: d, k: m };
            with_mut(dweight, |dweight| {
                gemm(
                    precision,
                    size,
                    (dweight, d),
                    (View::transposed(logits, v), rows),
                    (into, Threads::All),
                );
            })?;
        }
    }
    let total: f64 = losses.iter().map(|&(_, loss)| f64::from(loss)).sum();
    Ok((total * options.scale, losses.into_iter().map(|(nll, _)| nll).collect()))
}

/// Turns a row of logits into its gradient; returns (nll, loss with z), both unscaled.
fn row(logits: &mut [f32], target: u32, options: CrossEntropy) -> (f32, f32) {
    if target == IGNORE {
        logits.fill(0.0);
        return (0.0, 0.0);
    }
    let (target, z_loss, factor) = (target as usize, options.z_loss as f32, options.scale as f32);
    let target_logit = logits[target];
    let largest = max(logits);
    let sum = exp_sub_sum(logits, largest);
    let log_sum_exp = sum.ln() + largest;
    // d/dlogit_i = p_i·(1 + 2·z·lse) − [i = target]
    scale(logits, factor / sum * (1.0 + 2.0 * z_loss * log_sum_exp));
    logits[target] -= factor;
    let nll = log_sum_exp - target_logit;
    (nll, nll + z_loss * log_sum_exp * log_sum_exp)
}

/// [`row`] of logits that are capped first; `capped` is room for them.
fn capped_row(
    logits: &mut [f32],
    target: u32,
    (cap, options): (f32, CrossEntropy),
    capped: &mut Vec<f32>,
) -> (f32, f32) {
    soft_cap(logits, 1.0, cap);
    capped.clear();
    capped.extend_from_slice(logits);
    let losses = row(logits, target, options);
    // d cap·tanh(l / cap) = 1 − tanh²
    logits.iter_mut().zip(capped).for_each(|(gradient, capped)| {
        let tanh = *capped / cap;
        *gradient *= 1.0 - tanh * tanh;
    });
    losses
}
