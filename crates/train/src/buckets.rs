//! The gradients of the anchor, summed over all workers while the backward pass goes on.
//!
//! A layer's are sent as soon as they are computed, several tensors at a time, so that what is sent and the layers
//! below take the same time. All workers make the same model's gradients in the same order, hence the same buckets.

use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, channel};

use anchor::Gradients;
use candle_core::Tensor;
use collective::{Call, Engine, Leaves, Mesh, TreeSum, all_reduce};

use crate::Result;
use crate::metrics::Laps;

/// Numbers that are summed at once: few enough to be sent soon, and enough to be sent fast.
pub(crate) const BUCKET: usize = 1 << 22;

/// What the gradients of a step go through.
pub(crate) struct Buckets<'a> {
    pub(crate) mesh: &'a mut Mesh,
    pub(crate) engine: &'a mut Engine,
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
                let sums = match self.engine {
                    Engine::Tcp => self.sum_by_workers(&slots, &last)?,
                    #[cfg(feature = "nccl")]
                    Engine::Nccl(_) => self.sum_on_devices(&slots, &last)?,
                };
                slots.into_iter().zip(sums).for_each(|(slot, sum)| total.set(slot, sum));
                (slots, last, len) = (vec![], vec![], 0);
            }
        }
        #[cfg(feature = "nccl")]
        if let Engine::Nccl(nccl) = self.engine {
            nccl.finish(self.mesh, &self.call)?;
        }
        Ok(total)
    }

    /// Of a bucket's slots, with what the last micro-batch gave them.
    fn sum_by_workers(&mut self, slots: &[usize], last: &[Tensor]) -> Result<Vec<Tensor>> {
        let own = self.leaves.of(self.mesh.rank());
        let mut sum = TreeSum::new(self.leaves.n, own.clone());
        for (leaves, gradients) in &mut self.before {
            sum.push_array(leaves.clone(), flat(&take(gradients, slots)?)?);
        }
        sum.push_array(own.end - 1..own.end, flat(last)?);
        let parts = sum.finish_arrays();
        let parts: Vec<&[f32]> = parts.iter().map(|(_, values)| values.as_slice()).collect();
        let mut sum = vec![0.0; last.iter().map(Tensor::elem_count).sum()];
        all_reduce(self.mesh, &self.call, self.leaves, &parts, &mut sum)?;
        let mut rest = sum.as_slice();
        let part = |like: &Tensor| {
            let (values, after) = rest.split_at(like.elem_count());
            rest = after;
            Ok(Tensor::from_slice(values, like.shape(), like.device())?)
        };
        last.iter().map(part).collect()
    }

    /// As [`Buckets::sum_by_workers`]; they are made while the computation goes on.
    #[cfg(feature = "nccl")]
    fn sum_on_devices(&mut self, slots: &[usize], last: &[Tensor]) -> Result<Vec<Tensor>> {
        let mut sums = last.to_vec();
        // In the order of one worker, whose last sums are its largest.
        for (_, gradients) in self.before.iter_mut().rev() {
            let before = take(gradients, slots)?;
            sums = before.iter().zip(&sums).map(|(a, b)| a + b).collect::<candle_core::Result<_>>()?;
        }
        let arrays = sums.clone();
        if let Engine::Nccl(nccl) = self.engine {
            nccl.enqueue(move |group| {
                let sum = |array: &Tensor| array.inplace_op1(&SumOnDevices(group));
                arrays.iter().try_for_each(sum).map_err(|error| error.to_string())
            });
        }
        Ok(sums)
    }
}

/// The gradients of some slots.
fn take(gradients: &mut Gradients, slots: &[usize]) -> Result<Vec<Tensor>> {
    let missing = || candle_core::Error::Msg("micro-batches led to different parameters".into());
    let take = |&slot: &usize| gradients.take(slot).ok_or_else(missing);
    Ok(slots.iter().map(take).collect::<candle_core::Result<_>>()?)
}

/// A sum over all workers in place of a tensor.
#[cfg(feature = "nccl")]
struct SumOnDevices<'a>(&'a collective::Group<'a>);

#[cfg(feature = "nccl")]
impl candle_core::InplaceOp1 for SumOnDevices<'_> {
    fn name(&self) -> &'static str {
        "sum over workers"
    }

    fn cpu_fwd(&self, _: &mut candle_core::CpuStorage, _: &candle_core::Layout) -> candle_core::Result<()> {
        candle_core::bail!("NCCL sums arrays on GPUs, and this one is in the host's memory")
    }

    fn cuda_fwd(
        &self,
        storage: &mut candle_core::CudaStorage,
        layout: &candle_core::Layout,
    ) -> candle_core::Result<()> {
        let array = storage.as_cuda_slice_mut::<f32>()?;
        if layout.contiguous_offsets() != Some((0, array.len())) {
            candle_core::bail!("NCCL sums whole arrays, and this is a part of one: {layout:?}");
        }
        self.0.sum(array).map_err(candle_core::Error::Msg)
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
