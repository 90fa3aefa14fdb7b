use std::sync::Arc;

use half::bf16;
use multiversion::multiversion;
use serde::{Deserialize, Serialize};

use crate::row::Loaded;
use crate::schedule::setting;
use crate::{Result, Schedule, Values};

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

    /// One update of a block by its gradients, summed in their order, in one pass over the block:
    /// gradients are widened and summed a piece at a time, on the way.
    pub(crate) fn update(&self, row: &mut Loaded, gradients: &[Values], step: u64) {
        row.steps += 1;
        let t = row.steps as f64;
        let rate = self.schedule.at(step);
        let mut piece = [0f32; PIECE];
        let numbers = Numbers {
            beta1: self.beta1 as f32,
            rest1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            rest2: (1.0 - self.beta2) as f32,
            decay: (1.0 - rate * self.weight_decay) as f32,
            step_size: (rate / (1.0 - self.beta1.powf(t))) as f32,
            v_scale: (1.0 / (1.0 - self.beta2.powf(t)).sqrt()) as f32,
            eps: self.eps as f32,
            scale: self.clip.map_or(1.0, |clip| clip_scale(gradients, row.values.len(), clip)),
        };
        // What a fetch or a snapshot still holds stays as it was: then these copy.
        let values = Arc::make_mut(&mut row.values).chunks_mut(PIECE);
        let moments =
            Arc::make_mut(&mut row.m).chunks_mut(PIECE).zip(Arc::make_mut(&mut row.v).chunks_mut(PIECE));
        for (i, (values, (m, v))) in values.zip(moments).enumerate() {
            let gradient = sum(gradients, i * PIECE, &mut piece[..values.len()]);
            update_piece(&numbers, [values, m, v], gradient);
        }
    }
}

/// Parameters updated at a time: their gradients stay in the first-level cache while they are summed.
const PIECE: usize = 2048;

/// The numbers of one block's update, the same for each of its parameters.
struct Numbers {
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    /// What weight decay leaves of a weight.
    decay: f32,
    /// Learning rate with the correction of the first moment.
    step_size: f32,
    /// Root of the correction of the second moment.
    v_scale: f32,
    eps: f32,
    /// Factor on the gradient.
    scale: f32,
}

/// Compiled for several vector widths, of which the processor's widest runs. No product is fused
/// with a sum, so all give the same bits.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2"))]
fn update_piece(numbers: &Numbers, [values, m, v]: [&mut [f32]; 3], gradient: &[f32]) {
    let Numbers { beta1, rest1, beta2, rest2, decay, step_size, v_scale, eps, scale } = *numbers;
    let state = values.iter_mut().zip(m).zip(v);
    for (((value, m), v), &gradient) in state.zip(gradient) {
        let gradient = gradient * scale;
        *m = beta1 * *m + rest1 * gradient;
        *v = beta2 * *v + rest2 * gradient * gradient;
        *value = decay * *value - step_size * *m / (v.sqrt() * v_scale + eps);
    }
}

/// The sum over ranks of one piece of a block's gradients, from value `start` on. One f32 gradient
/// is its own sum, and is not copied.
fn sum<'a>(gradients: &'a [Values], start: usize, piece: &'a mut [f32]) -> &'a [f32] {
    let range = start..start + piece.len();
    match gradients {
        [Values::F32(values)] => return &values[range],
        [first, rest @ ..] => {
            match first {
                Values::F32(values) => piece.copy_from_slice(&values[range.clone()]),
                Values::Bf16(values) => widen(&values[range.clone()], piece),
            }
            for gradient in rest {
                match gradient {
                    Values::F32(values) => add(&values[range.clone()], piece),
                    Values::Bf16(values) => add_bf16(&values[range.clone()], piece),
                }
            }
        }
        [] => piece.fill(0.0),
    }
    piece
}

/// A bf16 is the upper half of an f32.
fn wide(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2"))]
fn widen(from: &[bf16], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, &from)| *to = wide(from));
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2"))]
fn add(values: &[f32], to: &mut [f32]) {
    to.iter_mut().zip(values).for_each(|(to, &value)| *to += value);
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2"))]
fn add_bf16(values: &[bf16], to: &mut [f32]) {
    to.iter_mut().zip(values).for_each(|(to, &value)| *to += wide(value));
}

/// What to multiply a summed gradient with so that its L2 norm is at most `clip`.
fn clip_scale(gradients: &[Values], len: usize, clip: f64) -> f32 {
    let (mut sums, mut piece) = ([0f64; LANES], [0f32; PIECE]);
    for start in (0..len).step_by(PIECE) {
        let n = PIECE.min(len - start);
        add_squares(sum(gradients, start, &mut piece[..n]), &mut sums);
    }
    let norm = sums.iter().sum::<f64>().sqrt();
    if norm > clip { (clip / norm) as f32 } else { 1.0 }
}

/// Partial sums of [`squared_norm`], which the compiler keeps in vector registers.
const LANES: usize = 16;
const _: () = assert!(PIECE.is_multiple_of(LANES), "the sum of pieces is that of the whole");

/// The sum of squares, in f64 and in a fixed order.
pub fn squared_norm(values: &[f32]) -> f64 {
    let mut sums = [0f64; LANES];
    add_squares(values, &mut sums);
    sums.iter().sum()
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2"))]
fn add_squares(values: &[f32], sums: &mut [f64; LANES]) {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut partial = *sums;
    for chunk in chunks {
        for (sum, &value) in partial.iter_mut().zip(chunk) {
            *sum += f64::from(value) * f64::from(value);
        }
    }
    for (sum, &value) in partial.iter_mut().zip(rest) {
        *sum += f64::from(value) * f64::from(value);
    }
    *sums = partial;
}
