//! The gated FFN whose three matrices have low-rank additions ([`crate::lora`]).

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::buffer::{Shared, output, read, tensor, with_mut};
use crate::gemm::{Addend, Output, Right, Size, Threads, View, Write, gemm, multiply_all};
use crate::linear::sum_of_rows;
use crate::lora::{self, Lora};
use crate::tape::{Place, repeat_a_slot};
use crate::{Activation, Gradients, LoraPart, Precision, Tape, Traced};

/// An FFN, and the additions to its three matrices.
#[derive(Clone, Debug)]
pub struct FfnLora {
    /// [M1, M2, M3] as [3, F, D], M3 being stored transposed.
    pub block: Traced,
    /// What is added to x·M1ᵀ and to x·M2ᵀ, [2·F].
    pub bias: Option<Traced>,
    /// What is applied to x·M1ᵀ.
    pub activation: Activation,
    /// Additions to M1.
    pub gate: Vec<LoraPart>,
    /// To M2.
    pub up: Vec<LoraPart>,
    /// To M3.
    pub down: Vec<LoraPart>,
    /// What they are multiplied by.
    pub alpha: f32,
}

impl FfnLora {
    fn blocks(&self) -> impl Iterator<Item = &Traced> {
        [&self.gate, &self.up, &self.down].into_iter().flatten().flat_map(|part| &part.blocks)
    }
}

/// y = base + (f(x·M1'ᵀ) ⊙ (x·M2'ᵀ))·M3', with M' = M + α·BA of the row's blocks, f being the activation.
/// Without a base nothing is added.
///
/// `base`, `x` and y [.., D]. Where all B are 0, y has the bits of [`crate::gated_ffn`].
///
/// # Errors
/// As [`crate::gated_ffn`] and [`crate::lora`].
pub fn gated_ffn_lora(tape: &mut Tape, base: Option<&Traced>, x: &Traced, ffn: &FfnLora) -> Result<Traced> {
    let &[3, f, d] = ffn.block.value().dims() else {
        candle_core::bail!("gated ffn: a block of {:?}", ffn.block.value().dims());
    };
    let base_dims = base.map_or(x.value().dims(), |base| base.value().dims());
    if base_dims != x.value().dims() || x.value().dims().last() != Some(&d) || f == 0 {
        candle_core::bail!("gated ffn of width {d}: base {base_dims:?}, x {:?}", x.value().dims());
    }
    if let Some(bias) = ffn.bias.as_ref().filter(|bias| bias.value().dims() != [2 * f]) {
        candle_core::bail!("gated ffn: a bias of {:?} for a block of width {f}", bias.value().dims());
    }
    let n = x.value().elem_count() / d;
    let weights = || [&ffn.block].into_iter().chain(ffn.blocks()).chain(&ffn.bias);
    if repeat_a_slot(weights()) {
        candle_core::bail!("gated ffn: a block with a gradient is given twice");
    }
    let make = |parts: &[LoraPart], (i, o)| Lora::checked(tape.precision(), parts, (n, i, o), ffn.alpha);
    let loras = [make(&ffn.gate, (d, f))?, make(&ffn.up, (d, f))?, make(&ffn.down, (f, d))?];
    let inputs: Vec<&Traced> = [x].into_iter().chain(weights()).chain(base).collect();
    if !crate::fused(x.value()) {
        return tape.composed(&inputs, |inputs| composed(inputs, ffn, (n, f, d)));
    }
    let records = tape.records(&inputs);
    let op = GatedFfnLora { precision: tape.precision(), activation: ffn.activation, n, f, d, loras };
    let (y, kept) = op.forward(base, x, ffn)?;
    let y = tensor(y, x.value().shape())?;
    if !records {
        return Ok(Traced::constant(y));
    }
    let (base, x_kept, x) = (base.map(Traced::place), x.keep(), x.place());
    let (block, bias) = (ffn.block.clone(), ffn.bias.as_ref().map(Traced::place));
    Ok(tape.record(y, move |dy, gradients| {
        op.backward((&x, &x_kept.value()?), (&block, bias.as_ref()), &dy, kept, gradients)?;
        match base {
            Some(base) => gradients.give(&base, dy),
            None => Ok(()),
        }
    }))
}

/// `inputs` are x, the FFN, all blocks, the bias if there is one, and the base if there is one.
fn composed(inputs: &[Tensor], ffn: &FfnLora, (n, f, d): (usize, usize, usize)) -> Result<Tensor> {
    let [x, block, rest @ ..] = inputs else { candle_core::bail!("gated ffn: x or its weights are missing") };
    let (blocks, rest) = rest.split_at(ffn.blocks().count());
    let (bias, base) = rest.split_at(usize::from(ffn.bias.is_some()));
    let dims = x.dims();
    let x = x.reshape((n, d))?;
    let block = block.to_dtype(x.dtype())?;
    let matrix = |i: usize| block.narrow(0, i, 1)?.squeeze(0);
    let product = |i: usize| -> Result<Tensor> {
        let product = x.matmul(&matrix(i)?.t()?)?;
        match bias {
            [bias] => product.broadcast_add(&bias.narrow(0, i * f, f)?.to_dtype(x.dtype())?),
            _ => Ok(product),
        }
    };
    let mut first = 0;
    let mut add = |y: Tensor, x: &Tensor, parts: &[LoraPart], sizes| {
        let n_blocks: usize = parts.iter().map(|part| part.blocks.len()).sum();
        let inputs = [&[y, x.clone()], &blocks[first..first + n_blocks]].concat();
        first += n_blocks;
        lora::composed(&inputs, parts, sizes, ffn.alpha)
    };
    let a = add(product(0)?, &x, &ffn.gate, (d, f))?;
    let b = add(product(1)?, &x, &ffn.up, (d, f))?;
    let hidden = (ffn.activation.composed(&a)? * b)?;
    let y = add(hidden.matmul(&matrix(2)?)?, &hidden, &ffn.down, (f, d))?.reshape(dims)?;
    match base {
        [base] => base + y,
        _ => Ok(y),
    }
}

struct GatedFfnLora {
    precision: Precision,
    activation: Activation,
    n: usize,
    f: usize,
    d: usize,
    /// Of M1, M2 and M3.
    loras: [Lora; 3],
}

/// What the forward keeps for the backward.
struct Kept {
    /// x·M1'ᵀ and x·M2'ᵀ, [N, 2F].
    products: Vec<f32>,
    /// α·x·Aᵀ of each matrix.
    inner: [Vec<f32>; 3],
}

impl GatedFfnLora {
    fn forward(&self, base: Option<&Traced>, x: &Traced, ffn: &FfnLora) -> Result<(Vec<f32>, Kept)> {
        let (n, f, d) = (self.n, self.f, self.d);
        let base = base.map(|base| read(base.value())).transpose()?;
        let bias = ffn.bias.as_ref().map(|bias| read(bias.value())).transpose()?;
        let (x, weights) = (&*read(x.value())?, read(ffn.block.value())?);
        let (w_in, w_out) = weights.split_at(2 * f * d);
        let x = View::rows(x, d);
        let mut products = output(n * 2 * f);
        let from = match &bias {
            // Every row adds the same one: the rows of the addend lie 0 apart.
            Some(bias) => Addend::Other { values: Shared::of(bias), offset: 0, row: 0 },
            None => Addend::Zero,
        };
        let to = Output { to: Shared::new(&mut products), offset: 0, row: 2 * f, from };
        let right = Right::pack(self.precision, View::transposed(w_in, d), (d, 2 * f), Threads::All);
        // SAFETY: the products are [N, 2F] and nobody else's; so are the halves of their rows.
        let [gate, up] = unsafe {
            multiply_all((n, x), right.all(), to, Threads::All);
            let to = Output { from: Addend::Itself, ..to };
            [self.loras[0].forward(x, to)?, self.loras[1].forward(x, to.skip(0, f))?]
        };
        let mut hidden = output(n * f);
        let rows = products.par_chunks_exact(2 * f).zip(hidden.par_chunks_exact_mut(f));
        rows.for_each(|(products, hidden)| self.activation.gate(products.split_at(hidden.len()), hidden));
        let mut y = output(n * d);
        let from = match &base {
            Some(base) => Addend::Other { values: Shared::of(base), offset: 0, row: d },
            None => Addend::Zero,
        };
        let to = Output { to: Shared::new(&mut y), offset: 0, row: d, from };
        let right = Right::pack(self.precision, View::rows(w_out, d), (f, d), Threads::All);
        let hidden = View::rows(&hidden, f);
        // SAFETY: y and the base are whole [N, D] matrices, and y is uniquely borrowed.
        let down = unsafe {
            multiply_all((n, hidden), right.all(), to, Threads::All);
            self.loras[2].forward(hidden, Output { from: Addend::Itself, ..to })?
        };
        Ok((y, Kept { products, inner: [gate, up, down] }))
    }

    /// Adds to the gradients of x, the FFN and all blocks.
    fn backward(
        &self,
        (x, x_values): (&Place, &Tensor),
        (block, bias): (&Traced, Option<&Place>),
        dy: &Tensor,
        Kept { mut products, inner }: Kept,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (n, f, d) = (self.n, self.f, self.d);
        let (x_values, dy, weights) = (&*read(x_values)?, &*read(dy)?, read(block.value())?);
        let (w_in, w_out) = weights.split_at(2 * f * d);
        let (x_rows, dy) = (View::rows(x_values, d), View::rows(dy, d));
        let [gate, up, down] = &self.loras;

        let mut dhidden = output(n * f);
        let size = Size { m: n, n: f, k: d };
        let over = (Write::Over, Threads::All);
        gemm(self.precision, size, (&mut dhidden, f), (dy, View::transposed(w_out, d)), over);
        let to = Output { to: Shared::new(&mut dhidden), offset: 0, row: f, from: Addend::Itself };
        // SAFETY: the gradient of the hidden activations is [N, F] and nobody else's.
        let ddown = unsafe { down.backward(dy, Some(to))? };
        let mut hidden = output(n * f);
        let rows = products.par_chunks_exact_mut(2 * f).zip(dhidden.par_chunks_exact(f));
        rows.zip(hidden.par_chunks_exact_mut(f)).for_each(|((products, dhidden), hidden)| {
            self.activation.gate_backward(products, dhidden, hidden)
        });
        down.backward_blocks([View::rows(&hidden, f), dy], [&inner[2], &ddown], gradients)?;

        let dproducts = View::rows(&products, 2 * f);
        let halves = [dproducts, View::rows(&products[f..], 2 * f)];
        let dinner = match gradients.buffer(x)? {
            // SAFETY: nothing is written.
            None => unsafe { [gate.backward(halves[0], None)?, up.backward(halves[1], None)?] },
            Some((dx, into)) => with_mut(&dx, |dx| -> Result<[Vec<f32>; 2]> {
                let size = Size { m: n, n: d, k: 2 * f };
                let operands = (dproducts, View::rows(w_in, d));
                gemm(self.precision, size, (&mut *dx, d), operands, (into, Threads::All));
                let to = Output { to: Shared::new(dx), offset: 0, row: d, from: Addend::Itself };
                // SAFETY: dx is [N, D] and uniquely borrowed.
                unsafe { Ok([gate.backward(halves[0], Some(to))?, up.backward(halves[1], Some(to))?]) }
            })??,
        };
        gate.backward_blocks([x_rows, halves[0]], [&inner[0], &dinner[0]], gradients)?;
        up.backward_blocks([x_rows, halves[1]], [&inner[1], &dinner[1]], gradients)?;
        if let Some(bias) = bias {
            gradients.write(bias, |dbias, into| sum_of_rows(&products, (2 * f, 0..2 * f), dbias, into))?;
        }
        gradients.write(block, |gradient, into| {
            let (dw_in, dw_out) = gradient.split_at_mut(2 * f * d);
            let sizes = (Size { m: 2 * f, n: d, k: n }, Size { m: f, n: d, k: n });
            let how = (into, Threads::All);
            gemm(self.precision, sizes.0, (dw_in, d), (View::transposed(&products, 2 * f), x_rows), how);
            gemm(self.precision, sizes.1, (dw_out, d), (View::transposed(&hidden, f), dy), how);
        })
    }
}
