//! The fused bodies for NVIDIA GPUs (feature `cuda`): our kernels, and cuBLAS for the matrix products.
//!
//! Activations are f32 or, with [`Precision::Bf16`], bf16; parameters, their gradients and all sums are f32. Everything
//! runs on the device's one stream, in order: devices come from `Device::new_cuda_with_stream`, since the stream of
//! `Device::new_cuda` is another for every thread.

mod attention;
mod ffn;
mod loss;
mod norm;
mod table;

use std::ffi::c_void;

use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::cuda_backend::cudarc::cublas::{result::gemm_ex, sys};
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, LaunchConfig, PushKernelArg};
use candle_core::{CudaDevice, DType, Device, Result, Shape, Storage, Tensor};

use crate::gemm::Write;
use crate::{Precision, Tape};

pub(crate) use attention::{attention, attention_fits};
pub(crate) use ffn::gated_ffn;
pub(crate) use loss::linear_cross_entropy;
pub(crate) use norm::{Rotation, norm};
pub(crate) use table::{adamw_step, embedding, linear, sum_of_squares};

/// kernels.cu, compiled by build.rs.
const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));

/// Threads of a block that takes a row; `squares` of kernels.cu counts on it.
const ROW_THREADS: u32 = 256;

/// The type of activations, and the end of the names of its kernels.
fn element(tape: &Tape) -> (DType, &'static str) {
    match tape.precision() {
        Precision::F32 => (DType::F32, "f32"),
        Precision::Bf16 => (DType::BF16, "bf16"),
    }
}

fn suffix(t: &Tensor) -> Result<&'static str> {
    match t.dtype() {
        DType::F32 => Ok("f32"),
        DType::BF16 => Ok("bf16"),
        other => candle_core::bail!("no CUDA kernels for {other:?}"),
    }
}

fn device(t: &Tensor) -> Result<CudaDevice> {
    Ok(t.device().as_cuda_device()?.clone())
}

/// A tensor whose elements are all written before they are read.
fn output(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    // SAFETY: every kernel and product of this module writes all elements of its outputs.
    unsafe { Tensor::empty(shape, dtype, device) }
}

/// The address of the first element of a contiguous tensor of `dtype` on the device.
fn pointer(t: &Tensor, dtype: DType) -> Result<u64> {
    if t.dtype() != dtype {
        candle_core::bail!("a fused GPU operation: expected {dtype:?}, found {t:?}");
    }
    let (storage, layout) = t.storage_and_layout();
    let (Storage::Cuda(cuda), Some((start, _))) = (&*storage, layout.contiguous_offsets()) else {
        candle_core::bail!("expected a contiguous tensor on a GPU, found {t:?}");
    };
    let stream = cuda.device.cuda_stream();
    let address = match &cuda.slice {
        CudaStorageSlice::F32(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::BF16(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::U32(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::F64(slice) => slice.device_ptr(&stream).0,
        _ => candle_core::bail!("no CUDA kernels for {:?}", t.dtype()),
    };
    Ok(address + (start * dtype.size_in_bytes()) as u64)
}

/// An argument of a kernel.
#[derive(Clone, Copy)]
enum Argument {
    Pointer(u64),
    Int(i32),
    Size(u64),
    Float(f32),
    Flag(bool),
    Rotation(norm::RotationArguments),
    Attention(attention::AttentionArguments),
    AdamW(crate::adamw::Numbers),
}

/// How a kernel is spread over the device.
#[derive(Clone, Copy)]
struct Grid {
    blocks: (u32, u32, u32),
    threads: u32,
    shared_bytes: u32,
}

impl Grid {
    fn rows(n: usize) -> Self {
        Self { blocks: (n as u32, 1, 1), threads: ROW_THREADS, shared_bytes: 0 }
    }

    /// One thread an element.
    fn elements(n: usize) -> Self {
        Self::rows(n.div_ceil(ROW_THREADS as usize))
    }
}

/// Launches a kernel of kernels.cu.
///
/// # Safety
/// The arguments are those that the kernel declares, pointers to as many elements as it touches.
unsafe fn launch(device: &CudaDevice, name: &str, grid: Grid, arguments: &[Argument]) -> Result<()> {
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute::*;
    if grid.blocks.0 == 0 {
        return Ok(());
    }
    let function = device.get_or_load_custom_func(name, "anchorage_ops", PTX)?;
    if grid.shared_bytes > 48 << 10 {
        let bytes = grid.shared_bytes as i32;
        function.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes).w()?;
    }
    let mut builder = function.builder();
    for argument in arguments {
        match argument {
            Argument::Pointer(x) | Argument::Size(x) => builder.arg(x),
            Argument::Int(x) => builder.arg(x),
            Argument::Float(x) => builder.arg(x),
            Argument::Flag(x) => builder.arg(x),
            Argument::Rotation(x) => builder.arg(x),
            Argument::Attention(x) => builder.arg(x),
            Argument::AdamW(x) => builder.arg(x),
        };
    }
    let config = LaunchConfig {
        grid_dim: grid.blocks,
        block_dim: (grid.threads, 1, 1),
        shared_mem_bytes: grid.shared_bytes,
    };
    // SAFETY: the caller's promise.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

/// A row-major matrix on the device, or its transpose.
#[derive(Clone, Copy)]
struct Matrix {
    pointer: u64,
    dtype: DType,
    /// Elements between rows as they are stored.
    stride: usize,
    transposed: bool,
}

impl Matrix {
    /// The rows of a tensor whose last dimension has `stride` elements, from `first` on.
    fn rows(t: &Tensor, stride: usize, first: usize) -> Result<Self> {
        let offset = (first * stride * t.dtype().size_in_bytes()) as u64;
        Ok(Self { pointer: pointer(t, t.dtype())? + offset, dtype: t.dtype(), stride, transposed: false })
    }

    fn transposed(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }
}

fn cuda_type(dtype: DType) -> Result<sys::cudaDataType> {
    match dtype {
        DType::F32 => Ok(sys::cudaDataType::CUDA_R_32F),
        DType::BF16 => Ok(sys::cudaDataType::CUDA_R_16BF),
        other => candle_core::bail!("no CUDA matrix product of {other:?}"),
    }
}

/// c [m, n] = or += a [m, k] · b [k, n], with f32 sums; c is not transposed.
///
/// # Safety
/// The matrices hold as many elements as the sizes say.
unsafe fn gemm(
    device: &CudaDevice,
    (m, n, k): (usize, usize, usize),
    [a, b]: [Matrix; 2],
    c: Matrix,
    into: Write,
) -> Result<()> {
    if m == 0 || n == 0 {
        return Ok(());
    }
    // cuBLAS stores by columns, so it computes cᵀ = bᵀ · aᵀ, of which it sees the transposes already.
    let operation = |matrix: Matrix| match matrix.transposed {
        true => sys::cublasOperation_t::CUBLAS_OP_T,
        false => sys::cublasOperation_t::CUBLAS_OP_N,
    };
    let bound = device.cuda_stream().context().bind_to_thread();
    bound.map_err(|e| candle_core::Error::Msg(format!("cuBLAS: {e:?}")))?;
    let (alpha, beta) = (1f32, if into == Write::Add { 1f32 } else { 0f32 });
    let blas = device.cublas_handle();
    // SAFETY: the handle belongs to the device's stream; the rest is the caller's promise.
    let result = unsafe {
        gemm_ex(
            *blas.handle(),
            operation(b),
            operation(a),
            n as i32,
            m as i32,
            k as i32,
            (&raw const alpha).cast::<c_void>(),
            b.pointer as *const c_void,
            cuda_type(b.dtype)?,
            b.stride as i32,
            a.pointer as *const c_void,
            cuda_type(a.dtype)?,
            a.stride as i32,
            (&raw const beta).cast::<c_void>(),
            c.pointer as *mut c_void,
            cuda_type(c.dtype)?,
            c.stride as i32,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    };
    result.map_err(|e| candle_core::Error::Msg(format!("cuBLAS product {m} x {n} x {k}: {e:?}")))
}
