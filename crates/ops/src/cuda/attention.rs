use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{DType, Result, Tensor};

use super::{Argument, Grid, device, launch, output, pointer, suffix};
use crate::attention::AttentionShape;
use crate::gemm::Write;
use crate::{Tape, Traced};

/// TILE and WARPS of attention.cuh.
const TILE: usize = 64;
const WARPS: usize = 4;

/// `Attention` of attention.cuh.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct AttentionArguments {
    starts: u64,
    queries: i32,
    keys: i32,
    heads: i32,
    head_width: i32,
}

// SAFETY: plain numbers, laid out as the kernel declares them.
unsafe impl DeviceRepr for AttentionArguments {}

/// Bytes of shared memory that each kernel takes, as `Shared::take` of attention.cuh rounds them.
struct SharedBytes {
    forward: u32,
    queries: u32,
    keys: u32,
}

impl SharedBytes {
    fn of(dtype: DType, head_width: usize) -> Self {
        let (size, ld) = (dtype.size_in_bytes(), head_width + 8);
        let bytes = |n: usize, size: usize| (n * size).next_multiple_of(128) as u32;
        let (rows, sums) = (bytes(TILE * ld, size), bytes(TILE * ld, 4));
        let (weights, scores) = (bytes(TILE * (TILE + 8), size), bytes(TILE * (TILE + 4), 4));
        let numbers = bytes(TILE, 4);
        let pair = 4 * rows + 2 * weights + 2 * scores + 2 * numbers;
        Self {
            forward: 3 * rows + weights + scores + sums + 2 * numbers,
            queries: pair + sums,
            keys: pair + 2 * sums,
        }
    }
}

/// Whether the tiles of this head width fit tensor cores and the device's shared memory.
pub(crate) fn attention_fits(q: &Tensor, shape: AttentionShape) -> Result<bool> {
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute::*;
    let stream = device(q)?.cuda_stream();
    let most = stream.context().attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN).w()?;
    let needed = SharedBytes::of(q.dtype(), shape.head_width).keys;
    Ok(shape.head_width.is_multiple_of(16) && i64::from(needed) <= i64::from(most))
}

/// The body of `attention` for shapes that [`attention_fits`].
pub(crate) fn attention(
    tape: &mut Tape,
    [q, k, v]: [&Traced; 3],
    starts: &Arc<[u32]>,
    shape: AttentionShape,
) -> Result<Traced> {
    let AttentionShape { batch, queries, keys, heads, head_width, .. } = shape;
    let (cuda, name, place) = (device(q.value())?, suffix(q.value())?, q.value().device().clone());
    let starts = Tensor::from_slice(starts, starts.len(), &place)?;
    let arguments = Argument::Attention(AttentionArguments {
        starts: pointer(&starts, DType::U32)?,
        queries: queries as i32,
        keys: keys as i32,
        heads: heads as i32,
        head_width: head_width as i32,
    });
    let dtype = q.value().dtype();
    let grid = move |n: usize, shared_bytes: u32| Grid {
        blocks: (n.div_ceil(TILE) as u32, heads as u32, batch as u32),
        threads: 32 * WARPS as u32,
        shared_bytes,
    };
    let shared = SharedBytes::of(dtype, head_width);
    let y = output(q.value().shape(), q.value().dtype(), &place)?;
    let log_sum_exp = output((batch, heads, queries), DType::F32, &place)?;
    let forward = [
        Argument::Pointer(pointer(q.value(), dtype)?),
        Argument::Pointer(pointer(k.value(), dtype)?),
        Argument::Pointer(pointer(v.value(), dtype)?),
        Argument::Pointer(pointer(&y, dtype)?),
        Argument::Pointer(pointer(&log_sum_exp, DType::F32)?),
        arguments,
    ];
    // SAFETY: shapes were checked by the caller.
    unsafe { launch(&cuda, &format!("attention_forward_{name}"), grid(queries, shared.forward), &forward)? };
    if !tape.records(&[q, k, v]) {
        return Ok(Traced::constant(y));
    }
    let (q, k, v, kept) = (q.clone(), k.clone(), v.clone(), y.clone());
    Ok(tape.record(y, move |dy, gradients| {
        let _starts = &starts;
        let dy = dy.contiguous()?;
        let delta = output((batch, heads, queries), DType::F32, &place)?;
        let n = batch * heads * queries;
        let of_rows = [
            Argument::Pointer(pointer(&kept, dtype)?),
            Argument::Pointer(pointer(&dy, dtype)?),
            Argument::Pointer(pointer(&delta, DType::F32)?),
            arguments,
            Argument::Int(n as i32),
        ];
        let row_grid =
            Grid { blocks: (n.div_ceil(WARPS) as u32, 1, 1), threads: 32 * WARPS as u32, shared_bytes: 0 };
        let mut buffer = |x: &Traced| match gradients.device_buffer(x, x.value().dtype())? {
            Some(buffer) => Ok::<_, candle_core::Error>(buffer),
            None => Ok((output(x.value().shape(), x.value().dtype(), &place)?, Write::Over)),
        };
        let ((dq, q_into), (dk, k_into), (dv, v_into)) = (buffer(&q)?, buffer(&k)?, buffer(&v)?);
        let inputs = [
            Argument::Pointer(pointer(q.value(), dtype)?),
            Argument::Pointer(pointer(k.value(), dtype)?),
            Argument::Pointer(pointer(v.value(), dtype)?),
            Argument::Pointer(pointer(&dy, dtype)?),
            Argument::Pointer(pointer(&log_sum_exp, DType::F32)?),
            Argument::Pointer(pointer(&delta, DType::F32)?),
        ];
        let to_queries =
            [Argument::Pointer(pointer(&dq, dtype)?), Argument::Flag(q_into == Write::Add), arguments];
        let to_keys = [
            Argument::Pointer(pointer(&dk, dtype)?),
            Argument::Pointer(pointer(&dv, dtype)?),
            Argument::Flag(k_into == Write::Add),
            Argument::Flag(v_into == Write::Add),
            arguments,
        ];
        let (query_grid, key_grid) = (grid(queries, shared.queries), grid(keys, shared.keys));
        // SAFETY: gradients have the shapes of their inputs.
        unsafe {
            launch(&cuda, &format!("attention_delta_{name}"), row_grid, &of_rows)?;
            let kernel = format!("attention_backward_queries_{name}");
            launch(&cuda, &kernel, query_grid, &[&inputs[..], &to_queries].concat())?;
            let kernel = format!("attention_backward_keys_{name}");
            launch(&cuda, &kernel, key_grid, &[&inputs[..], &to_keys].concat())
        }
    }))
}
