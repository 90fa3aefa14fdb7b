//! Access to candle's CPU storage as slices, and uninitialised outputs.

use candle_core::{CpuStorage, Device, Layout, Result, Storage, Tensor};

/// The values of a contiguous f32 operand of a custom op.
pub(crate) fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("a fused op was given a strided tensor of shape {:?}", layout.shape()),
    }
}

/// Runs `f` on the values of an f32 CPU tensor (copied first if it is strided).
pub(crate) fn with<R>(t: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let t = t.contiguous()?;
    let (storage, layout) = t.storage_and_layout();
    match &*storage {
        Storage::Cpu(cpu) => Ok(f(values(cpu, layout)?)),
        _ => candle_core::bail!("a fused CPU op was given a tensor on {:?}", t.device()),
    }
}

/// A CPU tensor over `values`, shaped like `like`.
pub(crate) fn tensor_like(values: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(values, like.shape(), &Device::Cpu)
}

/// An output buffer whose pages are not touched before the op writes them (zeroing every output costs
/// up to a quarter of a training step).
pub(crate) fn output(len: usize) -> Vec<f32> {
    let mut buffer = Vec::with_capacity(len);
    // SAFETY: the capacity is `len`, f32 has no drop, and every op in this crate checks its shapes and
    // then writes each element before anything reads it, which is what is relied on here.
    #[allow(clippy::uninit_vec)]
    unsafe {
        buffer.set_len(len)
    };
    buffer
}

/// A raw pointer that tasks share to write disjoint elements of one output.
#[derive(Clone, Copy)]
pub(crate) struct Shared(*mut f32);

// SAFETY: a `Shared` is only a pointer; each use states why the elements it reaches are its own.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub(crate) fn new(buffer: &mut [f32]) -> Self {
        Self(buffer.as_mut_ptr())
    }

    /// The pointer to element `offset`.
    ///
    /// # Safety
    /// `offset` lies within the buffer this was made from, which outlives the use.
    pub(crate) unsafe fn at(self, offset: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }

    /// Elements `offset .. offset + len` as a slice.
    ///
    /// # Safety
    /// The range lies within the buffer, which outlives the use, and no other task touches it meanwhile.
    pub(crate) unsafe fn slice<'a>(self, offset: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(offset), len) }
    }
}
