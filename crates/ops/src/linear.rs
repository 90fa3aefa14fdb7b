//! y = x·Wᵀ, added to the residual stream where one is given.

use candle_core::Result;

use crate::buffer::{Shared, output, read, tensor};
use crate::gemm::{Addend, Output, Right, Size, Threads, View, Write, gemm, multiply_all};
use crate::{Tape, Traced};

/// y = base + x·Wᵀ; `x` [.., I], `weight` [O, I], `base` and y [.., O]. Without a base nothing is added.
///
/// # Errors
/// When the shapes do not fit.
pub fn linear(tape: &mut Tape, base: Option<&Traced>, x: &Traced, weight: &Traced) -> Result<Traced> {
    let (o, i) = weight.value().dims2()?;
    let mut shape = x.value().dims().to_vec();
    match shape.last_mut() {
        Some(last) if *last == i => *last = o,
        _ => candle_core::bail!("linear: x {shape:?} does not end in {i}"),
    }
    if let Some(base) = base.filter(|base| base.value().dims() != shape) {
        candle_core::bail!("linear: base {:?} for a result of {shape:?}", base.value().dims());
    }
    let n = x.value().elem_count() / i;
    let inputs: Vec<&Traced> = [x, weight].into_iter().chain(base).collect();
    #[cfg(feature = "cuda")]
    if crate::on_gpu(x.value()) {
        return crate::cuda::linear(tape, base, x, weight);
    }
    if !crate::fused(x.value()) {
        return tape.composed(&inputs, |inputs| {
            let y = inputs[0].reshape((n, i))?.matmul(&inputs[1].t()?)?.reshape(shape)?;
            if let [_, _, base] = inputs { y + base } else { Ok(y) }
        });
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
    let y = tensor(y, shape)?;
    if !tape.records(&inputs) {
        return Ok(Traced::constant(y));
    }
    let (kept, x, weight, base) = (x.keep(), x.place(), weight.clone(), base.map(Traced::place));
    Ok(tape.record(y, move |dy, gradients| {
        {
            let kept = kept.value()?;
            let (x_values, w, dy) = (read(&kept)?, read(weight.value())?, read(&dy)?);
            gradients.write(&x, |dx, into| {
                let size = Size { m: n, n: i, k: o };
                gemm(precision, size, (dx, i), (View::rows(&dy, o), View::rows(&w, i)), (into, Threads::All));
            })?;
            gradients.write(&weight, |dw, into| {
                let size = Size { m: o, n: i, k: n };
                let operands = (View::transposed(&dy, o), View::rows(&x_values, i));
                gemm(precision, size, (dw, i), operands, (into, Threads::All));
            })?;
        }
        match base {
            Some(base) => gradients.give(&base, dy),
            None => Ok(()),
        }
    }))
}
