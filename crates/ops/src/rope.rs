//! Rotary position embedding (Su et al., arXiv 2104.09864), halves layout: dimension i is rotated with
//! dimension i + K/2.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::buffer::{output, tensor_like, values, with};

/// Rows a task takes.
const ROWS: usize = 32;

/// cos and sin of position · base^(−2i/K), each [n_positions, K/2].
#[derive(Clone, Debug)]
pub struct RopeTable {
    cos: Arc<Vec<f32>>,
    sin: Arc<Vec<f32>>,
    head_width: usize,
    n_positions: usize,
}

impl RopeTable {
    /// The table of the positions 0 .. `n_positions` for heads of even width `head_width`.
    pub fn new(n_positions: usize, head_width: usize, base: f64) -> Self {
        let half = head_width / 2;
        let angle = |i: usize| (i / half) as f64 * base.powf(-2.0 * (i % half) as f64 / head_width as f64);
        Self {
            cos: Arc::new((0..n_positions * half).map(|i| angle(i).cos() as f32).collect()),
            sin: Arc::new((0..n_positions * half).map(|i| angle(i).sin() as f32).collect()),
            head_width,
            n_positions,
        }
    }
}

/// Rotates every head of `x` [B, T, H·K] by its position: row t stands at `first_position + t`.
///
/// Attention depends on differences of positions only, so documents packed in one sequence need no
/// position of their own.
///
/// # Errors
/// When a position lies outside the table.
pub fn rope(x: &Tensor, table: &RopeTable, first_position: usize) -> Result<Tensor> {
    let (b, t, d) = x.dims3()?;
    if first_position + t > table.n_positions {
        candle_core::bail!(
            "rope: position {} asked for, the table holds {}",
            first_position + t - 1,
            table.n_positions
        );
    }
    if d % table.head_width != 0 {
        candle_core::bail!("rope: x {:?} is not of heads of width {}", x.dims(), table.head_width);
    }
    if crate::fused(x) {
        let op = Rope { table: table.clone(), first_position, n_rows: t, inverse: false };
        return x.contiguous()?.apply_op1(op);
    }
    let (k, half) = (table.head_width, table.head_width / 2);
    let part = |values: &[f32]| -> Result<Tensor> {
        let rows = values[first_position * half..][..t * half].to_vec();
        Tensor::from_vec(rows, (1, t, 1, half), x.device())?.to_dtype(x.dtype())
    };
    let (cos, sin) = (part(&table.cos)?, part(&table.sin)?);
    let x = x.reshape((b, t, d / k, k))?;
    let (low, high) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let rotated_low = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
    let rotated_high = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
    Tensor::cat(&[rotated_low, rotated_high], D::Minus1)?.reshape((b, t, d))
}

struct Rope {
    table: RopeTable,
    first_position: usize,
    n_rows: usize,
    inverse: bool,
}

impl Rope {
    fn rotate(&self, x: &[f32], d: usize, inverse: bool) -> Vec<f32> {
        let (k, half) = (self.table.head_width, self.table.head_width / 2);
        let sign = if inverse { -1.0 } else { 1.0 };
        let mut y = output(x.len());
        y.par_chunks_mut(d * ROWS).zip(x.par_chunks(d * ROWS)).enumerate().for_each(|(chunk, (y, x))| {
            for (row, (y, x)) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)).enumerate() {
                let position = self.first_position + (chunk * ROWS + row) % self.n_rows;
                let cos = &self.table.cos[position * half..][..half];
                let sin = &self.table.sin[position * half..][..half];
                for (y, x) in y.chunks_exact_mut(k).zip(x.chunks_exact(k)) {
                    let (low, high) = x.split_at(half);
                    let (y_low, y_high) = y.split_at_mut(half);
                    for i in 0..half {
                        let s = sin[i] * sign;
                        y_low[i] = low[i] * cos[i] - high[i] * s;
                        y_high[i] = high[i] * cos[i] + low[i] * s;
                    }
                }
            }
        });
        y
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let d = layout.shape().dims()[2];
        Ok((CpuStorage::F32(self.rotate(values(x, layout)?, d, self.inverse)), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let d = x.dim(2)?;
        Ok(Some(tensor_like(with(dy, |dy| self.rotate(dy, d, !self.inverse))?, x)?))
    }
}
