//! The tape: what was computed, so that it can be gone through backward.
//!
//! Beside candle's own autograd it writes each gradient once into its place (nothing is zeroed to be added
//! to), frees an activation as soon as its gradient is known, and can recompute a part instead of keeping its
//! activations ([`Tape::checkpoint`]).

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Result, Shape, Tensor, Var};
use rayon::prelude::*;

use crate::Precision;
use crate::buffer::{output, read, tensor, with_mut};
use crate::gemm::Write;

/// A tensor and the slot of its gradient; without a slot it is a constant.
#[derive(Clone)]
pub struct Traced {
    value: Tensor,
    slot: Option<usize>,
    again: Option<Arc<Again>>,
}

/// Something that a gradient flows to.
pub(crate) trait Receiver {
    /// None: it is a constant.
    fn slot(&self) -> Option<usize>;
    fn shape(&self) -> &Shape;
    #[cfg(feature = "cuda")]
    fn device(&self) -> &candle_core::Device;
}

impl Receiver for Traced {
    fn slot(&self) -> Option<usize> {
        self.slot
    }
    fn shape(&self) -> &Shape {
        self.value.shape()
    }
    #[cfg(feature = "cuda")]
    fn device(&self) -> &candle_core::Device {
        self.value.device()
    }
}

/// What is left of a [`Traced`] whose values are not kept.
pub(crate) struct Place {
    slot: Option<usize>,
    shape: Shape,
    #[cfg(feature = "cuda")]
    device: candle_core::Device,
}

impl Receiver for Place {
    fn slot(&self) -> Option<usize> {
        self.slot
    }
    fn shape(&self) -> &Shape {
        &self.shape
    }
    #[cfg(feature = "cuda")]
    fn device(&self) -> &candle_core::Device {
        &self.device
    }
}

/// How to compute a tensor once more.
pub(crate) struct Again {
    make: Box<dyn Fn() -> Result<Tensor> + Send + Sync>,
    /// The tensor, from the first use in the backward pass to the last.
    made: Mutex<Option<Tensor>>,
}

/// An operand that a backward pass will need: kept, or where that is cheap computed again.
pub(crate) enum Kept {
    Value(Tensor),
    Again(Arc<Again>),
}

impl Kept {
    pub(crate) fn value(&self) -> Result<Tensor> {
        let again = match self {
            Self::Value(value) => return Ok(value.clone()),
            Self::Again(again) => again,
        };
        let mut made = again.made.lock().unwrap_or_else(PoisonError::into_inner);
        match &*made {
            Some(value) => Ok(value.clone()),
            None => Ok(made.insert((again.make)()?).clone()),
        }
    }
}

impl std::fmt::Debug for Traced {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Traced").field("value", &self.value).field("slot", &self.slot).finish()
    }
}

impl Traced {
    /// A tensor that no gradient flows to.
    pub fn constant(value: Tensor) -> Self {
        Self { value, slot: None, again: None }
    }

    /// A parameter, whose gradient is kept in `slot` of [`Gradients`] after the backward pass. Slots of parameters
    /// are below the `n_leaves` of their tape.
    pub fn leaf(value: Tensor, slot: usize) -> Self {
        Self { value, slot: Some(slot), again: None }
    }

    /// The same tensor, which backward passes compute again by `make` instead of keeping it.
    pub(crate) fn made_again_by(self, make: impl Fn() -> Result<Tensor> + Send + Sync + 'static) -> Self {
        Self { again: Some(Arc::new(Again { make: Box::new(make), made: Mutex::new(None) })), ..self }
    }

    /// The tensor for a backward pass.
    pub(crate) fn keep(&self) -> Kept {
        match &self.again {
            Some(again) => Kept::Again(again.clone()),
            None => Kept::Value(self.value.clone()),
        }
    }

    /// Where its gradient goes, without its values.
    pub(crate) fn place(&self) -> Place {
        Place {
            slot: self.slot,
            shape: self.value.shape().clone(),
            #[cfg(feature = "cuda")]
            device: self.value.device().clone(),
        }
    }

    /// The tensor.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// The slot of its gradient, alone; empty for a constant.
    pub fn slots(&self) -> Range<usize> {
        self.slot.map_or(0..0, |slot| slot..slot + 1)
    }

    /// Whether no gradient flows to it.
    pub fn is_constant(&self) -> bool {
        self.slot.is_none()
    }
}

/// Gradients by slot. Backward passes add to what a slot holds, until [`Gradients::clear`].
#[derive(Default)]
pub struct Gradients {
    slots: Vec<Option<Tensor>>,
    finished: Option<Sender<(usize, Tensor)>>,
}

impl Gradients {
    /// Gradients that leave their slots while the backward pass goes on: one by one to `finished`, with the slot,
    /// once nothing more is added to them ([`Tape::leaves_end`]), in the same order for every pass of a model.
    pub fn leaving_to(finished: Sender<(usize, Tensor)>) -> Self {
        Self { slots: vec![], finished: Some(finished) }
    }

    /// The gradient in a slot; `None` when no operation led to it. The next pass changes the tensor in place.
    pub fn get(&self, slot: usize) -> Option<&Tensor> {
        self.slots.get(slot)?.as_ref()
    }

    /// Puts another gradient in its place.
    pub fn set(&mut self, slot: usize, gradient: Tensor) {
        *self.slot(slot) = Some(gradient);
    }

    /// Adds those of another pass.
    ///
    /// # Errors
    /// When a slot's tensors are of different shapes.
    pub fn add(&mut self, other: Gradients) -> Result<()> {
        for (index, gradient) in other.slots.into_iter().enumerate() {
            let Some(gradient) = gradient else { continue };
            let slot = self.slot(index);
            *slot = Some(match slot.take() {
                Some(sum) => added(sum, gradient)?,
                None => gradient,
            });
        }
        Ok(())
    }

    /// Takes the gradient out of its slot.
    pub fn take(&mut self, slot: usize) -> Option<Tensor> {
        self.slots.get_mut(slot)?.take()
    }

    /// Forgets all gradients. Their memory is what the next forward pass needs for its activations, so that a step
    /// never holds all of both.
    pub fn clear(&mut self) {
        self.slots.clear();
    }

    /// Lets those of some slots go.
    fn finish(&mut self, slots: Range<usize>) {
        for slot in slots.start..slots.end.min(self.slots.len()) {
            if let Some(gradient) = self.take(slot) {
                self.let_go(slot, gradient);
            }
        }
    }

    /// Sends a gradient to who waits for it, if somebody does.
    pub fn let_go(&self, slot: usize, gradient: Tensor) {
        if let Some(finished) = &self.finished {
            // Who waits no longer has failed, and says so itself.
            let _ = finished.send((slot, gradient));
        }
    }

    fn slot(&mut self, index: usize) -> &mut Option<Tensor> {
        if self.slots.len() <= index {
            self.slots.resize(index + 1, None);
        }
        &mut self.slots[index]
    }

    /// Adds a gradient, or moves it in when it is the first. It must not be used elsewhere afterwards.
    pub(crate) fn give(&mut self, to: &impl Receiver, gradient: Tensor) -> Result<()> {
        let Some(index) = to.slot() else { return Ok(()) };
        if gradient.shape() != to.shape() {
            candle_core::bail!("a gradient of {:?} for a tensor of {:?}", gradient.dims(), to.shape().dims());
        }
        let slot = self.slot(index);
        *slot = Some(match slot.take() {
            Some(sum) => added(sum, gradient)?,
            None => gradient,
        });
        Ok(())
    }

    /// The f32 CPU buffer to write the gradient of `to` into and whether it is to be added to what is there;
    /// `None` for a constant.
    pub(crate) fn buffer(&mut self, to: &impl Receiver) -> Result<Option<(Tensor, Write)>> {
        let Some(index) = to.slot() else { return Ok(None) };
        match self.slot(index) {
            Some(sum) if sum.shape() == to.shape() => Ok(Some((sum.clone(), Write::Add))),
            Some(other) => mismatch(other, to),
            empty => {
                let buffer = tensor(output(to.shape().elem_count()), to.shape())?;
                *empty = Some(buffer.clone());
                Ok(Some((buffer, Write::Over)))
            }
        }
    }

    /// [`Gradients::buffer`] of another type, on the device of `to`.
    #[cfg(feature = "cuda")]
    pub(crate) fn device_buffer(
        &mut self,
        to: &impl Receiver,
        dtype: candle_core::DType,
    ) -> Result<Option<(Tensor, Write)>> {
        let Some(index) = to.slot() else { return Ok(None) };
        match self.slot(index) {
            Some(sum) if sum.shape() == to.shape() && sum.dtype() == dtype => {
                Ok(Some((sum.clone(), Write::Add)))
            }
            Some(other) => mismatch(other, to),
            empty => {
                // SAFETY: who asks for a buffer writes all of it.
                let buffer = unsafe { Tensor::empty(to.shape(), dtype, to.device())? };
                *empty = Some(buffer.clone());
                Ok(Some((buffer, Write::Over)))
            }
        }
    }

    /// Runs `write` on the buffer of [`Gradients::buffer`].
    pub(crate) fn write(
        &mut self,
        to: &impl Receiver,
        write: impl FnOnce(&mut [f32], Write) + Send,
    ) -> Result<()> {
        match self.buffer(to)? {
            Some((buffer, into)) => with_mut(&buffer, |buffer| write(buffer, into)),
            None => Ok(()),
        }
    }
}

/// Whether two of these would write their gradients to one slot at the same time.
pub(crate) fn repeat_a_slot<'a>(inputs: impl IntoIterator<Item = &'a Traced>) -> bool {
    let mut seen = BTreeSet::new();
    !inputs.into_iter().filter_map(|input| input.slot).all(|slot| seen.insert(slot))
}

fn mismatch<T>(found: &Tensor, to: &impl Receiver) -> Result<T> {
    candle_core::bail!("a gradient {found:?} is there already for a tensor of {:?}", to.shape())
}

/// The sum of two gradients, in the place of the first where that can be.
fn added(sum: Tensor, gradient: Tensor) -> Result<Tensor> {
    if sum.shape() != gradient.shape() || !crate::fused(&sum) {
        return sum + gradient;
    }
    {
        let gradient = read(&gradient)?;
        with_mut(&sum, |sum| add(sum, &gradient))?;
    }
    Ok(sum)
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

/// What the backward pass does.
enum Operation {
    /// Takes the gradient in the slot of an output to the inputs.
    Backward(usize, Backward),
    /// Lets the gradients of these leaves go.
    Finish(Range<usize>),
}

/// Operations in the order they were done.
pub struct Tape<'g> {
    precision: Precision,
    /// None: nothing is recorded.
    gradients: Option<&'g mut Gradients>,
    next_slot: usize,
    operations: Vec<Operation>,
}

impl<'g> Tape<'g> {
    /// A tape that records nothing: for inference.
    pub fn off(precision: Precision) -> Self {
        Self { precision, gradients: None, next_slot: 0, operations: vec![] }
    }

    /// A tape whose backward pass adds to `gradients`; the slots below `n_leaves` are the parameters'.
    pub fn recording(precision: Precision, gradients: &'g mut Gradients, n_leaves: usize) -> Self {
        // What a tape that was given up left behind.
        gradients.slots.truncate(n_leaves);
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
        self.operations.push(Operation::Backward(slot, Box::new(backward)));
        Traced { value, slot: Some(slot), again: None }
    }

    /// Says that no operation recorded before this leads to the leaves of these slots: the backward pass has
    /// their gradients once it comes here.
    pub fn leaves_end(&mut self, slots: Range<usize>) {
        if self.gradients.as_ref().is_some_and(|gradients| gradients.finished.is_some()) {
            self.operations.push(Operation::Finish(slots));
        }
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
            if let Some(gradients) = tape.gradients() {
                gradients.give(&y, dy)?;
            }
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
    /// When the gradient has another shape than the output.
    pub fn seed(&mut self, output: &Traced, gradient: &Tensor) -> Result<()> {
        match self.gradients() {
            // A copy, since gradients are changed in place.
            Some(gradients) => gradients.give(output, gradient.contiguous()?.copy()?),
            None => Ok(()),
        }
    }

    /// Goes through the operations backward, from the gradients that outputs were given.
    ///
    /// # Errors
    /// Those of the operations.
    pub fn backward(self) -> Result<()> {
        let Some(gradients) = self.gradients else { return Ok(()) };
        for operation in self.operations.into_iter().rev() {
            match operation {
                Operation::Backward(slot, backward) => {
                    if let Some(dy) = gradients.take(slot) {
                        backward(dy, gradients)?;
                    }
                }
                Operation::Finish(slots) => gradients.finish(slots),
            }
        }
        Ok(())
    }
}
