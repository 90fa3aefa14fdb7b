use candle_core::{CudaDevice, DType, Result, Tensor};

use super::{Argument, Grid, Matrix, device, gemm, launch, output, pointer, suffix};
use crate::gated_ffn::{FfnPart, Run};
use crate::gemm::Write;
use crate::{Tape, Traced};

/// One part's blocks in the type of the activations, and what its forward keeps.
struct Kept {
    part: FfnPart,
    /// Per block, [3, R, D].
    weights: Vec<Tensor>,
    /// x·[M1; M2]ᵀ of all rows, [N, 2R].
    products: Tensor,
    width: usize,
}

/// The rows of one run of one part.
struct Rows<'a> {
    cuda: &'a CudaDevice,
    name: &'static str,
    d: usize,
    width: usize,
    run: &'a Run,
}

impl Rows<'_> {
    /// The matrices [M1; M2] [2R, D] and M3 [R, D] of a block.
    fn matrices(&self, block: &Tensor) -> Result<[Matrix; 2]> {
        Ok([Matrix::rows(block, self.d, 0)?, Matrix::rows(block, self.d, 2 * self.width)?])
    }

    fn of(&self, t: &Tensor, width: usize) -> Result<Matrix> {
        Matrix::rows(t, width, self.run.first_row)
    }

    /// Launches `activate` or `activate_backward` on the products and hidden activations of the run.
    fn activate(&self, kernel: &str, products: Matrix, hidden: &Tensor) -> Result<()> {
        let n = self.run.n_rows;
        let arguments = [
            Argument::Pointer(products.pointer),
            Argument::Pointer(pointer(hidden, hidden.dtype())?),
            Argument::Size(n as u64),
            Argument::Int(self.width as i32),
        ];
        // SAFETY: the run has n rows of 2R products and of R hidden activations.
        unsafe {
            let kernel = format!("{kernel}_{}", self.name);
            launch(self.cuda, &kernel, Grid::elements(n * self.width), &arguments)
        }
    }

    fn forward(&self, x: &Tensor, block: &Tensor, products: &Tensor, y: &Tensor) -> Result<()> {
        let (m, r, d) = (self.run.n_rows, self.width, self.d);
        let [w_in, w_out] = self.matrices(block)?;
        let hidden = output((m, r), x.dtype(), x.device())?;
        let products = self.of(products, 2 * r)?;
        // SAFETY: x and y are rows of d, products rows of 2R, hidden m rows of R.
        unsafe {
            gemm(self.cuda, (m, 2 * r, d), [self.of(x, d)?, w_in.transposed()], products, Write::Over)?;
            self.activate("activate", products, &hidden)?;
            gemm(self.cuda, (m, d, r), [Matrix::rows(&hidden, r, 0)?, w_out], self.of(y, d)?, Write::Add)
        }
    }

    /// Replaces the run's products by their gradient; adds to dx, and to or over the block's gradient.
    fn backward(
        &self,
        [x, dy, block, products, dx]: [&Tensor; 5],
        gradient: Option<(&Tensor, Write)>,
    ) -> Result<()> {
        let (m, r, d) = (self.run.n_rows, self.width, self.d);
        let [w_in, w_out] = self.matrices(block)?;
        let hidden = output((m, r), x.dtype(), x.device())?;
        let products = self.of(products, 2 * r)?;
        let (x, dy) = (self.of(x, d)?, self.of(dy, d)?);
        let hidden_rows = Matrix::rows(&hidden, r, 0)?;
        // SAFETY: as in the forward; the gradient of a block is [3, R, D].
        unsafe {
            gemm(self.cuda, (m, r, d), [dy, w_out.transposed()], hidden_rows, Write::Over)?;
            self.activate("activate_backward", products, &hidden)?;
            if let Some((gradient, into)) = gradient {
                let [dw_in, dw_out] = self.matrices(gradient)?;
                gemm(self.cuda, (2 * r, d, m), [products.transposed(), x], dw_in, into)?;
                gemm(self.cuda, (r, d, m), [hidden_rows.transposed(), dy], dw_out, into)?;
            }
            gemm(self.cuda, (m, d, 2 * r), [products, w_in], self.of(dx, d)?, Write::Add)
        }
    }
}

/// The body of `gated_ffn`: a run of rows at a time, nothing copied per sequence.
pub(crate) fn gated_ffn(
    tape: &mut Tape,
    base: &Traced,
    x: &Traced,
    parts: Vec<FfnPart>,
    width: &[usize],
) -> Result<Traced> {
    let d = x.value().dim(candle_core::D::Minus1)?;
    let n_rows = x.value().elem_count() / d;
    let (cuda, name, dtype) = (device(x.value())?, suffix(x.value())?, x.value().dtype());
    let y = base.value().copy()?;
    let mut kept = vec![];
    for (part, &width) in parts.into_iter().zip(width) {
        let weights: Vec<Tensor> =
            part.blocks.iter().map(|block| block.value().to_dtype(dtype)).collect::<Result<_>>()?;
        let products = output((n_rows, 2 * width), dtype, x.value().device())?;
        for run in &part.runs {
            let rows = Rows { cuda: &cuda, name, d, width, run };
            rows.forward(x.value(), &weights[run.block], &products, &y)?;
        }
        kept.push(Kept { part, weights, products, width });
    }
    let blocks = kept.iter().flat_map(|kept| &kept.part.blocks);
    let inputs: Vec<&Traced> = [base, x].into_iter().chain(blocks).collect();
    if !tape.records(&inputs) {
        return Ok(Traced::constant(y));
    }
    let (base, x) = (base.clone(), x.clone());
    Ok(tape.record(y, move |dy, gradients| {
        let dy = dy.contiguous()?;
        let (dx, into) = match gradients.device_buffer(&x, dtype)? {
            Some(buffer) => buffer,
            None => (output(x.value().shape(), dtype, x.value().device())?, Write::Over),
        };
        // Rows may be in several runs, or in none.
        if into == Write::Over {
            dx.zero_set()?;
        }
        for Kept { part, weights, products, width } in &kept {
            for run in &part.runs {
                let block = run.block;
                let rows = Rows { cuda: &cuda, name, d, width: *width, run };
                let buffer = gradients.device_buffer(&part.blocks[block], DType::F32)?;
                let gradient = buffer.as_ref().map(|(gradient, into)| (gradient, *into));
                let tensors = [x.value(), &dy, &weights[block], products, &dx];
                rows.backward(tensors, gradient)?;
            }
        }
        gradients.give(&base, dy)
    }))
}
