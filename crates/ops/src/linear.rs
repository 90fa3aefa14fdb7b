//! y = x·Wᵀ, with a bias where there is one, added to the residual stream where one is given.

use std::ops::Range;

use candle_core::{D, Result, Tensor};
use rayon::prelude::*;

use crate::buffer::{Shared, output, read, tensor};
use crate::gemm::{Addend, Output, Right, Size, Threads, View, Write, gemm, multiply_all};
use crate::{Tape, Traced};

/// Rows whose gradients are one sum of a bias; fixed, so that it never depends on the thread count.
const ROWS: usize = 64;

/// y = base + x·Wᵀ; `x` [.., I], `weight` [O, I], `base` and y [.., O]. Without a base nothing is added.
///
/// # Errors
/// When the shapes do not fit.
pub fn linear(tape: &mut Tape, base: Option<&Traced>, x: &Traced, weight: &Traced) -> Result<Traced> {
    affine(tape, base, x, weight, None)
}

/// [`linear`] with a `bias` [O] that every row adds; without one it is the same.
///
/// # Errors
/// As [`linear`].
pub fn affine(
    tape: &mut Tape,
    base: Option<&Traced>,
    x: &Traced,
    weight: &Traced,
    bias: Option<&Traced>,
) -> Result<Traced> {
    let (o, i) = weight.value().dims2()?;
    let mut shape = x.value().dims().to_vec();
    match shape.last_mut() {
        Some(last) if *last == i => *last = o,
        _ => candle_core::bail!("linear: x {shape:?} does not end in {i}"),
    }
    if let Some(base) = base.filter(|base| base.value().dims() != shape) {
        candle_core::bail!("linear: base {:?} for a result of {shape:?}", base.value().dims());
    }
    if let Some(bias) = bias.filter(|bias| bias.value().dims() != [o]) {
        candle_core::bail!("linear: bias {:?} for a weight of [{o}, {i}]", bias.value().dims());
    }
    let n = x.value().elem_count() / i;
    let inputs: Vec<&Traced> = [x, weight].into_iter().chain(base).chain(bias).collect();
    #[cfg(feature = "cuda")]
    if crate::on_gpu(x.value()) && bias.is_none() {
        return crate::cuda::linear(tape, base, x, weight);
    }
    if !crate::fused(x.value()) {
        return tape.composed(&inputs, |inputs| composed(inputs, base.is_some(), &shape));
    }
    let precision = tape.precision();
    let mut y = output(n * o);
    {
        let (x, w) = (read(x.value())?, read(weight.value())?);
        let (x, w) = (View::rows(&x, i), View::transposed(&w, i));
        match base {
            None => {
                gemm(precision, Size { m: n, n: o, k: i }, (&mut y, o), (x, w), (Write::Over, Threads::All))
            }
            Some(base) => {
                let base = read(base.value())?;
                let right = Right::pack(precision, w, (i, o), Threads::All);
                let from = Addend::Other { values: Shared::of(&base), offset: 0, row: o };
                let to = Output { to: Shared::new(&mut y), offset: 0, row: o, from };
                // SAFETY: y and the base are whole [n, o] matrices, and y is uniquely borrowed.
                unsafe { multiply_all((n, x), right.all(), to, Threads::All) }
            }
        }
    }
    if let Some(bias) = bias {
        add_to_rows(&mut y, &read(bias.value())?);
    }
    let y = tensor(y, shape)?;
    if !tape.records(&inputs) {
        return Ok(Traced::constant(y));
    }
    // Only the gradient of the weight reads x again: a frozen one keeps nothing.
    let (kept, x, weight) = ((!weight.is_constant()).then(|| x.keep()), x.place(), weight.clone());
    let (base, bias) = (base.map(Traced::place), bias.map(Traced::place));
    Ok(tape.record(y, move |dy, gradients| {
        {
            let (w, dy) = (read(weight.value())?, read(&dy)?);
            gradients.write(&x, |dx, into| {
                let size = Size { m: n, n: i, k: o };
                gemm(precision, size, (dx, i), (View::rows(&dy, o), View::rows(&w, i)), (into, Threads::All));
            })?;
            if let Some(kept) = &kept {
                let kept = kept.value()?;
                let x_values = read(&kept)?;
                gradients.write(&weight, |dw, into| {
                    let size = Size { m: o, n: i, k: n };
                    let operands = (View::transposed(&dy, o), View::rows(&x_values, i));
                    gemm(precision, size, (dw, i), operands, (into, Threads::All));
                })?;
            }
            if let Some(bias) = &bias {
                gradients.write(bias, |dbias, into| sum_of_rows(&dy, (o, 0..o), dbias, into))?;
            }
        }
        match base {
            Some(base) => gradients.give(&base, dy),
            None => Ok(()),
        }
    }))
}

/// y = x + bias in every row; `x` and y [.., O], `bias` [O].
///
/// # Errors
/// When the shapes do not fit.
pub fn add_bias(tape: &mut Tape, x: &Traced, bias: &Traced) -> Result<Traced> {
    if bias.value().dims() != [x.value().dim(D::Minus1)?] {
        candle_core::bail!("linear: bias {:?} for x {:?}", bias.value().dims(), x.value().dims());
    }
    if !crate::fused(x.value()) {
        return tape
            .composed(&[x, bias], |inputs| inputs[0].broadcast_add(&inputs[1].to_dtype(inputs[0].dtype())?));
    }
    let mut y = read(x.value())?.to_vec();
    add_to_rows(&mut y, &read(bias.value())?);
    let y = tensor(y, x.value().shape())?;
    if !tape.records(&[x, bias]) {
        return Ok(Traced::constant(y));
    }
    let (x, bias) = (x.place(), bias.place());
    Ok(tape.record(y, move |dy, gradients| {
        {
            let dy = read(&dy)?;
            gradients
                .write(&bias, |dbias, into| sum_of_rows(&dy, (dbias.len(), 0..dbias.len()), dbias, into))?;
        }
        gradients.give(&x, dy)
    }))
}

/// Adds the bias [O] to every row of y [N, O].
fn add_to_rows(y: &mut [f32], bias: &[f32]) {
    let o = bias.len();
    y.par_chunks_mut(o * ROWS).for_each(|rows| {
        for row in rows.chunks_exact_mut(o) {
            row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
        }
    });
}

/// `inputs` are x, the weight, and what there is of the base and the bias.
fn composed(inputs: &[Tensor], has_base: bool, shape: &[usize]) -> Result<Tensor> {
    let [x, weight, added @ ..] = inputs else { candle_core::bail!("linear: x or the weight is missing") };
    let (_, i) = weight.dims2()?;
    let weight = weight.to_dtype(x.dtype())?;
    let mut y = x.reshape((x.elem_count() / i, i))?.matmul(&weight.t()?)?.reshape(shape)?;
    let (base, bias) = added.split_at(usize::from(has_base));
    for base in base {
        y = (y + base)?;
    }
    for bias in bias {
        y = y.broadcast_add(&bias.to_dtype(x.dtype())?)?;
    }
    Ok(y)
}

/// `sum` = or += Σ of the rows of `values`, of each the columns `columns`; rows are `stride` apart.
pub(crate) fn sum_of_rows(
    values: &[f32],
    (stride, columns): (usize, Range<usize>),
    sum: &mut [f32],
    into: Write,
) {
    let part = |rows: &[f32]| {
        let mut part = vec![0f32; sum.len()];
        for row in rows.chunks(stride) {
            part.iter_mut().zip(&row[columns.clone()]).for_each(|(part, x)| *part += x);
        }
        part
    };
    let parts: Vec<Vec<f32>> = values.par_chunks(stride * ROWS).map(part).collect();
    if into == Write::Over {
        sum.fill(0.0);
    }
    for part in &parts {
        sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
}
