use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{DType, Result, Tensor};

use super::{Argument, Grid, device, launch, output, pointer, suffix};
use crate::attention::AttentionShape;
use crate::gemm::Into;
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

/// Bytes of shared memory for some tiles, as `Shared::take` of attention.cuh rounds them.
fn shared_bytes(pieces: &[(usize, usize)]) -> u32 {
    pieces.iter().map(|&(n, size)| (n * size).next_multiple_of(128) as u32).sum()
}

/// The body of `attention` for head widths that are multiples of 16, the size of a tensor-core tile.
pub(crate) fn attention(
    tape: &mut Tape,
    [q, k, v]: [&Traced; 3],
    starts: &Arc<[u32]>,
    shape: AttentionShape,
) -> Result<Traced> {
    let AttentionShape { batch, queries, keys, heads, head_width } = shape;
    let (cuda, name, place) = (device(q.value())?, suffix(q.value())?, q.value().device().clone());
    let starts = Tensor::from_slice(starts, starts.len(), &place)?;
    let arguments = Argument::Attention(AttentionArguments {
        starts: pointer(&starts)?,
        queries: queries as i32,
        keys: keys as i32,
        heads: heads as i32,
        head_width: head_width as i32,
    });
    let (size, ld) = (q.value().dtype().size_in_bytes(), head_width + 8);
    let rows = (TILE * ld, size);
    let sums = (TILE * ld, 4);
    let (weights, scores, numbers) = ((TILE * (TILE + 8), size), (TILE * (TILE + 4), 4), (TILE, 4));
    let grid = move |n: usize, pieces: &[(usize, usize)]| Grid {
        blocks: (n.div_ceil(TILE) as u32, heads as u32, batch as u32),
        threads: 32 * WARPS as u32,
        shared_bytes: shared_bytes(pieces),
    };
    let y = output(q.value().shape(), q.value().dtype(), &place)?;
    let log_sum_exp = output((batch, heads, queries), DType::F32, &place)?;
    let forward = [
        Argument::Pointer(pointer(q.value())?),
        Argument::Pointer(pointer(k.value())?),
        Argument::Pointer(pointer(v.value())?),
        Argument::Pointer(pointer(&y)?),
        Argument::Pointer(pointer(&log_sum_exp)?),
        arguments,
    ];
    let pieces = [rows, rows, rows, weights, scores, sums, numbers, numbers];
    // SAFETY: shapes were checked by the caller.
    unsafe { launch(&cuda, &format!("attention_forward_{name}"), grid(queries, &pieces), &forward)? };
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
            Argument::Pointer(pointer(&kept)?),
            Argument::Pointer(pointer(&dy)?),
            Argument::Pointer(pointer(&delta)?),
            arguments,
            Argument::Int(n as i32),
        ];
        let row_grid =
            Grid { blocks: (n.div_ceil(WARPS) as u32, 1, 1), threads: 32 * WARPS as u32, shared_bytes: 0 };
        let mut buffer = |x: &Traced| match gradients.device_buffer(x, x.value().dtype())? {
            Some(buffer) => Ok::<_, candle_core::Error>(buffer),
            None => Ok((output(x.value().shape(), x.value().dtype(), &place)?, Into::Overwrite)),
        };
        let ((dq, q_into), (dk, k_into), (dv, v_into)) = (buffer(&q)?, buffer(&k)?, buffer(&v)?);
        let inputs = [
            Argument::Pointer(pointer(q.value())?),
            Argument::Pointer(pointer(k.value())?),
            Argument::Pointer(pointer(v.value())?),
            Argument::Pointer(pointer(&dy)?),
            Argument::Pointer(pointer(&log_sum_exp)?),
            Argument::Pointer(pointer(&delta)?),
        ];
        let to_queries = [Argument::Pointer(pointer(&dq)?), Argument::Flag(q_into == Into::Add), arguments];
        let to_keys = [
            Argument::Pointer(pointer(&dk)?),
            Argument::Pointer(pointer(&dv)?),
            Argument::Flag(k_into == Into::Add),
            Argument::Flag(v_into == Into::Add),
            arguments,
        ];
        let pair = [rows, rows, rows, rows, weights, weights, scores, scores, numbers, numbers];
        let query_grid = grid(queries, &[&pair[..], &[sums]].concat());
        let key_grid = grid(keys, &[&pair[..], &[sums, sums]].concat());
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
