//! The gradients of the anchor, summed over all workers while the backward pass goes on.
//!
//! A layer's are sent as soon as they are computed, several tensors at a time, so that what is sent and the layers
//! below take the same time. All workers make the same model's gradients in the same order, hence the same buckets.

use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, channel};

use anchor::Gradients;
use candle_core::Tensor;
use collective::{Call, Leaves, Mesh, TreeSum, all_reduce};

use crate::Result;
use crate::metrics::Laps;

/// Numbers that are summed at once: few enough to be sent soon, and enough to be sent fast.
pub(crate) const BUCKET: usize = 1 << 22;

/// What the gradients of a step go through.
pub(crate) struct Buckets<'a> {
    pub(crate) mesh: &'a mut Mesh,
    /// Of the step.
    pub(crate) call: Call,
    /// All micro-batches.
    pub(crate) leaves: Leaves,
    /// What this worker's micro-batches before its last one have added up to.
    pub(crate) before: Vec<(Range<usize>, Gradients)>,
    /// Parameters of the model.
    pub(crate) n_parameters: usize,
    /// Numbers of a bucket at least.
    pub(crate) size: usize,
}

impl Buckets<'_> {
    /// Sums gradients behind `backward`, which computes those of this worker's last micro-batch. Returns the sums
    /// by slot with what `backward` does, and for how many milliseconds they were waited for after it.
    ///
    /// # Errors
    /// Those of `backward`, of which nobody else learns by this, and those of the sums.
    pub(crate) fn reduce_behind<T>(
        self,
        backward: impl FnOnce(Gradients) -> Result<T>,
    ) -> Result<(Gradients, T, f64)> {
        let (finished, arriving) = channel();
        std::thread::scope(|scope| {
            let reducing = scope.spawn(|| self.reduce(arriving));
            // It owns the gradients, so that the other thread sees their end.
            let done = backward(Gradients::leaving_to(finished));
            let mut laps = Laps::start();
            let total = reducing.join().unwrap_or_else(|panic| resume_unwind(panic));
            let done = done?;
            Ok((total?, done, laps.lap_ms()))
        })
    }

    /// Sums gradients as they arrive. When they end early, as their computation failed, the rest is left.
    fn reduce(mut self, arriving: Receiver<(usize, Tensor)>) -> Result<Gradients> {
        let mut total = Gradients::default();
        let (mut slots, mut last, mut len, mut n_arrived) = (vec![], vec![], 0, 0);
        for (slot, gradient) in arriving {
            n_arrived += 1;
            len += gradient.elem_count();
            slots.push(slot);
            last.push(gradient);
            if len >= self.size || n_arrived == self.n_parameters {
                self.reduce_bucket((&slots, &last), &mut total)?;
                (slots, last, len) = (vec![], vec![], 0);
            }
        }
        Ok(total)
    }

    fn reduce_bucket(&mut self, (slots, last): (&[usize], &[Tensor]), total: &mut Gradients) -> Result<()> {
        let own = self.leaves.of(self.mesh.rank());
        let mut sum = TreeSum::new(self.leaves.n, own.clone());
        for (leaves, gradients) in &mut self.before {
            let missing = || candle_core::Error::Msg("micro-batches led to different parameters".into());
            let take = |&slot: &usize| gradients.take(slot).ok_or_else(missing);
            let before = slots.iter().map(take).collect::<candle_core::Result<Vec<_>>>()?;
            sum.push_array(leaves.clone(), flat(&before)?);
        }
        sum.push_array(own.end - 1..own.end, flat(last)?);
        let parts = sum.finish_arrays();
        let parts: Vec<&[f32]> = parts.iter().map(|(_, values)| values.as_slice()).collect();
        let mut sum = vec![0.0; last.iter().map(Tensor::elem_count).sum()];
        all_reduce(self.mesh, &self.call, self.leaves, &parts, &mut sum)?;
        let mut rest = sum.as_slice();
        for (&slot, like) in slots.iter().zip(last) {
            let (values, after) = rest.split_at(like.elem_count());
            total.set(slot, Tensor::from_slice(values, like.shape(), like.device())?);
            rest = after;
        }
        Ok(())
    }
}

/// The numbers of several tensors, one after the other.
fn flat(tensors: &[Tensor]) -> Result<Vec<f32>> {
    let mut values = Vec::with_capacity(tensors.iter().map(Tensor::elem_count).sum());
    for tensor in tensors {
        values.extend(tensor.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(values)
}

#[cfg(test)]
mod tests;
