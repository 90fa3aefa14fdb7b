//! Low-rank additions to a linear layer (LoRA, Hu et al., arXiv 2106.09685) that memory brings: those of a block
//! serve the rows of the sequences that fetched it.
//!
//! Rows are cut into tiles that use one block of each part. The matrices of a block are packed once, whatever the
//! number of sequences that share it.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::buffer::{Shared, output, read, tensor, with_mut};
use crate::gemm::{Addend, Output, Right, Threads, View, multiply};
use crate::runs::{self, Tile};
use crate::tape::repeat_a_slot;
use crate::{Gradients, Precision, Run, Tape, Traced};

/// Rows of a tile, at most.
const ROWS: usize = 128;

/// Matrices A and B of one rank R, and the rows that each pair serves.
#[derive(Clone, Debug)]
pub struct LoraPart {
    /// One a block, of R·(I + O) numbers: A [R, I], then B [R, O], stored transposed. A block in no run gets no
    /// gradient.
    pub blocks: Vec<Traced>,
    /// In order of rows, without overlap; rows in no run are not served.
    pub runs: Vec<Run>,
}

impl LoraPart {
    /// The rank, after a check for a layer from `i` to `o` with `n_rows` rows.
    fn check(&self, n_rows: usize, (i, o): (usize, usize)) -> Result<usize> {
        let mut len = None;
        for block in &self.blocks {
            match block.value().dims() {
                &[n] if n > 0 && n % (i + o) == 0 && *len.get_or_insert(n) == n => {}
                dims => candle_core::bail!("lora: a block of {dims:?} for a layer from {i} to {o}"),
            }
        }
        runs::check("lora", &self.runs, self.blocks.len(), n_rows)?;
        Ok(len.unwrap_or(0) / (i + o))
    }
}

/// y = base + α·Σ_parts (x·Aᵀ)·Bᵀ, with A and B the matrices of the row's block in each part (arXiv 2510.02375 §3:
/// LoRA memory).
///
/// `base` [.., O], `x` [.., I]; y is shaped like base. The gradient of a block is summed over the runs that share it.
///
/// # Errors
/// When a run names a block or rows that do not exist, runs overlap or are out of order, or blocks of a part differ
/// in size.
pub fn lora(tape: &mut Tape, base: &Traced, x: &Traced, parts: &[LoraPart], alpha: f32) -> Result<Traced> {
    let (o, i) = (*base.value().dims().last().unwrap_or(&0), *x.value().dims().last().unwrap_or(&0));
    let n_rows = base.value().elem_count() / o.max(1);
    if o == 0 || i == 0 || x.value().elem_count() != n_rows * i {
        candle_core::bail!("lora: base {:?}, x {:?}", base.value().dims(), x.value().dims());
    }
    let op = Lora::checked(tape.precision(), parts, (n_rows, i, o), alpha)?;
    let blocks: Vec<&Traced> = parts.iter().flat_map(|part| &part.blocks).collect();
    if repeat_a_slot(blocks.iter().copied()) {
        candle_core::bail!("lora: a block with a gradient is given twice");
    }
    if blocks.is_empty() {
        return Ok(base.clone());
    }
    let base_shape = base.value().shape().clone();
    let inputs: Vec<&Traced> = [base, x].into_iter().chain(blocks).collect();
    if !crate::fused(x.value()) {
        return tape.composed(&inputs, |inputs| composed(inputs, parts, (i, o), alpha));
    }
    let records = tape.records(&inputs);
    let (y, inner) = {
        let (base, x) = (read(base.value())?, read(x.value())?);
        let mut y = output(base.len());
        let from = Addend::Other { values: Shared::of(&base), offset: 0, row: o };
        let to = Output { to: Shared::new(&mut y), offset: 0, row: o, from };
        // SAFETY: y and the base are whole [N, O] matrices, and y is uniquely borrowed.
        let inner = unsafe { op.forward(View::rows(&x, i), to)? };
        (tensor(y, base_shape)?, inner)
    };
    if !records {
        return Ok(Traced::constant(y));
    }
    let (base, kept, x) = (base.place(), x.keep(), x.place());
    Ok(tape.record(y, move |dy, gradients| {
        {
            let (x_values, dy) = (kept.value()?, read(&dy)?);
            let (x_values, dy) = (read(&x_values)?, View::rows(&dy, o));
            let dinner = match gradients.buffer(&x)? {
                // SAFETY: nothing is written.
                None => unsafe { op.backward(dy, None)? },
                Some((dx, into)) => with_mut(&dx, |dx| {
                    let to = Output { to: Shared::new(dx), offset: 0, row: i, from: into.into() };
                    // SAFETY: dx is [N, I] and uniquely borrowed.
                    unsafe { op.backward(dy, Some(to)) }
                })??,
            };
            op.backward_blocks([View::rows(&x_values, i), dy], [&inner, &dinner], gradients)?;
        }
        gradients.give(&base, dy)
    }))
}

/// `inputs` are base, x and then all blocks.
pub(crate) fn composed(
    inputs: &[Tensor],
    parts: &[LoraPart],
    (i, o): (usize, usize),
    alpha: f32,
) -> Result<Tensor> {
    let [base, x, blocks @ ..] = inputs else { candle_core::bail!("lora: base or x is missing") };
    let rows = base.elem_count() / o;
    let (x, mut y) = (x.reshape((rows, i))?, base.reshape((rows, o))?);
    let mut first_block = 0;
    for part in parts {
        let mut pieces = vec![];
        let mut next = 0;
        for run in &part.runs {
            if run.first_row > next {
                pieces.push(y.narrow(0, next, run.first_row - next)?);
            }
            // Parameters are f32 beside activations of bf16.
            let block = blocks[first_block + run.block].to_dtype(x.dtype())?;
            let r = block.elem_count() / (i + o);
            let (a, b) = (block.narrow(0, 0, r * i)?, block.narrow(0, r * i, r * o)?);
            let (a, b) = (a.reshape((r, i))?, b.reshape((r, o))?);
            let inner = (x.narrow(0, run.first_row, run.n_rows)?.matmul(&a.t()?)? * f64::from(alpha))?;
            pieces.push((y.narrow(0, run.first_row, run.n_rows)? + inner.matmul(&b)?)?);
            next = run.first_row + run.n_rows;
        }
        if next < rows {
            pieces.push(y.narrow(0, next, rows - next)?);
        }
        y = Tensor::cat(&pieces, 0)?;
        first_block += part.blocks.len();
    }
    y.reshape(base.dims())
}

/// The additions to one linear layer.
pub(crate) struct Lora {
    precision: Precision,
    parts: Vec<LoraPart>,
    n_rows: usize,
    /// I and O.
    from: usize,
    to: usize,
    /// Per part: its rank, and the sum of the ranks before it.
    rank: Vec<usize>,
    first: Vec<usize>,
    /// Sum of all ranks.
    total: usize,
    alpha: f32,
    tiles: Vec<Tile>,
}

/// Two packed operands per block and part.
type Packed = Vec<Vec<[Right; 2]>>;

impl Lora {
    /// Those of `parts` to a layer from `from` to `to`, which serve some of `n_rows` rows; fails as [`lora`] does.
    pub(crate) fn checked(
        precision: Precision,
        parts: &[LoraPart],
        (n_rows, from, to): (usize, usize, usize),
        alpha: f32,
    ) -> Result<Self> {
        let rank: Vec<usize> =
            parts.iter().map(|part| part.check(n_rows, (from, to))).collect::<Result<_>>()?;
        let parts = parts.to_vec();
        let first = (0..rank.len()).map(|i| rank[..i].iter().sum()).collect();
        let total = rank.iter().sum();
        let runs: Vec<&[Run]> = parts.iter().map(|part| &part.runs[..]).collect();
        let tiles = runs::tiles(&runs, n_rows, ROWS);
        Ok(Self { precision, parts, n_rows, from, to, rank, first, total, alpha, tiles })
    }

    /// Packs two operands of every block: `pack(A, B, rank, threads)`.
    fn pack(&self, pack: impl Fn(&[f32], &[f32], usize, Threads) -> [Right; 2] + Sync) -> Result<Packed> {
        let of_part = |(part, &r): (&LoraPart, &usize)| {
            runs::pack_blocks(&part.blocks, |block, threads| {
                let values = read(block.value())?;
                let (a, b) = values.split_at(r * self.from);
                Ok(pack(a, b, r, threads))
            })
        };
        self.parts.iter().zip(&self.rank).map(of_part).collect()
    }

    /// Writes y, what is added to being what `to` says, and returns α·x·Aᵀ of all parts [N, ΣR] for the backward.
    ///
    /// # Safety
    /// `to` reaches N rows of O numbers, which nobody else touches.
    pub(crate) unsafe fn forward(&self, x: View, to: Output) -> Result<Vec<f32>> {
        let (i, o) = (self.from, self.to);
        let packed = self.pack(|a, b, r, threads| {
            [
                Right::pack(self.precision, View::transposed(a, i), (i, r), threads),
                Right::pack(self.precision, View::rows(b, o), (r, o), threads),
            ]
        })?;
        // SAFETY: the caller's promise.
        Ok(unsafe { self.through(&packed, (x, o), Some(to)) })
    }

    /// Adds the gradient of x to what `dx` says, and returns that of x·Aᵀ [N, ΣR].
    ///
    /// # Safety
    /// `dx` reaches N rows of I numbers, which nobody else touches.
    pub(crate) unsafe fn backward(&self, dy: View, dx: Option<Output>) -> Result<Vec<f32>> {
        let (i, o) = (self.from, self.to);
        let packed = self.pack(|a, b, r, threads| {
            [
                Right::pack(self.precision, View::transposed(b, o), (o, r), threads),
                Right::pack(self.precision, View::rows(a, i), (r, i), threads),
            ]
        })?;
        // SAFETY: the caller's promise.
        Ok(unsafe { self.through(&packed, (dy, i), dx) })
    }

    /// Rows through both operands of their blocks: returns α·rows·first [N, ΣR], and sends it times the second, of
    /// `width` columns, to `to`.
    ///
    /// # Safety
    /// `to` reaches N rows of `width` numbers, which nobody else touches.
    unsafe fn through(&self, packed: &Packed, (rows, width): (View, usize), to: Option<Output>) -> Vec<f32> {
        let total = self.total;
        let mut inner = output(self.n_rows * total);
        let inner_shared = Shared::new(&mut inner);
        self.tiles.par_iter().for_each(|tile| {
            let (m, first) = (tile.n_rows, tile.first_row);
            let rows = rows.skip_rows(first);
            let mut to = to.map(|to| to.skip(first, 0));
            for (part, block) in tile.blocks.iter().enumerate() {
                let Some(block) = block else { continue };
                let [into_inner, out_of_inner] = &packed[part][*block];
                let (offset, r) = (first * total + self.first[part], self.rank[part]);
                let to_inner = Output { to: inner_shared, offset, row: total, from: Addend::Zero };
                // SAFETY: tiles do not overlap, so their rows of every buffer are this task's own.
                unsafe {
                    multiply((m, rows), into_inner.all(), to_inner);
                    for i in 0..m {
                        let row = inner_shared.slice(offset + i * total, r);
                        row.iter_mut().for_each(|x| *x *= self.alpha);
                    }
                    if let Some(to) = &mut to {
                        let inner = inner_shared.slice(offset, (m - 1) * total + r);
                        multiply((m, View::rows(inner, total)), out_of_inner.all(), *to);
                        to.from = Addend::Itself;
                    }
                }
            }
            if let Some(to) = to.filter(|_| tile.blocks.iter().all(Option::is_none)) {
                // SAFETY: as above.
                unsafe { to.write_addend((m, width)) }
            }
        });
        inner
    }

    /// Adds to the gradients of the blocks: dA = dinnerᵀ·x and dB = innerᵀ·dy, transposed, over their rows.
    pub(crate) fn backward_blocks(
        &self,
        [x, dy]: [View; 2],
        [inner, dinner]: [&[f32]; 2],
        gradients: &mut Gradients,
    ) -> Result<()> {
        if self.parts.iter().flat_map(|part| &part.blocks).all(Traced::is_constant) {
            return Ok(());
        }
        let (n, total) = (self.n_rows, self.total);
        let pack = |rows, width| Right::pack(self.precision, rows, (n, width), Threads::All);
        let (x_packed, dy_packed) = (pack(x, self.from), pack(dy, self.to));
        for (part, (&r, &first)) in self.parts.iter().zip(self.rank.iter().zip(&self.first)) {
            runs::add_to_blocks((&part.blocks, &part.runs), gradients, |gradient, into, rows, threads| {
                let (da, db) = gradient.split_at_mut(r * self.from);
                let at = rows.start * total + first;
                let dinner = (r, View::transposed(&dinner[at..], total));
                runs::sum_over_rows(dinner, (&x_packed, x, rows.clone()), (da, into), threads);
                let inner = (r, View::transposed(&inner[at..], total));
                runs::sum_over_rows(inner, (&dy_packed, dy, rows), (db, into), threads);
            })?;
        }
        Ok(())
    }
}
