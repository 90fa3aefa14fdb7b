use serde::{Deserialize, Serialize};

use crate::schedule::setting;
use crate::{Result, Schedule};

/// Lazy AdamW (Loshchilov & Hutter, arXiv 1711.05101): a block is updated, its moments and its
/// weights decayed, only in steps that push a gradient of it, and its bias correction counts those
/// steps alone. Dense AdamW would drift the blocks that no sequence of a step belongs to.
#[derive(Copy, Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdamW {
    /// Learning rate, by the global step.
    pub schedule: Schedule,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, times the learning rate, on touch.
    pub weight_decay: f64,
    /// Largest L2 norm of one block's gradient; a longer one is scaled down to it.
    pub clip: Option<f64>,
}

/// One block's weights and optimizer state. `values`, `m` and `v` have the block's length.
#[derive(Clone, PartialEq, Debug, Default)]
pub(crate) struct Row {
    pub(crate) values: Vec<f32>,
    pub(crate) m: Vec<f32>,
    pub(crate) v: Vec<f32>,
    /// Updates of this block so far.
    pub(crate) steps: u64,
}

impl Row {
    pub(crate) fn m(&self) -> &[f32] {
        &self.m
    }

    pub(crate) fn v(&self) -> &[f32] {
        &self.v
    }
}

impl AdamW {
    /// Fails on a hyperparameter outside its range.
    pub fn validate(&self) -> Result<()> {
        self.schedule.validate()?;
        for (field, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(setting(field, "0 to below 1", beta));
            }
        }
        // A smaller eps would vanish next to a second moment of 0 in f32, and give 0/0.
        if !(self.eps.is_finite() && self.eps >= f64::from(f32::MIN_POSITIVE)) {
            return Err(setting("eps", "finite and at least 1.2e-38", self.eps));
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            return Err(setting("weight_decay", "finite and at least 0", self.weight_decay));
        }
        match self.clip {
            Some(clip) if !(clip.is_finite() && clip > 0.0) => {
                Err(setting("clip", "finite and above 0", clip))
            }
            _ => Ok(()),
        }
    }

    /// One update of a block by the gradient of the global step `step`, in one pass.
    pub(crate) fn update(&self, row: &mut Row, grad: &[f32], step: u64) {
        row.steps += 1;
        let t = row.steps as f64;
        let rate = self.schedule.at(step);
        let (beta1, beta2) = (self.beta1 as f32, self.beta2 as f32);
        let (rest1, rest2) = ((1.0 - self.beta1) as f32, (1.0 - self.beta2) as f32);
        let decay = (1.0 - rate * self.weight_decay) as f32;
        let step_size = (rate / (1.0 - self.beta1.powf(t))) as f32;
        let v_scale = (1.0 / (1.0 - self.beta2.powf(t)).sqrt()) as f32;
        let eps = self.eps as f32;
        let scale = self.clip.map_or(1.0, |clip| clip_scale(grad, clip));
        let state = row.values.iter_mut().zip(&mut row.m).zip(&mut row.v);
        for (((value, m), v), &grad) in state.zip(grad) {
            let grad = grad * scale;
            *m = beta1 * *m + rest1 * grad;
            *v = beta2 * *v + rest2 * grad * grad;
            *value = decay * *value - step_size * *m / (v.sqrt() * v_scale + eps);
        }
    }
}

/// What to multiply a gradient with so that its L2 norm is at most `clip`. Sums in f64 and in a
/// fixed order.
fn clip_scale(grad: &[f32], clip: f64) -> f32 {
    let norm = squared_norm(grad).sqrt();
    if norm > clip { (clip / norm) as f32 } else { 1.0 }
}

/// The sum of squares in 16 partial sums, which the compiler keeps in vector registers.
pub fn squared_norm(values: &[f32]) -> f64 {
    let (chunks, rest) = values.as_chunks::<16>();
    let mut sums = [0f64; 16];
    for chunk in chunks {
        for (sum, &value) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(value) * f64::from(value);
        }
    }
    for (sum, &value) in sums.iter_mut().zip(rest) {
        *sum += f64::from(value) * f64::from(value);
    }
    sums.iter().sum()
}
