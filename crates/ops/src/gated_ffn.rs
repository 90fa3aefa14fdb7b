//! The gated FFN (SwiGLU and its kin, Shazeer, arXiv 2002.05202) that memory widens: the anchor's own weights serve all
//! rows, those of a memory block the rows of the sequences that fetched it.
//!
//! One pass over x computes all of them. Rows are cut into tiles that use one block of each part; a task
//! takes a tile from x to y, so that the hidden activations never leave its cache. The weights of a block are
//! packed once, whatever the number of sequences that share it.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::buffer::{Shared, output, read, tensor, with_mut};
use crate::gemm::{Addend, Output, Right, Threads, View, Write, multiply};
use crate::linear::sum_of_rows;
use crate::runs::{self, Tile};
use crate::tape::{Place, repeat_a_slot};
use crate::{Activation, Gradients, Precision, Tape, Traced};

/// Rows of a tile, at most.
const ROWS: usize = 128;

/// Consecutive rows of x that use one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Index into the blocks.
    pub block: usize,
    /// First row of x, counting B·T rows.
    pub first_row: usize,
    /// Rows of the run.
    pub n_rows: usize,
}

/// Weights of one width, and the rows that each of them serves.
#[derive(Clone, Debug)]
pub struct FfnPart {
    /// One a block, [M1, M2, M3] as [3, R, D], M3 being stored transposed. A block in no run gets no gradient.
    pub blocks: Vec<Traced>,
    /// In order of rows, without overlap; rows in no run are not served.
    pub runs: Vec<Run>,
    /// What is added to x·M1ᵀ and to x·M2ᵀ, [2·R], of all blocks.
    pub bias: Option<Traced>,
}

impl FfnPart {
    /// One block for all `n_rows` rows.
    pub fn everywhere(block: Traced, n_rows: usize) -> Self {
        Self { blocks: vec![block], runs: vec![Run { block: 0, first_row: 0, n_rows }], bias: None }
    }

    /// The width R, after a check against `n_rows` rows of width `d`.
    fn check(&self, n_rows: usize, d: usize) -> Result<usize> {
        let mut width = None;
        for block in &self.blocks {
            match block.value().dims() {
                &[3, r, width_of_x] if width_of_x == d && *width.get_or_insert(r) == r && r > 0 => {}
                dims => candle_core::bail!("gated ffn: a block of {dims:?} for x of width {d}"),
            }
        }
        let of_bias = self.bias.as_ref().map(|bias| bias.value().dims());
        if let Some(dims) = of_bias.filter(|dims| *dims != [2 * width.unwrap_or(0)]) {
            candle_core::bail!("gated ffn: a bias of {dims:?} for blocks of width {}", width.unwrap_or(0));
        }
        runs::check("gated ffn", &self.runs, self.blocks.len(), n_rows)?;
        Ok(width.unwrap_or(0))
    }
}

/// y = base + Σ_parts (f(x·M1ᵀ) ⊙ (x·M2ᵀ))·M3, with [M1, M2, M3] the block of the row in each part
/// (arXiv 2510.02375 §3: FFN memory) and f the activation. Without a base nothing is added.
///
/// `base`, `x` and y [.., D]. The gradient of a block is summed over the runs that share it.
///
/// # Errors
/// When a run names a block or rows that do not exist, runs overlap or are out of order, or blocks of a part
/// differ in width.
pub fn gated_ffn(
    tape: &mut Tape,
    base: Option<&Traced>,
    x: &Traced,
    activation: Activation,
    parts: Vec<FfnPart>,
) -> Result<Traced> {
    let d = *x.value().dims().last().unwrap_or(&0);
    let base_dims = base.map_or(x.value().dims(), |base| base.value().dims());
    if base_dims != x.value().dims() || d == 0 {
        candle_core::bail!("gated ffn: base {base_dims:?}, x {:?}", x.value().dims());
    }
    let n_rows = x.value().elem_count() / d;
    let mut width = vec![];
    for part in &parts {
        width.push(part.check(n_rows, d)?);
    }
    let blocks: Vec<&Traced> = parts.iter().flat_map(|part| part.blocks.iter().chain(&part.bias)).collect();
    if repeat_a_slot(blocks.iter().copied()) {
        candle_core::bail!("gated ffn: a block with a gradient is given twice");
    }
    let inputs: Vec<&Traced> = [x].into_iter().chain(blocks).chain(base).collect();
    #[cfg(feature = "cuda")]
    let plain = activation == Activation::Silu && parts.iter().all(|part| part.bias.is_none());
    #[cfg(feature = "cuda")]
    if let (true, Some(base)) = (plain && crate::on_gpu(x.value()), base) {
        return crate::cuda::gated_ffn(tape, base, x, parts, &width);
    }
    if !crate::fused(x.value()) {
        return tape.composed(&inputs, |inputs| composed(inputs, activation, &parts));
    }
    let records = tape.records(&inputs);
    let op = GatedFfn::new((tape.precision(), activation), parts, (n_rows, d), width);
    let (y, products) = op.forward(base, x)?;
    let y = tensor(y, x.value().shape())?;
    if !records {
        return Ok(Traced::constant(y));
    }
    let (base, kept, x) = (base.map(Traced::place), x.keep(), x.place());
    Ok(tape.record(y, move |dy, gradients| {
        op.backward((&x, &kept.value()?), &dy, products, gradients)?;
        match base {
            Some(base) => gradients.give(&base, dy),
            None => Ok(()),
        }
    }))
}

/// `inputs` are x, of each part the blocks and the bias if there is one, and the base if there is one.
fn composed(inputs: &[Tensor], activation: Activation, parts: &[FfnPart]) -> Result<Tensor> {
    let [x, blocks @ ..] = inputs else { candle_core::bail!("gated ffn: x is missing") };
    let n_blocks = parts.iter().map(|part| part.blocks.len() + usize::from(part.bias.is_some())).sum();
    let (blocks, base) = blocks.split_at(n_blocks);
    let (d, dims) = (x.dim(candle_core::D::Minus1)?, x.dims());
    let rows = x.elem_count() / d;
    let x = x.reshape((rows, d))?;
    let mut y = match base {
        [base] => base.reshape((rows, d))?,
        _ => x.zeros_like()?,
    };
    let mut first_block = 0;
    for part in parts {
        let next_part = first_block + part.blocks.len();
        let bias = part.bias.as_ref().map(|_| blocks[next_part].to_dtype(x.dtype())).transpose()?;
        let mut pieces = vec![];
        let mut next = 0;
        for run in &part.runs {
            if run.first_row > next {
                pieces.push(y.narrow(0, next, run.first_row - next)?);
            }
            let block = blocks[first_block + run.block].to_dtype(x.dtype())?;
            let matrix = |i: usize| block.narrow(0, i, 1)?.squeeze(0);
            let x = x.narrow(0, run.first_row, run.n_rows)?;
            let product = |i: usize| -> Result<Tensor> {
                let product = x.matmul(&matrix(i)?.t()?)?;
                let Some(bias) = &bias else { return Ok(product) };
                let r = bias.elem_count() / 2;
                product.broadcast_add(&bias.narrow(0, i * r, r)?)
            };
            let hidden = (activation.composed(&product(0)?)? * product(1)?)?;
            pieces.push((y.narrow(0, run.first_row, run.n_rows)? + hidden.matmul(&matrix(2)?)?)?);
            next = run.first_row + run.n_rows;
        }
        if next < rows {
            pieces.push(y.narrow(0, next, rows - next)?);
        }
        y = Tensor::cat(&pieces, 0)?;
        first_block = next_part + usize::from(part.bias.is_some());
    }
    y.reshape(dims)
}

struct GatedFfn {
    precision: Precision,
    activation: Activation,
    parts: Vec<FfnPart>,
    d: usize,
    /// Per part: its width, and the sum of the widths before it.
    width: Vec<usize>,
    first: Vec<usize>,
    /// Sum of all widths.
    total: usize,
    tiles: Vec<Tile>,
}

/// Two packed operands per block and part.
type Packed = Vec<Vec<[Right; 2]>>;

impl GatedFfn {
    fn new(
        (precision, activation): (Precision, Activation),
        parts: Vec<FfnPart>,
        (n_rows, d): (usize, usize),
        width: Vec<usize>,
    ) -> Self {
        let first = (0..width.len()).map(|i| width[..i].iter().sum()).collect();
        let total = width.iter().sum();
        let runs: Vec<&[Run]> = parts.iter().map(|part| &part.runs[..]).collect();
        let tiles = runs::tiles(&runs, n_rows, ROWS);
        Self { precision, activation, parts, d, width, first, total, tiles }
    }

    /// Packs two operands of every block: `pack(part, weights of the block, threads)`.
    fn pack(&self, pack: impl Fn(usize, &[f32], Threads) -> [Right; 2] + Sync) -> Result<Packed> {
        let of_part = |(i, part): (usize, &FfnPart)| {
            runs::pack_blocks(&part.blocks, |block, threads| Ok(pack(i, &read(block.value())?, threads)))
        };
        self.parts.iter().enumerate().map(of_part).collect()
    }

    /// y, and x·[M1; M2]ᵀ of all parts [N, 2·ΣR] for the backward.
    fn forward(&self, base: Option<&Traced>, x: &Traced) -> Result<(Vec<f32>, Vec<f32>)> {
        let (d, total) = (self.d, self.total);
        let base = base.map(|base| read(base.value())).transpose()?;
        let (base, x) = (base.as_deref(), &*read(x.value())?);
        let packed = self.pack(|part, w, threads| {
            let r = self.width[part];
            let (w_in, w_out) = w.split_at(2 * r * d);
            [
                Right::pack(self.precision, View::transposed(w_in, d), (d, 2 * r), threads),
                Right::pack(self.precision, View::rows(w_out, d), (r, d), threads),
            ]
        })?;
        let biases =
            self.parts.iter().map(|part| part.bias.as_ref().map(|bias| read(bias.value())).transpose());
        let biases = biases.collect::<Result<Vec<_>>>()?;
        let before: Vec<Addend> = biases
            .iter()
            .map(|bias| match bias {
                // Every row adds the same one: the rows of the addend lie 0 apart.
                Some(bias) => Addend::Other { values: Shared::of(bias), offset: 0, row: 0 },
                None => Addend::Zero,
            })
            .collect();
        let (mut y, mut products) = (output(x.len()), output(x.len() / d * 2 * total));
        let (y_shared, products_shared) = (Shared::new(&mut y), Shared::new(&mut products));
        let tile = |hidden: &mut Vec<f32>, tile: &Tile| {
            let m = tile.n_rows;
            let first = tile.first_row * d;
            let x_rows = View::rows(&x[first..][..m * d], d);
            let from = match base {
                Some(base) => Addend::Other { values: Shared::of(base), offset: first, row: d },
                None => Addend::Zero,
            };
            let mut to = Output { to: y_shared, offset: first, row: d, from };
            for (part, block) in tile.blocks.iter().enumerate() {
                let Some(block) = block else { continue };
                let [w_in, w_out] = &packed[part][*block];
                let (r, offset) = (self.width[part], self.products_of(tile, part));
                let products = Output { to: products_shared, offset, row: 2 * total, from: before[part] };
                hidden.resize(m * r, 0.0);
                // SAFETY: tiles do not overlap, so their rows of y and of the products are this task's own.
                unsafe {
                    multiply((m, x_rows), w_in.all(), products);
                    for (i, hidden) in hidden.chunks_exact_mut(r).enumerate() {
                        let products = products_shared.slice(offset + i * 2 * total, 2 * r);
                        self.activation.gate(products.split_at(hidden.len()), hidden);
                    }
                    multiply((m, View::rows(hidden, r)), w_out.all(), to);
                }
                to.from = Addend::Itself;
            }
            if tile.blocks.iter().all(Option::is_none) {
                // SAFETY: as above.
                let y = unsafe { y_shared.slice(first, m * d) };
                match base {
                    Some(base) => y.copy_from_slice(&base[first..][..m * d]),
                    None => y.fill(0.0),
                }
            }
        };
        self.tiles.par_iter().for_each_init(Vec::new, tile);
        Ok((y, products))
    }

    /// Where the products of a tile and a part begin.
    fn products_of(&self, tile: &Tile, part: usize) -> usize {
        (tile.first_row * self.total + self.first[part]) * 2
    }

    /// Adds to the gradients of x and of all blocks.
    fn backward(
        &self,
        (x, x_values): (&Place, &Tensor),
        dy: &Tensor,
        products: Vec<f32>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (x_values, dy) = (&*read(x_values)?, &*read(dy)?);
        let n_rows = x_values.len() / self.d;
        let (mut products, mut hidden) = (products, output(n_rows * self.total));
        match gradients.buffer(x)? {
            Some((dx, into)) => {
                with_mut(&dx, |dx| self.backward_tiles(dy, (&mut products, &mut hidden), (dx, into)))??;
            }
            None => {
                let unused = &mut output(x_values.len());
                self.backward_tiles(dy, (&mut products, &mut hidden), (unused, Write::Over))?;
            }
        }
        self.backward_weights([x_values, dy, &products, &hidden], gradients)
    }

    /// Replaces the products by their gradients, writes the hidden activations [N, ΣR] and the gradient of x.
    fn backward_tiles(
        &self,
        dy: &[f32],
        (products, hidden): (&mut [f32], &mut [f32]),
        (dx, into): (&mut [f32], Write),
    ) -> Result<()> {
        let (d, total) = (self.d, self.total);
        let packed = self.pack(|part, w, threads| {
            let r = self.width[part];
            let (w_in, w_out) = w.split_at(2 * r * d);
            [
                Right::pack(self.precision, View::transposed(w_out, d), (d, r), threads),
                Right::pack(self.precision, View::rows(w_in, d), (2 * r, d), threads),
            ]
        })?;
        let (products, hidden, dx) = (Shared::new(products), Shared::new(hidden), Shared::new(dx));
        self.tiles.par_iter().for_each_init(Vec::new, |dhidden, tile| {
            let (m, first) = (tile.n_rows, tile.first_row * d);
            let dy_rows = View::rows(&dy[first..][..m * d], d);
            let mut to = Output { to: dx, offset: first, row: d, from: into.into() };
            for (part, block) in tile.blocks.iter().enumerate() {
                let Some(block) = block else { continue };
                let [out_of_hidden, out_of_products] = &packed[part][*block];
                let (r, offset) = (self.width[part], self.products_of(tile, part));
                dhidden.resize(m * r, 0.0);
                let dhidden_to = Output { to: Shared::new(dhidden), offset: 0, row: r, from: Addend::Zero };
                // SAFETY: tiles do not overlap, so their rows of every buffer are this task's own.
                unsafe {
                    multiply((m, dy_rows), out_of_hidden.all(), dhidden_to);
                    for (i, dhidden) in dhidden.chunks_exact(r).enumerate() {
                        let products = products.slice(offset + i * 2 * total, 2 * r);
                        let hidden = hidden.slice(offset / 2 + i * total, r);
                        self.activation.gate_backward(products, dhidden, hidden);
                    }
                    let dproducts = products.slice(offset, (m - 1) * 2 * total + 2 * r);
                    multiply((m, View::rows(dproducts, 2 * total)), out_of_products.all(), to);
                }
                to.from = Addend::Itself;
            }
            if into == Write::Over && tile.blocks.iter().all(Option::is_none) {
                // SAFETY: as above.
                unsafe { dx.slice(first, m * d) }.fill(0.0);
            }
        });
        Ok(())
    }

    /// Adds to the gradients of the blocks: [dM1; dM2] = dproductsᵀ·x and dM3 = hiddenᵀ·dy over their rows.
    fn backward_weights(
        &self,
        [x, dy, dproducts, hidden]: [&[f32]; 4],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (d, total, n_rows) = (self.d, self.total, x.len() / self.d);
        for (i, part) in self.parts.iter().enumerate() {
            let Some(bias) = &part.bias else { continue };
            let columns = 2 * self.first[i]..2 * (self.first[i] + self.width[i]);
            gradients.write(bias, |dbias, mut into| {
                for run in &part.runs {
                    let rows = &dproducts[run.first_row * 2 * total..][..run.n_rows * 2 * total];
                    sum_of_rows(rows, (2 * total, columns.clone()), dbias, into);
                    into = Write::Add;
                }
            })?;
        }
        if self.parts.iter().flat_map(|part| &part.blocks).all(Traced::is_constant) {
            return Ok(());
        }
        let pack = |rows: &[f32]| Right::pack(self.precision, View::rows(rows, d), (n_rows, d), Threads::All);
        let (x_packed, dy_packed) = (pack(x), pack(dy));
        for (part, (&r, &first)) in self.parts.iter().zip(self.width.iter().zip(&self.first)) {
            runs::add_to_blocks((&part.blocks, &part.runs), gradients, |gradient, into, rows, threads| {
                let (dw_in, dw_out) = gradient.split_at_mut(2 * r * d);
                let at = rows.start * total + first;
                let products = (2 * r, View::transposed(&dproducts[2 * at..], 2 * total));
                let right = (&x_packed, View::rows(x, d), rows.clone());
                runs::sum_over_rows(products, right, (dw_in, into), threads);
                let hidden = (r, View::transposed(&hidden[at..], total));
                runs::sum_over_rows(hidden, (&dy_packed, View::rows(dy, d), rows), (dw_out, into), threads);
            })?;
        }
        Ok(())
    }
}
