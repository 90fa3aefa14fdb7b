//! Rotary position embedding (Su et al., arXiv 2104.09864), halves layout: dimension i is rotated with
//! dimension i + K/2; in one pass with the norm of queries and keys that comes before it.

use std::sync::Arc;

use candle_core::{D, Result, Tensor};
use rayon::prelude::*;

use crate::buffer::{output, read, tensor};
use crate::rms_norm::{self, RmsNorm};
use crate::{Tape, Traced};

/// Rows a task takes.
const ROWS: usize = 32;

/// cos and sin of position · base^(−2i/K), each [n_positions, K/2].
#[derive(Clone, Debug)]
pub struct RopeTable {
    cos: Arc<Vec<f32>>,
    sin: Arc<Vec<f32>>,
    head_width: usize,
    n_positions: usize,
    #[cfg(feature = "cuda")]
    on_device: Arc<std::sync::OnceLock<[Tensor; 2]>>,
}

impl RopeTable {
    /// The table of the positions 0 .. `n_positions` for heads of even width `head_width`.
    ///
    /// # Panics
    /// When the width is odd or 0.
    pub fn new(n_positions: usize, head_width: usize, base: f64) -> Self {
        assert!(head_width > 0 && head_width.is_multiple_of(2), "rotary embedding turns pairs");
        let half = head_width / 2;
        let angle = |i: usize| (i / half) as f64 * base.powf(-2.0 * (i % half) as f64 / head_width as f64);
        Self {
            cos: Arc::new((0..n_positions * half).map(|i| angle(i).cos() as f32).collect()),
            sin: Arc::new((0..n_positions * half).map(|i| angle(i).sin() as f32).collect()),
            head_width,
            n_positions,
            #[cfg(feature = "cuda")]
            on_device: Arc::default(),
        }
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn head_width(&self) -> usize {
        self.head_width
    }

    /// The cosines and the sines on a device, copied there once.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(&self, device: &candle_core::Device) -> Result<[Tensor; 2]> {
        let on_it = |tables: &&[Tensor; 2]| tables[0].device().same_device(device);
        if let Some(tables) = self.on_device.get().filter(on_it) {
            return Ok(tables.clone());
        }
        let upload = |values: &[f32]| Tensor::from_slice(values, values.len(), device);
        let tables = [upload(&self.cos)?, upload(&self.sin)?];
        // Another device's tables stay; these are then uploaded again.
        let _ = self.on_device.set(tables.clone());
        Ok(tables)
    }

    /// Rotates the heads of one row in place, back when `inverse`.
    pub(crate) fn rotate(&self, row: &mut [f32], position: usize, inverse: bool) {
        let (k, half) = (self.head_width, self.head_width / 2);
        let (cos, sin) = (&self.cos[position * half..][..half], &self.sin[position * half..][..half]);
        let sign = if inverse { -1.0 } else { 1.0 };
        for head in row.chunks_exact_mut(k) {
            let (low, high) = head.split_at_mut(half);
            for i in 0..half {
                let (l, h, s) = (low[i], high[i], sin[i] * sign);
                low[i] = l * cos[i] - h * s;
                high[i] = h * cos[i] + l * s;
            }
        }
    }

    fn composed(&self, x: &Tensor, first_position: usize) -> Result<Tensor> {
        let (b, t, d) = x.dims3()?;
        let (k, half) = (self.head_width, self.head_width / 2);
        let part = |values: &[f32]| -> Result<Tensor> {
            let rows = values[first_position * half..][..t * half].to_vec();
            Tensor::from_vec(rows, (1, t, 1, half), x.device())?.to_dtype(x.dtype())
        };
        let (cos, sin) = (part(&self.cos)?, part(&self.sin)?);
        let x = x.reshape((b, t, d / k, k))?;
        let (low, high) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
        let rotated_low = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
        let rotated_high = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
        Tensor::cat(&[rotated_low, rotated_high], D::Minus1)?.reshape((b, t, d))
    }
}

/// The norm of queries or keys, and its rotation.
#[derive(Clone, Copy, Debug)]
pub struct NormRope<'a> {
    /// Cosines and sines.
    pub table: &'a RopeTable,
    /// Position of the first row of every sequence.
    pub first_position: usize,
    /// Added to the mean square.
    pub eps: f64,
}

/// RMSNorm over the full width with a gain, then every head rotated by its position: row t of `x` [B, T, H·K]
/// stands at `first_position + t`. `gain` [H·K].
///
/// Attention depends on differences of positions only, so documents packed in one sequence need no
/// position of their own.
///
/// # Errors
/// When a position lies outside the table, or x is not made of heads of its width.
pub fn norm_rope(tape: &mut Tape, x: &Traced, gain: &Traced, options: NormRope) -> Result<Traced> {
    let NormRope { table, first_position, eps } = options;
    let (_, t, d) = x.value().dims3()?;
    if first_position + t > table.n_positions {
        candle_core::bail!(
            "rope: position {} asked for, the table holds {}",
            first_position + t - 1,
            table.n_positions
        );
    }
    if d % table.head_width != 0 {
        candle_core::bail!("rope: x {:?} is not of heads of width {}", x.value().dims(), table.head_width);
    }
    rms_norm::check(x, gain)?;
    #[cfg(feature = "cuda")]
    if crate::on_gpu(x.value()) {
        let rotation = crate::cuda::Rotation { table, first_position, rows_per_sequence: t };
        return crate::cuda::norm(tape, x, gain, eps, Some(rotation));
    }
    if !crate::fused(x.value()) {
        return tape.composed(&[x, gain], |inputs| {
            table.composed(&rms_norm::composed(&inputs[0], &inputs[1], eps)?, first_position)
        });
    }
    let norm = RmsNorm { eps: eps as f32 };
    let rotation = Rotation { table: table.clone(), first_position, rows_per_sequence: t };
    let y = rotation.forward(norm, x.value(), gain.value())?;
    if !tape.records(&[x, gain]) {
        return Ok(Traced::constant(y));
    }
    let (x, gain, again) = (x.clone(), gain.clone(), rotation.clone());
    let (x_again, gain_again) = (x.value().clone(), gain.value().clone());
    let y = tape.record(y, move |dy, gradients| {
        let (x_values, g, dy) = (read(x.value())?, read(gain.value())?, read(&dy)?);
        norm.backward((&x, &x_values), (&gain, &g), gradients, |row, dy_row| {
            dy_row.copy_from_slice(&dy[row * d..][..d]);
            rotation.turn(dy_row, row, true);
        })
    });
    Ok(y.made_again_by(move || again.forward(norm, &x_again, &gain_again)))
}

/// The rotation of the rows of a batch.
#[derive(Clone)]
struct Rotation {
    table: RopeTable,
    first_position: usize,
    rows_per_sequence: usize,
}

impl Rotation {
    fn turn(&self, values: &mut [f32], row: usize, inverse: bool) {
        self.table.rotate(values, self.first_position + row % self.rows_per_sequence, inverse);
    }

    fn forward(&self, norm: RmsNorm, x: &Tensor, gain: &Tensor) -> Result<Tensor> {
        let mut y = output(x.elem_count());
        {
            let (x, gain) = (read(x)?, read(gain)?);
            let d = gain.len();
            let chunks = y.par_chunks_mut(d * ROWS).zip(x.par_chunks(d * ROWS)).enumerate();
            chunks.for_each(|(chunk, (y, x))| {
                for (row, (y, x)) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)).enumerate() {
                    norm.row(x, &gain, y);
                    self.turn(y, chunk * ROWS + row, false);
                }
            });
        }
        tensor(y, x.shape())
    }
}
