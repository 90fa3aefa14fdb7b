//! Access to candle's CPU storage as slices, and uninitialised outputs.

use std::ops::{Deref, Range};
use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;

/// Values behind a lock.
struct Read<G> {
    storage: G,
    range: Range<usize>,
}

/// The values of a contiguous f32 CPU tensor, locked for reading.
pub(crate) fn read(t: &Tensor) -> Result<impl Deref<Target = [f32]>> {
    let (storage, layout) = t.storage_and_layout();
    let range = match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(_)), Some((start, end))) => start..end,
        _ => candle_core::bail!("expected a contiguous f32 tensor on the CPU, found {t:?}"),
    };
    Ok(Read { storage, range })
}

impl<G: Deref<Target = Storage>> Deref for Read<G> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            _ => &[],
        }
    }
}

/// A CPU tensor over `values`.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)
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

/// Copies of slices as CPU tensors, made by all threads: memory blocks come in megabytes.
///
/// # Errors
/// When a shape does not hold as many values as its slice.
pub fn tensors_of(slices: &[(&[f32], Shape)]) -> Result<Vec<Tensor>> {
    slices.par_iter().map(|(values, shape)| tensor(values.to_vec(), shape.clone())).collect()
}

/// The values of each list of tensors, one tensor after another, as f32 in host memory.
///
/// # Errors
/// When a tensor cannot be copied from its device.
pub fn values_of(lists: &[Vec<Tensor>]) -> Result<Vec<Vec<f32>>> {
    let one = |list: &Vec<Tensor>| {
        let mut values = Vec::with_capacity(list.iter().map(Tensor::elem_count).sum());
        for tensor in list {
            let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?;
            values.extend_from_slice(&read(&tensor)?);
        }
        Ok(values)
    };
    lists.par_iter().map(one).collect()
}

/// Makes `buffer` hold `len` lanes that are all written before they are read.
pub(crate) fn output_lanes(buffer: &mut Vec<u32>, len: usize) {
    buffer.clear();
    buffer.reserve(len);
    // SAFETY: the capacity is `len`, and u32 has no drop; packing writes every lane it is asked for, and a
    // product reads no others.
    #[allow(clippy::uninit_vec)]
    unsafe {
        buffer.set_len(len)
    };
}

/// Runs `f` on the values of a contiguous f32 CPU tensor, in place.
pub(crate) fn with_mut<R: Send>(t: &Tensor, f: impl FnOnce(&mut [f32]) -> R + Send) -> Result<R> {
    let op = InPlace { f: Mutex::new(Some(f)), result: Mutex::new(None) };
    t.inplace_op1(&op)?;
    let result = op.result.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(result.expect("the operation ran"))
}

struct InPlace<F, R> {
    f: Mutex<Option<F>>,
    result: Mutex<Option<R>>,
}

impl<R: Send, F: FnOnce(&mut [f32]) -> R + Send> InplaceOp1 for InPlace<F, R> {
    fn name(&self) -> &'static str {
        "in-place"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(values), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
            candle_core::bail!("expected a contiguous f32 tensor, found one of shape {:?}", layout.shape());
        };
        let f = self.f.lock().unwrap_or_else(PoisonError::into_inner).take();
        let result = f.map(|f| f(&mut values[start..end]));
        *self.result.lock().unwrap_or_else(PoisonError::into_inner) = result;
        Ok(())
    }
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

    /// For reading only.
    pub(crate) fn of(values: &[f32]) -> Self {
        Self(values.as_ptr().cast_mut())
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
