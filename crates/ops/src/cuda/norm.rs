use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{DType, Result};

use super::{Argument, Grid, ROW_THREADS, device, launch, output, pointer, suffix};
use crate::gemm::Write;
use crate::{RopeTable, Tape, Traced};

/// Rows of a block of the backward.
const ROWS: usize = 32;

/// The rotation that follows a norm of queries or keys.
pub(crate) struct Rotation<'a> {
    pub(crate) table: &'a RopeTable,
    pub(crate) first_position: usize,
    pub(crate) rows_per_sequence: usize,
}

/// `Rotation` of kernels.cu.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct RotationArguments {
    cos: u64,
    sin: u64,
    half: i32,
    rows_per_sequence: i32,
    first_position: i32,
}

// SAFETY: plain numbers, laid out as the kernel declares them.
unsafe impl DeviceRepr for RotationArguments {}

/// The body of `rms_norm`, and with a rotation of `norm_rope`.
pub(crate) fn norm(
    tape: &mut Tape,
    x: &Traced,
    gain: &Traced,
    eps: f64,
    rotation: Option<Rotation>,
) -> Result<Traced> {
    let (eps, d) = (eps as f32, gain.value().elem_count());
    let n = x.value().elem_count() / d;
    let (cuda, name) = (device(x.value())?, suffix(x.value())?);
    // The tables live as long as the kernels that read them.
    let tables = rotation.as_ref().map(|r| r.table.on_device(x.value().device())).transpose()?;
    let mut rotate = RotationArguments { cos: 0, sin: 0, half: 0, rows_per_sequence: 1, first_position: 0 };
    if let (Some(rotation), Some([cos, sin])) = (&rotation, &tables) {
        rotate = RotationArguments {
            cos: pointer(cos, DType::F32)?,
            sin: pointer(sin, DType::F32)?,
            half: (rotation.table.head_width() / 2) as i32,
            rows_per_sequence: rotation.rows_per_sequence as i32,
            first_position: rotation.first_position as i32,
        };
    }
    let dtype = x.value().dtype();
    let y = output(x.value().shape(), dtype, x.value().device())?;
    let arguments = [
        Argument::Pointer(pointer(x.value(), dtype)?),
        Argument::Pointer(pointer(gain.value(), DType::F32)?),
        Argument::Pointer(pointer(&y, dtype)?),
        Argument::Int(d as i32),
        Argument::Float(eps),
        Argument::Rotation(rotate),
    ];
    // SAFETY: x and y are n rows of d, a block each; gain has d elements.
    unsafe { launch(&cuda, &format!("norm_forward_{name}"), Grid::rows(n), &arguments)? };
    if !tape.records(&[x, gain]) {
        return Ok(Traced::constant(y));
    }
    let (x, gain) = (x.clone(), gain.clone());
    Ok(tape.record(y, move |dy, gradients| {
        let _tables = &tables;
        let place = x.value().device();
        let (dx, into) = match gradients.device_buffer(&x, x.value().dtype())? {
            Some(buffer) => buffer,
            None => (output(x.value().shape(), x.value().dtype(), place)?, Write::Over),
        };
        let blocks = n.div_ceil(ROWS);
        let parts = output((blocks, d), DType::F32, place)?;
        let dy = dy.contiguous()?;
        let arguments = [
            Argument::Pointer(pointer(x.value(), dtype)?),
            Argument::Pointer(pointer(gain.value(), DType::F32)?),
            Argument::Pointer(pointer(&dy, dtype)?),
            Argument::Pointer(pointer(&dx, dtype)?),
            Argument::Pointer(pointer(&parts, DType::F32)?),
            Argument::Int(n as i32),
            Argument::Int(d as i32),
            Argument::Int(ROWS as i32),
            Argument::Float(eps),
            Argument::Flag(into == Write::Add),
            Argument::Rotation(rotate),
        ];
        let grid = Grid { blocks: (blocks as u32, 1, 1), threads: ROW_THREADS, shared_bytes: 4 * d as u32 };
        // SAFETY: x, dy and dx are n rows of d, parts one row a block.
        unsafe { launch(&cuda, &format!("norm_backward_{name}"), grid, &arguments)? };
        let Some((dgain, into)) = gradients.device_buffer(&gain, DType::F32)? else { return Ok(()) };
        let arguments = [
            Argument::Pointer(pointer(&parts, DType::F32)?),
            Argument::Pointer(pointer(&dgain, DType::F32)?),
            Argument::Int(blocks as i32),
            Argument::Int(d as i32),
            Argument::Flag(into == Write::Add),
        ];
        // SAFETY: parts has a row a block, dgain d elements.
        unsafe { launch(&cuda, "sum_rows", Grid::elements(d), &arguments) }
    }))
}
