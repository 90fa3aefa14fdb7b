//! The tape: what was computed, so that it can be gone through backward.
//!
//! Beside candle's own autograd it writes each gradient once into its place (nothing is zeroed to be added
//! to), frees an activation as soon as its gradient is known, keeps the buffers of parameter gradients from
//! step to step, and can recompute a part instead of keeping its activations ([`Tape::checkpoint`]).

use candle_core::{Result, Tensor, Var};
use rayon::prelude::*;

use crate::Precision;
use crate::buffer::{output, read, tensor, with_mut};
use crate::gemm::Into;

/// A tensor and the slot of its gradient; without a slot it is a constant.
#[derive(Clone, Debug)]
pub struct Traced {
    value: Tensor,
    slot: Option<usize>,
}

impl Traced {
    /// A tensor that no gradient flows to.
    pub fn constant(value: Tensor) -> Self {
        Self { value, slot: None }
    }

    /// A parameter, whose gradient is kept in `slot` of [`Gradients`] after the backward pass.
    pub fn leaf(value: Tensor, slot: usize) -> Self {
        Self { value, slot: Some(slot) }
    }

    /// The tensor.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Whether no gradient flows to it.
    pub fn is_constant(&self) -> bool {
        self.slot.is_none()
    }
}

/// Gradients by slot. Backward passes add to what a slot holds, until [`Gradients::clear`].
#[derive(Default)]
pub struct Gradients {
    slots: Vec<Slot>,
}

#[derive(Default)]
struct Slot {
    tensor: Option<Tensor>,
    /// Whether the tensor is a gradient, or only a buffer to write the next one to.
    filled: bool,
}

impl Gradients {
    /// The gradient in a slot; `None` when no operation led to it.
    pub fn get(&self, slot: usize) -> Option<&Tensor> {
        self.slots.get(slot).filter(|slot| slot.filled)?.tensor.as_ref()
    }

    /// Takes the gradient out of its slot.
    pub fn take(&mut self, slot: usize) -> Option<Tensor> {
        let slot = self.slots.get_mut(slot).filter(|slot| slot.filled)?;
        slot.filled = false;
        slot.tensor.take()
    }

    /// Forgets all gradients, but keeps their buffers.
    pub fn clear(&mut self) {
        self.slots.iter_mut().for_each(|slot| slot.filled = false);
    }

    fn slot(&mut self, index: usize) -> &mut Slot {
        if self.slots.len() <= index {
            self.slots.resize_with(index + 1, Slot::default);
        }
        &mut self.slots[index]
    }

    /// Adds a gradient, or moves it in when it is the first. It must not be used elsewhere afterwards.
    pub(crate) fn give(&mut self, to: &Traced, gradient: Tensor) -> Result<()> {
        let Some(index) = to.slot else { return Ok(()) };
        let slot = self.slot(index);
        let sum = match slot.tensor.take().filter(|_| slot.filled) {
            Some(sum) if crate::fused(&sum) => {
                let gradient = read(&gradient)?;
                with_mut(&sum, |sum| add(sum, &gradient))?;
                sum
            }
            Some(sum) => (sum + gradient)?,
            None => gradient,
        };
        *slot = Slot { tensor: Some(sum), filled: true };
        Ok(())
    }

    /// The f32 CPU buffer to write the gradient of `to` into and whether it is to be added to what is there;
    /// `None` for a constant.
    pub(crate) fn buffer(&mut self, to: &Traced) -> Result<Option<(Tensor, Into)>> {
        let Some(index) = to.slot else { return Ok(None) };
        let slot = self.slot(index);
        let into = if slot.filled { Into::Add } else { Into::Overwrite };
        let buffer = match slot.tensor.take() {
            Some(buffer) if buffer.dims() == to.value.dims() => buffer,
            _ => tensor(output(to.value.elem_count()), to.value.shape())?,
        };
        *slot = Slot { tensor: Some(buffer.clone()), filled: true };
        Ok(Some((buffer, into)))
    }

    /// [`Gradients::buffer`] of another type, on the device of `to`.
    #[cfg(feature = "cuda")]
    pub(crate) fn device_buffer(
        &mut self,
        to: &Traced,
        dtype: candle_core::DType,
    ) -> Result<Option<(Tensor, Into)>> {
        let Some(index) = to.slot else { return Ok(None) };
        let slot = self.slot(index);
        let into = if slot.filled { Into::Add } else { Into::Overwrite };
        let buffer = match slot.tensor.take() {
            Some(buffer) if buffer.dims() == to.value.dims() && buffer.dtype() == dtype => buffer,
            // SAFETY: who asks for a buffer writes all of it.
            _ => unsafe { Tensor::empty(to.value.shape(), dtype, to.value.device())? },
        };
        *slot = Slot { tensor: Some(buffer.clone()), filled: true };
        Ok(Some((buffer, into)))
    }

    /// Runs `write` on the buffer of [`Gradients::buffer`].
    pub(crate) fn write(&mut self, to: &Traced, write: impl FnOnce(&mut [f32], Into) + Send) -> Result<()> {
        match self.buffer(to)? {
            Some((buffer, into)) => with_mut(&buffer, |buffer| write(buffer, into)),
            None => Ok(()),
        }
    }
}

/// sum += x
fn add(sum: &mut [f32], x: &[f32]) {
    const CHUNK: usize = 16_384;
    sum.par_chunks_mut(CHUNK)
        .zip(x.par_chunks(CHUNK))
        .for_each(|(sum, x)| sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x));
}

/// From the gradient of an operation's output to those of its inputs.
type Backward = Box<dyn FnOnce(Tensor, &mut Gradients) -> Result<()>>;

/// Operations in the order they were done.
pub struct Tape<'g> {
    precision: Precision,
    /// None: nothing is recorded.
    gradients: Option<&'g mut Gradients>,
    next_slot: usize,
    operations: Vec<(usize, Backward)>,
}

impl<'g> Tape<'g> {
    /// A tape that records nothing: for inference.
    pub fn off(precision: Precision) -> Self {
        Self { precision, gradients: None, next_slot: 0, operations: vec![] }
    }

    /// A tape whose backward pass adds to `gradients`; the slots below `n_leaves` are the parameters'.
    pub fn recording(precision: Precision, gradients: &'g mut Gradients, n_leaves: usize) -> Self {
        Self { precision, gradients: Some(gradients), next_slot: n_leaves, operations: vec![] }
    }

    /// How matrix products are made.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Whether an operation on these has to keep what its backward needs.
    pub(crate) fn records(&self, inputs: &[&Traced]) -> bool {
        self.gradients.is_some() && inputs.iter().any(|input| !input.is_constant())
    }

    /// Where gradients go, for an operation that makes them in its forward; `None` when nothing is recorded.
    pub(crate) fn gradients(&mut self) -> Option<&mut Gradients> {
        self.gradients.as_deref_mut()
    }

    /// The output of an operation whose backward is `backward`.
    pub(crate) fn record(
        &mut self,
        value: Tensor,
        backward: impl FnOnce(Tensor, &mut Gradients) -> Result<()> + 'static,
    ) -> Traced {
        let slot = self.next_slot;
        self.next_slot += 1;
        self.operations.push((slot, Box::new(backward)));
        Traced { value, slot: Some(slot) }
    }

    /// `f(x)` whose activations are not kept: the backward pass computes them again (Chen et al.,
    /// arXiv 1604.06174).
    ///
    /// # Errors
    /// Those of `f`.
    pub fn checkpoint(
        &mut self,
        x: &Traced,
        f: impl Fn(&mut Tape, &Traced) -> Result<Traced> + 'static,
    ) -> Result<Traced> {
        if self.gradients.is_none() {
            return f(self, x);
        }
        let precision = self.precision;
        let y = f(&mut Tape::off(precision), x)?.value;
        let x = x.clone();
        Ok(self.record(y, move |dy, gradients| {
            let n_slots = gradients.slots.len();
            let mut tape = Tape::recording(precision, gradients, n_slots);
            let y = f(&mut tape, &x)?;
            tape.seed(&y, dy)?;
            tape.backward()?;
            gradients.slots.truncate(n_slots);
            Ok(())
        }))
    }

    /// An operation made of candle's differentiable ones: the body for types and devices that have no fused
    /// one, and in f64 the reference of those that have.
    pub(crate) fn composed(
        &mut self,
        inputs: &[&Traced],
        f: impl FnOnce(&[Tensor]) -> Result<Tensor>,
    ) -> Result<Traced> {
        if !self.records(inputs) {
            let values: Vec<Tensor> = inputs.iter().map(|input| input.value.detach()).collect();
            return Ok(Traced::constant(f(&values)?));
        }
        let variable = |input: &&Traced| Ok(Var::from_tensor(&input.value.detach())?.into_inner());
        let variables: Vec<Tensor> = inputs.iter().map(variable).collect::<Result<_>>()?;
        let y = f(&variables)?;
        let inputs: Vec<Traced> = inputs.iter().map(|&input| input.clone()).collect();
        Ok(self.record(y.detach(), move |dy, gradients| {
            let store = (y * dy)?.sum_all()?.backward()?;
            for (input, variable) in inputs.iter().zip(&variables) {
                if let Some(gradient) = store.get(variable) {
                    gradients.give(input, gradient.clone())?;
                }
            }
            Ok(())
        }))
    }

    /// Sets the gradient of an output, from which the backward pass begins.
    ///
    /// # Errors
    /// When a second gradient of another shape is given to the same output.
    pub fn seed(&mut self, output: &Traced, gradient: Tensor) -> Result<()> {
        match self.gradients() {
            Some(gradients) => gradients.give(output, gradient.contiguous()?),
            None => Ok(()),
        }
    }

    /// Goes through the operations backward, from the gradients that outputs were given.
    ///
    /// # Errors
    /// Those of the operations.
    pub fn backward(self) -> Result<()> {
        let Some(gradients) = self.gradients else { return Ok(()) };
        for (slot, backward) in self.operations.into_iter().rev() {
            if let Some(dy) = gradients.take(slot) {
                backward(dy, gradients)?;
            }
        }
        Ok(())
    }
}
