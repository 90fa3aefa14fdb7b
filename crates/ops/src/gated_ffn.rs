//! The gated FFN (SwiGLU, Shazeer, arXiv 2002.05202) whose weights differ by run of rows: the anchor's
//! own FFN is one block for all rows, FFN memory is one block per run of sequences that share it.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::buffer::{Shared, output, tensor_like, values, with};
use crate::gemm::{Into, Size, Threads, View, gemm};
use crate::math::sigmoid;

/// Rows of an elementwise task.
const ROWS: usize = 32;

/// Consecutive rows of x that use one block of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Index into the first dimension of the weights.
    pub block: usize,
    /// First row of x, counting B·T rows.
    pub first_row: usize,
    /// Rows of the run.
    pub n_rows: usize,
}

/// y = base + (silu(x·M1ᵀ) ⊙ (x·M2ᵀ))·M3, with [M1, M2, M3] = `weights[run.block]` for the rows of each
/// run (arXiv 2510.02375 §3: FFN memory); rows in no run keep `base`.
///
/// `base`, `x` [.., D]; `weights` [U, 3, R, D], M3 being stored transposed; y is shaped like base. The
/// gradient of a block is summed over the runs that share it.
///
/// # Errors
/// When a run names a block or rows that do not exist, or runs overlap or are out of order.
pub fn gated_ffn(base: &Tensor, x: &Tensor, weights: &Tensor, runs: &[Run]) -> Result<Tensor> {
    let (u, three, r, d) = weights.dims4()?;
    let n = x.elem_count() / d;
    if three != 3 || base.dims() != x.dims() || !x.dims().ends_with(&[d]) {
        candle_core::bail!(
            "gated ffn: base {:?}, x {:?}, weights {:?}",
            base.dims(),
            x.dims(),
            weights.dims()
        );
    }
    let mut end = 0;
    for run in runs {
        if run.block >= u || run.first_row < end || run.first_row + run.n_rows > n || run.n_rows == 0 {
            candle_core::bail!(
                "gated ffn: {run:?} over {u} blocks and {n} rows, rows below {end} being taken"
            );
        }
        end = run.first_row + run.n_rows;
    }
    if crate::fused(x) {
        let op = GatedFfn { runs: runs.to_vec(), width: r, d, products: OnceLock::new() };
        return base.contiguous()?.apply_op3(&x.contiguous()?, &weights.contiguous()?, op);
    }
    composed(base, x, weights, runs)
}

fn composed(base: &Tensor, x: &Tensor, weights: &Tensor, runs: &[Run]) -> Result<Tensor> {
    let d = weights.dim(3)?;
    let rows = x.elem_count() / d;
    let (flat, flat_base) = (x.reshape((rows, d))?, base.reshape((rows, d))?);
    let mut parts = vec![];
    let mut next = 0;
    for run in runs {
        if run.first_row > next {
            parts.push(flat_base.narrow(0, next, run.first_row - next)?);
        }
        let w = weights.narrow(0, run.block, 1)?.squeeze(0)?;
        let matrix = |i: usize| w.narrow(0, i, 1)?.squeeze(0);
        let x = flat.narrow(0, run.first_row, run.n_rows)?;
        let hidden = (x.matmul(&matrix(0)?.t()?)?.silu()? * x.matmul(&matrix(1)?.t()?)?)?;
        parts.push((flat_base.narrow(0, run.first_row, run.n_rows)? + hidden.matmul(&matrix(2)?)?)?);
        next = run.first_row + run.n_rows;
    }
    if next < rows {
        parts.push(flat_base.narrow(0, next, rows - next)?);
    }
    Tensor::cat(&parts, 0)?.reshape(base.dims())
}

struct GatedFfn {
    runs: Vec<Run>,
    width: usize,
    d: usize,
    /// x·[M1; M2]ᵀ [N, 2R], kept by the forward for the backward.
    products: OnceLock<Vec<f32>>,
}

/// hidden = silu(a) ⊙ b for rows `[a, b]` of `products`.
fn activate(products: &[f32], hidden: &mut [f32], r: usize) {
    hidden.par_chunks_mut(ROWS * r).zip(products.par_chunks(ROWS * 2 * r)).for_each(|(hidden, products)| {
        for (hidden, row) in hidden.chunks_exact_mut(r).zip(products.chunks_exact(2 * r)) {
            let (a, b) = row.split_at(r);
            for i in 0..r {
                hidden[i] = a[i] * sigmoid(a[i]) * b[i];
            }
        }
    });
}

/// Overwrites `dhidden`'s counterpart: d[a, b] into `dproducts` and silu(a) ⊙ b into `hidden`.
fn activate_backward(products: &[f32], dhidden: &[f32], hidden: &mut [f32], dproducts: &mut [f32], r: usize) {
    let inputs = products.par_chunks(ROWS * 2 * r).zip(dhidden.par_chunks(ROWS * r));
    let outputs = hidden.par_chunks_mut(ROWS * r).zip(dproducts.par_chunks_mut(ROWS * 2 * r));
    inputs.zip(outputs).for_each(|((products, dhidden), (hidden, dproducts))| {
        let inputs = products.chunks_exact(2 * r).zip(dhidden.chunks_exact(r));
        let outputs = hidden.chunks_exact_mut(r).zip(dproducts.chunks_exact_mut(2 * r));
        for ((row, dhidden), (hidden, drow)) in inputs.zip(outputs) {
            let (a, b) = row.split_at(r);
            let (da, db) = drow.split_at_mut(r);
            for i in 0..r {
                let s = sigmoid(a[i]);
                let silu = a[i] * s;
                hidden[i] = silu * b[i];
                db[i] = dhidden[i] * silu;
                da[i] = dhidden[i] * b[i] * (s + silu * (1.0 - s));
            }
        }
    });
}

impl GatedFfn {
    /// Runs by block, blocks in ascending order.
    fn by_block(&self) -> Vec<(usize, Vec<Run>)> {
        let mut blocks: BTreeMap<usize, Vec<Run>> = BTreeMap::new();
        for run in &self.runs {
            blocks.entry(run.block).or_default().push(*run);
        }
        blocks.into_iter().collect()
    }

    /// With at least as many tasks as threads, a task takes one thread; else each product takes all.
    fn split(n_tasks: usize) -> Threads {
        if n_tasks >= rayon::current_num_threads() { Threads::One } else { Threads::All }
    }

    fn forward_run(
        &self,
        run: &Run,
        x: &[f32],
        w: &[f32],
        threads: Threads,
        (y, products): (Shared, Shared),
    ) {
        let (r, d, m) = (self.width, self.d, run.n_rows);
        // SAFETY: runs do not overlap (checked when the op is built), so their rows are this task's own.
        let (y, products) =
            unsafe { (y.slice(run.first_row * d, m * d), products.slice(run.first_row * 2 * r, m * 2 * r)) };
        let x = View::rows(&x[run.first_row * d..], d);
        let size = Size { m, n: 2 * r, k: d };
        let into_hidden = View::transposed(&w[..2 * r * d], d);
        gemm(size, (&mut *products, 2 * r), x, into_hidden, Into::Overwrite, threads);
        let mut hidden = output(m * r);
        activate(products, &mut hidden, r);
        let size = Size { m, n: d, k: r };
        gemm(size, (y, d), View::rows(&hidden, r), View::rows(&w[2 * r * d..], d), Into::Add, threads);
    }

    /// Gradients of one run: adds (or writes, for a block's first run) into `dw` unless the weights are
    /// frozen, writes its rows of `dx`.
    fn backward_run(
        &self,
        run: &Run,
        [x, w, dy]: [&[f32]; 3],
        (dx, dw): (Shared, Option<&mut [f32]>),
        (into, threads): (Into, Threads),
    ) {
        let (r, d, m) = (self.width, self.d, run.n_rows);
        // SAFETY: runs do not overlap, so the run's rows of dx are this task's own.
        let dx = unsafe { dx.slice(run.first_row * d, m * d) };
        let products = self.products.get().expect("the forward ran before its backward");
        let products = &products[run.first_row * 2 * r..][..m * 2 * r];
        let x_rows = View::rows(&x[run.first_row * d..][..m * d], d);
        let dy = &dy[run.first_row * d..][..m * d];
        let dy_rows = View::rows(dy, d);
        let (mut dhidden, mut hidden, mut dproducts) = (output(m * r), output(m * r), output(m * 2 * r));
        let size = Size { m, n: r, k: d };
        let out_of_hidden = View::transposed(&w[2 * r * d..], d);
        gemm(size, (&mut dhidden, r), dy_rows, out_of_hidden, Into::Overwrite, threads);
        activate_backward(products, &dhidden, &mut hidden, &mut dproducts, r);
        if let Some(dw) = dw {
            let (dw_in, dw_out) = dw.split_at_mut(2 * r * d);
            let size = Size { m: r, n: d, k: m };
            gemm(size, (dw_out, d), View::transposed(&hidden, r), dy_rows, into, threads);
            let size = Size { m: 2 * r, n: d, k: m };
            gemm(size, (dw_in, d), View::transposed(&dproducts, 2 * r), x_rows, into, threads);
        }
        let size = Size { m, n: d, k: 2 * r };
        let dproducts = View::rows(&dproducts, 2 * r);
        gemm(size, (dx, d), dproducts, View::rows(&w[..2 * r * d], d), Into::Overwrite, threads);
    }

    /// Gradients of x and, unless they are frozen, of the weights (else empty).
    fn backward(&self, [x, w, dy]: [&[f32]; 3], frozen: bool) -> (Vec<f32>, Vec<f32>) {
        let block_len = 3 * self.width * self.d;
        let (mut dx, mut dw) = (vec![0f32; x.len()], vec![0f32; if frozen { 0 } else { w.len() }]);
        let dx_shared = Shared::new(&mut dx);
        let by_block = self.by_block();
        let threads = Self::split(by_block.len());
        let mut dw_blocks: Vec<_> = dw.chunks_exact_mut(block_len).map(Some).collect();
        let mut tasks: Vec<_> = by_block
            .iter()
            .map(|(block, runs)| (*block, runs, dw_blocks.get_mut(*block).and_then(Option::take)))
            .collect();
        let backward_block = |(block, runs, dw): &mut (usize, &Vec<Run>, Option<&mut [f32]>)| {
            let w = &w[*block * block_len..][..block_len];
            for (i, run) in runs.iter().enumerate() {
                let into = if i == 0 { Into::Overwrite } else { Into::Add };
                self.backward_run(run, [x, w, dy], (dx_shared, dw.as_deref_mut()), (into, threads));
            }
        };
        match threads {
            Threads::One => tasks.par_iter_mut().for_each(backward_block),
            Threads::All => tasks.iter_mut().for_each(backward_block),
        }
        (dx, dw)
    }
}

impl CustomOp3 for GatedFfn {
    fn name(&self) -> &'static str {
        "gated-ffn"
    }

    fn cpu_fwd(
        &self,
        base: &CpuStorage,
        base_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (values(x, x_layout)?, values(w, w_layout)?);
        let block_len = 3 * self.width * self.d;
        let mut y = values(base, base_layout)?.to_vec();
        let mut products = output(x.len() / self.d * 2 * self.width);
        let outputs = (Shared::new(&mut y), Shared::new(&mut products));
        let threads = Self::split(self.runs.len());
        let forward_run =
            |run: &Run| self.forward_run(run, x, &w[run.block * block_len..][..block_len], threads, outputs);
        match threads {
            Threads::One => self.runs.par_iter().for_each(forward_run),
            Threads::All => self.runs.iter().for_each(forward_run),
        }
        // An op is built for one call, so the cell is empty.
        let _ = self.products.set(products);
        Ok((CpuStorage::F32(y), base_layout.shape().clone()))
    }

    fn bwd(
        &self,
        _base: &Tensor,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let frozen = !w.track_op();
        let (dx, dw) =
            with(x, |x| with(w, |weights| with(dy, |dy| self.backward([x, weights, dy], frozen))))???;
        let dw = if frozen { None } else { Some(tensor_like(dw, w)?) };
        Ok((Some(dy.clone()), Some(tensor_like(dx, x)?), dw))
    }
}
