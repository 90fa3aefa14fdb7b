//! Output projection and cross-entropy in one, over chunks of rows: no [N, V] tensor ever exists.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, D, DType, Device, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::IGNORE;
use crate::buffer::{output, tensor_like, values, with};
use crate::gemm::{Into, Size, Threads, View, gemm};
use crate::math::{exp_sub_sum, max, scale};

/// Rows whose logits exist at one time.
const ROWS: usize = 256;

/// What to compute beside the hidden states and the output matrix.
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropy<'a> {
    /// The next token of each of the N rows, or [`IGNORE`].
    pub targets: &'a [u32],
    /// Factor on the sum over rows: 1 / (scored tokens of the whole step) gives its mean.
    pub scale: f64,
    /// Weight of logsumexp² per row, which keeps logits from drifting (PaLM, arXiv 2204.02311 §5); 0 is off.
    pub z_loss: f64,
    /// Whether a backward will follow; the fused body makes the gradients in the forward.
    pub train: bool,
}

/// Negative log-likelihood (nats) of each row's target, without the z-loss; 0 where ignored.
pub type TokenLoss = Vec<f32>;

/// `scale · Σ (logsumexp(h·Wᵀ) − (h·Wᵀ)[target] + z_loss · logsumexp²)` as a scalar, and the loss of each row.
///
/// `hidden` [.., D] of N rows, `weight` [V, D].
///
/// # Errors
/// When the number of targets is not N, or one is not below V.
pub fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    options: CrossEntropy,
) -> Result<(Tensor, TokenLoss)> {
    let (v, d) = weight.dims2()?;
    let n = hidden.elem_count() / d;
    if options.targets.len() != n {
        candle_core::bail!("cross-entropy: {} targets for {n} rows", options.targets.len());
    }
    if let Some(target) = options.targets.iter().find(|&&t| t != IGNORE && t as usize >= v) {
        candle_core::bail!("cross-entropy: target {target} of a vocabulary of {v}");
    }
    if !crate::fused(hidden) {
        return composed(hidden, weight, options);
    }
    let token_loss = Arc::new(Mutex::new(vec![]));
    let op = LinearCrossEntropy {
        targets: options.targets.to_vec(),
        scale: options.scale as f32,
        z_loss: options.z_loss as f32,
        train: options.train,
        frozen: !weight.track_op(),
        token_loss: token_loss.clone(),
        gradients: Mutex::new(None),
    };
    let loss = hidden.contiguous()?.apply_op2(weight, op)?;
    let token_loss = std::mem::take(&mut *token_loss.lock().unwrap_or_else(PoisonError::into_inner));
    Ok((loss, token_loss))
}

fn composed(hidden: &Tensor, weight: &Tensor, options: CrossEntropy) -> Result<(Tensor, TokenLoss)> {
    let (v, d) = weight.dims2()?;
    let n = hidden.elem_count() / d;
    let (device, dtype) = (hidden.device(), hidden.dtype());
    let logits = hidden.reshape((n, d))?.matmul(&weight.t()?)?;
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
    Ok((loss, nll.flatten_all()?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec1()?))
}

struct LinearCrossEntropy {
    targets: Vec<u32>,
    scale: f32,
    z_loss: f32,
    train: bool,
    /// Whether the output matrix needs no gradient.
    frozen: bool,
    token_loss: Arc<Mutex<TokenLoss>>,
    gradients: Mutex<Option<(Vec<f32>, Vec<f32>)>>,
}

impl LinearCrossEntropy {
    /// Turns a row of logits into its gradient; returns (nll, loss with z), both unscaled.
    fn row(&self, logits: &mut [f32], target: u32) -> (f32, f32) {
        if target == IGNORE {
            logits.fill(0.0);
            return (0.0, 0.0);
        }
        let target = target as usize;
        let target_logit = logits[target];
        let largest = max(logits);
        let sum = exp_sub_sum(logits, largest);
        let log_sum_exp = sum.ln() + largest;
        // d/dlogit_i = p_i·(1 + 2·z·lse) − [i = target]
        scale(logits, self.scale / sum * (1.0 + 2.0 * self.z_loss * log_sum_exp));
        logits[target] -= self.scale;
        let nll = log_sum_exp - target_logit;
        (nll, nll + self.z_loss * log_sum_exp * log_sum_exp)
    }
}

impl CustomOp2 for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "linear-cross-entropy"
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (v, d) = weight_layout.shape().dims2()?;
        let (hidden, weight) = (values(hidden, hidden_layout)?, values(weight, weight_layout)?);
        let n = self.targets.len();
        let mut logits = output(ROWS.min(n) * v);
        let mut dhidden = output(if self.train { n * d } else { 0 });
        let with_weight = self.train && !self.frozen && n > 0;
        let mut dweight = output(if with_weight { v * d } else { 0 });
        let mut losses = Vec::with_capacity(n);
        for first in (0..n).step_by(ROWS) {
            let m = ROWS.min(n - first);
            let rows = View::rows(&hidden[first * d..], d);
            let logits = &mut logits[..m * v];
            let size = Size { m, n: v, k: d };
            gemm(size, (logits, v), rows, View::transposed(weight, d), Into::Overwrite, Threads::All);
            let chunk = logits.par_chunks_mut(v).zip(&self.targets[first..first + m]);
            losses.par_extend(chunk.map(|(logits, &target)| self.row(logits, target)));
            if self.train {
                let size = Size { m, n: d, k: v };
                let dst = (&mut dhidden[first * d..], d);
                gemm(size, dst, View::rows(logits, v), View::rows(weight, d), Into::Overwrite, Threads::All);
            }
            if with_weight {
                let into = if first == 0 { Into::Overwrite } else { Into::Add };
                let size = Size { m: v, n: d, k: m };
                gemm(size, (&mut dweight, d), View::transposed(logits, v), rows, into, Threads::All);
            }
        }
        let total: f64 = losses.iter().map(|&(_, loss)| f64::from(loss)).sum();
        *self.token_loss.lock().unwrap_or_else(PoisonError::into_inner) =
            losses.into_iter().map(|(nll, _)| nll).collect();
        if self.train {
            *self.gradients.lock().unwrap_or_else(PoisonError::into_inner) = Some((dhidden, dweight));
        }
        Ok((CpuStorage::F32(vec![(total * f64::from(self.scale)) as f32]), Shape::from(())))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        _loss: &Tensor,
        dloss: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gradients = self.gradients.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((mut dhidden, mut dweight)) = gradients else {
            candle_core::bail!("cross-entropy: backward asked of a forward made without `train`");
        };
        let dloss = with(dloss, |dloss| dloss[0])?;
        if dloss != 1.0 {
            scale(&mut dhidden, dloss);
            scale(&mut dweight, dloss);
        }
        let dweight = if dweight.is_empty() { None } else { Some(tensor_like(dweight, weight)?) };
        Ok((Some(tensor_like(dhidden, hidden)?), dweight))
    }
}
