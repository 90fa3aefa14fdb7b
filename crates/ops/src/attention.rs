//! Causal attention with per-document masks: tiled over queries, recomputed in the backward, with work
//! proportional to the part of the mask that is not zero.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::buffer::{Shared, output, tensor_like, values, with};
use crate::gemm::{Into, Size, Threads, View, gemm, gemm_raw};
use crate::math::{dot, exp, exp_sub_sum, max, scale};

/// Query rows of a tile.
const ROWS: usize = 64;

/// Sizes of one attention call.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Sequences, B.
    pub batch: usize,
    /// Query positions, T. They are the last T of the S key positions.
    pub queries: usize,
    /// Key positions, S ≥ T.
    pub keys: usize,
    /// Heads, H.
    pub heads: usize,
    /// Width of a head, K.
    pub head_width: usize,
}

impl AttentionShape {
    fn width(&self) -> usize {
        self.heads * self.head_width
    }

    fn check(&self, q: &Tensor, k: &Tensor, v: &Tensor, starts: &[u32]) -> Result<()> {
        let (b, t, s, d) = (self.batch, self.queries, self.keys, self.width());
        if q.dims() != [b, t, d] || k.dims() != [b, s, d] || v.dims() != [b, s, d] || s < t {
            candle_core::bail!(
                "attention: {self:?} given q {:?}, k {:?}, v {:?}",
                q.dims(),
                k.dims(),
                v.dims()
            );
        }
        if starts.len() != b * t {
            candle_core::bail!("attention: {} document starts for {} queries", starts.len(), b * t);
        }
        let late = starts.iter().enumerate().find(|&(i, &start)| start as usize > s - t + i % t);
        if let Some((i, start)) = late {
            candle_core::bail!("attention: query {} of sequence {} starts at key {start}", i % t, i / t);
        }
        Ok(())
    }
}

/// softmax(q·kᵀ/√K)·v per head, where query t (at key position S − T + t) sees the keys
/// `starts[b, t] ..= S − T + t`.
///
/// `q` [B, T, H·K], `k`, `v` [B, S, H·K]; the result is shaped like q.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    starts: &[u32],
    shape: AttentionShape,
) -> Result<Tensor> {
    shape.check(q, k, v, starts)?;
    if crate::fused(q) {
        let op = Attention { shape, starts: starts.to_vec(), log_sum_exp: OnceLock::new() };
        return q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op);
    }
    let AttentionShape { batch: b, queries: t, keys: s, heads: h, head_width } = shape;
    let mut mask = vec![0f32; b * t * s];
    for (row, (mask, &start)) in mask.chunks_exact_mut(s).zip(starts).enumerate() {
        mask[..start as usize].fill(f32::NEG_INFINITY);
        mask[s - t + row % t + 1..].fill(f32::NEG_INFINITY);
    }
    let mask = Tensor::from_vec(mask, (b, 1, t, s), q.device())?.to_dtype(q.dtype())?;
    let split = |x: &Tensor, n: usize| x.reshape((b, n, h, head_width))?.transpose(1, 2)?.contiguous();
    let (q, k, v) = (split(q, t)?, split(k, s)?, split(v, s)?);
    let scores = (q.matmul(&k.t()?)? * (1.0 / (head_width as f64).sqrt()))?.broadcast_add(&mask)?;
    let largest = scores.max_keepdim(D::Minus1)?.detach();
    let weights = scores.broadcast_sub(&largest)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    weights.matmul(&v)?.transpose(1, 2)?.reshape((b, t, h * head_width))
}

struct Attention {
    shape: AttentionShape,
    starts: Vec<u32>,
    /// [B, H, T], kept by the forward for the backward.
    log_sum_exp: OnceLock<Vec<f32>>,
}

/// One tile: `n_rows` queries from `first_row` of one head of one sequence, against the keys
/// `first_key .. end_key` that any of them sees.
struct Tile {
    first_row: usize,
    n_rows: usize,
    first_key: usize,
    end_key: usize,
}

impl Attention {
    fn scale(&self) -> f32 {
        1.0 / (self.shape.head_width as f32).sqrt()
    }

    fn tiles(&self, sequence: usize) -> impl Iterator<Item = Tile> + '_ {
        let (t, s) = (self.shape.queries, self.shape.keys);
        (0..t).step_by(ROWS).map(move |first_row| {
            let n_rows = ROWS.min(t - first_row);
            let starts = &self.starts[sequence * t + first_row..][..n_rows];
            let first_key = starts.iter().copied().min().unwrap_or(0) as usize;
            Tile { first_row, n_rows, first_key, end_key: s - t + first_row + n_rows }
        })
    }

    /// The columns of a tile that row `i` of it sees.
    fn visible(&self, sequence: usize, tile: &Tile, i: usize) -> std::ops::Range<usize> {
        let row = tile.first_row + i;
        let start = self.starts[sequence * self.shape.queries + row] as usize;
        start - tile.first_key..self.shape.keys - self.shape.queries + row + 1 - tile.first_key
    }

    fn forward(&self, q: &[f32], k: &[f32], v: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let AttentionShape { batch, queries: t, keys: s, heads, head_width } = self.shape;
        let d = self.shape.width();
        let mut y = output(q.len());
        let mut log_sum_exp = output(batch * heads * t);
        let y_shared = Shared::new(&mut y);
        let scratch = || output(ROWS * s);
        log_sum_exp.par_chunks_mut(t).enumerate().for_each_init(scratch, |scores, (task, log_sum_exp)| {
            let (sequence, head) = (task / heads, task % heads);
            let (q_base, k_base) =
                (sequence * t * d + head * head_width, sequence * s * d + head * head_width);
            for tile in self.tiles(sequence) {
                let (m, n) = (tile.n_rows, tile.end_key - tile.first_key);
                let q = View::rows(&q[q_base + tile.first_row * d..], d);
                let keys = k_base + tile.first_key * d;
                let size = Size { m, n, k: head_width };
                let dst = (&mut scores[..m * n], n);
                gemm(size, dst, q, View::transposed(&k[keys..], d), Into::Overwrite, Threads::One);
                for (i, row) in scores[..m * n].chunks_exact_mut(n).enumerate() {
                    let visible = self.visible(sequence, &tile, i);
                    row[..visible.start].fill(0.0);
                    row[visible.end..].fill(0.0);
                    let row = &mut row[visible];
                    scale(row, self.scale());
                    let largest = max(row);
                    let sum = exp_sub_sum(row, largest);
                    scale(row, 1.0 / sum);
                    log_sum_exp[tile.first_row + i] = sum.ln() + largest;
                }
                let size = Size { m, n: head_width, k: n };
                // SAFETY: the head's columns of the tile's rows belong to this task alone, and lie in y.
                unsafe {
                    let dst = (y_shared.at(q_base + tile.first_row * d), d);
                    let scores = View::rows(&scores[..m * n], n);
                    gemm_raw(size, dst, scores, View::rows(&v[keys..], d), Into::Overwrite, Threads::One);
                }
            }
        });
        (y, log_sum_exp)
    }

    fn backward(&self, [q, k, v, y, dy]: [&[f32]; 5]) -> [Vec<f32>; 3] {
        let AttentionShape { batch, heads, keys: s, .. } = self.shape;
        let (mut dq, mut dk, mut dv) = (output(q.len()), vec![0f32; k.len()], vec![0f32; v.len()]);
        let gradients = [Shared::new(&mut dq), Shared::new(&mut dk), Shared::new(&mut dv)];
        let scratch = || (output(ROWS * s), output(ROWS * s));
        (0..batch * heads).into_par_iter().for_each_init(scratch, |(p, dp), task| {
            let (sequence, head) = (task / heads, task % heads);
            for tile in self.tiles(sequence) {
                self.backward_tile(&tile, (sequence, head), [q, k, v, y, dy], gradients, [p, dp]);
            }
        });
        [dq, dk, dv]
    }

    fn backward_tile(
        &self,
        tile: &Tile,
        (sequence, head): (usize, usize),
        [q, k, v, y, dy]: [&[f32]; 5],
        [dq, dk, dv]: [Shared; 3],
        [p, dp]: [&mut [f32]; 2],
    ) {
        let AttentionShape { queries: t, keys: s, heads, head_width, .. } = self.shape;
        let d = self.shape.width();
        let (m, n) = (tile.n_rows, tile.end_key - tile.first_key);
        let row_base = (sequence * t + tile.first_row) * d + head * head_width;
        let key_base = (sequence * s + tile.first_key) * d + head * head_width;
        let (p, dp) = (&mut p[..m * n], &mut dp[..m * n]);
        let size = Size { m, n, k: head_width };
        let (q_rows, dy_rows) = (View::rows(&q[row_base..], d), View::rows(&dy[row_base..], d));
        let (keys, key_columns) = (View::rows(&k[key_base..], d), View::transposed(&k[key_base..], d));
        let value_columns = View::transposed(&v[key_base..], d);
        gemm(size, (p, n), q_rows, key_columns, Into::Overwrite, Threads::One);
        gemm(size, (dp, n), dy_rows, value_columns, Into::Overwrite, Threads::One);
        let log_sum_exp = self.log_sum_exp.get().expect("the forward ran before its backward");
        let log_sum_exp = &log_sum_exp[(sequence * heads + head) * t + tile.first_row..][..m];
        for (i, (p, dp)) in p.chunks_exact_mut(n).zip(dp.chunks_exact_mut(n)).enumerate() {
            let visible = self.visible(sequence, tile, i);
            for row in [&mut *p, &mut *dp] {
                row[..visible.start].fill(0.0);
                row[visible.end..].fill(0.0);
            }
            let row = row_base + i * d;
            let delta = dot(&y[row..row + head_width], &dy[row..row + head_width]);
            let (scale, shift) = (self.scale(), log_sum_exp[i]);
            for (p, dp) in p[visible.clone()].iter_mut().zip(&mut dp[visible]) {
                *p = exp(*p * scale - shift);
                *dp = *p * (*dp - delta) * scale;
            }
        }
        let by_key = Size { m: n, n: head_width, k: m };
        let by_query = Size { m, n: head_width, k: n };
        // SAFETY: one task holds a head of a sequence, so its columns of dq, dk and dv are its own; all
        // offsets lie in the buffers.
        unsafe {
            let add = Into::Add;
            gemm_raw(by_key, (dv.at(key_base), d), View::transposed(p, n), dy_rows, add, Threads::One);
            gemm_raw(by_key, (dk.at(key_base), d), View::transposed(dp, n), q_rows, add, Threads::One);
            let dst = (dq.at(row_base), d);
            gemm_raw(by_query, dst, View::rows(dp, n), keys, Into::Overwrite, Threads::One);
        }
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (y, log_sum_exp) = self.forward(values(q, q_layout)?, values(k, k_layout)?, values(v, v_layout)?);
        // An op is built for one call, so the cell is empty.
        let _ = self.log_sum_exp.set(log_sum_exp);
        Ok((CpuStorage::F32(y), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dq, dk, dv] = with(q, |q| {
            with(k, |k| with(v, |v| with(y, |y| with(dy, |dy| self.backward([q, k, v, y, dy])))))
        })?????;
        Ok((Some(tensor_like(dq, q)?), Some(tensor_like(dk, k)?), Some(tensor_like(dv, v)?)))
    }
}
