//! Embedding, linear layers and the optimizer.

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{DType, Result, Tensor};

use super::{Argument, Grid, Matrix, device, element, gemm, launch, output, pointer};
use crate::adamw::Numbers;
use crate::embedding::positions_by_id;
use crate::gemm::Write;
use crate::{Tape, Traced};

/// The body of `embedding`.
pub(crate) fn embedding(
    tape: &mut Tape,
    table: &Traced,
    ids: &[u32],
    (b, t): (usize, usize),
) -> Result<Traced> {
    let (v, d) = table.value().dims2()?;
    let place = table.value().device().clone();
    let cuda = device(table.value())?;
    let (dtype, name) = element(tape);
    let on_device = Tensor::from_slice(ids, ids.len(), &place)?;
    let y = output((b, t, d), dtype, &place)?;
    let arguments = [
        Argument::Pointer(pointer(table.value(), DType::F32)?),
        Argument::Pointer(pointer(&on_device, DType::U32)?),
        Argument::Pointer(pointer(&y, dtype)?),
        Argument::Int(d as i32),
    ];
    // SAFETY: ids are below v (checked by the caller), y has a row each.
    unsafe { launch(&cuda, &format!("embed_{name}"), Grid::rows(ids.len()), &arguments)? };
    if !tape.records(&[table]) {
        return Ok(Traced::constant(y));
    }
    let (table, ids) = (table.clone(), ids.to_vec());
    Ok(tape.record(y, move |dy, gradients| {
        let Some((gradient, into)) = gradients.device_buffer(&table, DType::F32)? else { return Ok(()) };
        if into == Write::Over {
            gradient.zero_set()?;
        }
        let (first, order) = positions_by_id(&ids, v);
        let distinct: Vec<u32> =
            (0..v as u32).filter(|&id| first[id as usize] < first[id as usize + 1]).collect();
        let mut begins: Vec<u32> = distinct.iter().map(|&id| first[id as usize]).collect();
        begins.push(ids.len() as u32);
        let upload = |values: &[u32]| Tensor::from_slice(values, values.len(), &place);
        let (distinct, begins, order) = (upload(&distinct)?, upload(&begins)?, upload(&order)?);
        let dy = dy.contiguous()?;
        let arguments = [
            Argument::Pointer(pointer(&dy, dtype)?),
            Argument::Pointer(pointer(&distinct, DType::U32)?),
            Argument::Pointer(pointer(&begins, DType::U32)?),
            Argument::Pointer(pointer(&order, DType::U32)?),
            Argument::Pointer(pointer(&gradient, DType::F32)?),
            Argument::Int(d as i32),
        ];
        let kernel = format!("embed_backward_{name}");
        // SAFETY: a block a distinct id, whose positions are rows of dy.
        unsafe { launch(&cuda, &kernel, Grid::rows(distinct.elem_count()), &arguments) }
    }))
}

/// The body of `linear`.
pub(crate) fn linear(tape: &mut Tape, base: Option<&Traced>, x: &Traced, weight: &Traced) -> Result<Traced> {
    let (o, i) = weight.value().dims2()?;
    let n = x.value().elem_count() / i;
    let cuda = device(x.value())?;
    let dtype = x.value().dtype();
    let mut shape = x.value().dims().to_vec();
    shape.pop();
    shape.push(o);
    // A copy of the weights in the type of the activations, dropped after the backward.
    let w = weight.value().to_dtype(dtype)?;
    let (y, into) = match base {
        Some(base) => (base.value().copy()?, Write::Add),
        None => (output(shape, dtype, x.value().device())?, Write::Over),
    };
    let operands = [Matrix::rows(x.value(), i, 0)?, Matrix::rows(&w, i, 0)?.transposed()];
    // SAFETY: x is n rows of i, w o rows of i, y n rows of o.
    unsafe { gemm(&cuda, (n, o, i), operands, Matrix::rows(&y, o, 0)?, into)? };
    let inputs: Vec<&Traced> = [x, weight].into_iter().chain(base).collect();
    if !tape.records(&inputs) {
        return Ok(Traced::constant(y));
    }
    let (x, weight, base) = (x.clone(), weight.clone(), base.cloned());
    Ok(tape.record(y, move |dy, gradients| {
        let dy = dy.contiguous()?;
        let dy_rows = Matrix::rows(&dy, o, 0)?;
        if let Some((dx, into)) = gradients.device_buffer(&x, dtype)? {
            let operands = [dy_rows, Matrix::rows(&w, i, 0)?];
            // SAFETY: dy is n rows of o, w o rows of i, dx n rows of i.
            unsafe { gemm(&cuda, (n, i, o), operands, Matrix::rows(&dx, i, 0)?, into)? };
        }
        if let Some((dw, into)) = gradients.device_buffer(&weight, DType::F32)? {
            let operands = [dy_rows.transposed(), Matrix::rows(x.value(), i, 0)?];
            // SAFETY: as above; dw is o rows of i.
            unsafe { gemm(&cuda, (o, i, n), operands, Matrix::rows(&dw, i, 0)?, into)? };
        }
        match base {
            Some(base) => gradients.give(&base, dy),
            None => Ok(()),
        }
    }))
}

// SAFETY: plain numbers, laid out as the kernel declares them.
unsafe impl DeviceRepr for Numbers {}

/// The body of `adamw_step`; all tensors are f32 and equally long.
pub(crate) fn adamw_step([p, g, m, v]: [&Tensor; 4], numbers: Numbers) -> Result<()> {
    let n = p.elem_count();
    let arguments = [
        Argument::Pointer(pointer(p, DType::F32)?),
        Argument::Pointer(pointer(g, DType::F32)?),
        Argument::Pointer(pointer(m, DType::F32)?),
        Argument::Pointer(pointer(v, DType::F32)?),
        Argument::Size(n as u64),
        Argument::AdamW(numbers),
    ];
    // SAFETY: four tensors of n elements (checked by the caller), a thread each.
    unsafe { launch(&device(p)?, "adamw", Grid::elements(n), &arguments) }
}

/// The body of `sum_of_squares`.
pub(crate) fn sum_of_squares(x: &Tensor) -> Result<f64> {
    const BLOCKS: usize = 256;
    let parts = output(BLOCKS, DType::F64, x.device())?;
    let arguments = [
        Argument::Pointer(pointer(x, DType::F32)?),
        Argument::Pointer(pointer(&parts, DType::F64)?),
        Argument::Size(x.elem_count() as u64),
    ];
    // SAFETY: a part a block.
    unsafe { launch(&device(x)?, "squares", Grid::rows(BLOCKS), &arguments)? };
    Ok(parts.to_vec1::<f64>()?.iter().sum())
}
