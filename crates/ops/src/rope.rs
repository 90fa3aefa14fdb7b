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

/// cos and sin of the angles, position · frequency, by which pairs of dimensions turn, each [n_positions, K/2].
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
        let frequency = |i: usize| base.powf(-2.0 * i as f64 / head_width as f64);
        let frequencies: Vec<f64> = (0..head_width / 2).map(frequency).collect();
        Self::of_angles(n_positions, head_width, |position, i| position as f64 * frequencies[i])
    }

    /// The table of these frequencies, one a pair of dimensions. With `single` they and the angles are rounded to
    /// f32, as they were when most published models were trained.
    ///
    /// # Panics
    /// When there are none.
    pub fn of_frequencies(n_positions: usize, frequencies: &[f64], single: bool) -> Self {
        let rounded: Vec<f32> = frequencies.iter().map(|&frequency| frequency as f32).collect();
        let angle = |position: usize, i: usize| match single {
            true => f64::from(position as f32 * rounded[i]),
            false => position as f64 * frequencies[i],
        };
        Self::of_angles(n_positions, 2 * frequencies.len(), angle)
    }

    fn of_angles(n_positions: usize, head_width: usize, angle: impl Fn(usize, usize) -> f64 + Sync) -> Self {
        assert!(head_width > 0, "rotary embedding turns pairs");
        let half = head_width / 2;
        let all = |of: fn(f64) -> f64| {
            let one = |i: usize| of(angle(i / half, i % half)) as f32;
            Arc::new((0..n_positions * half).into_par_iter().map(one).collect::<Vec<f32>>())
        };
        Self {
            cos: all(f64::cos),
            sin: all(f64::sin),
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

/// RMSNorm with a gain, then every head rotated by its position: row t of `x` [B, T, H·K] stands at
/// `first_position + t`. The `gain` is as long as what it norms: the whole row [H·K], or each head [K]; without one
/// there is no norm.
///
/// Attention depends on differences of positions only, so documents packed in one sequence need no
/// position of their own.
///
/// # Errors
/// When a position lies outside the table, x is not made of heads of its width, or the gain has another length.
pub fn norm_rope(tape: &mut Tape, x: &Traced, gain: Option<&Traced>, options: NormRope) -> Result<Traced> {
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
    let normed = match gain.map(|gain| gain.value().dims()) {
        None => d,
        Some(&[n]) if n == d || n == table.head_width => n,
        Some(dims) => candle_core::bail!("rms norm: gain {dims:?} for x {:?}", x.value().dims()),
    };
    let parts = d / normed;
    #[cfg(feature = "cuda")]
    if let (true, Some(gain), 1) = (crate::on_gpu(x.value()), gain, parts) {
        let rotation = crate::cuda::Rotation { table, first_position, rows_per_sequence: t };
        return crate::cuda::norm(tape, x, gain, eps, Some(rotation));
    }
    let inputs: Vec<&Traced> = [x].into_iter().chain(gain).collect();
    if !crate::fused(x.value()) {
        return tape.composed(&inputs, |inputs| {
            let x = match inputs {
                [x, gain] => {
                    let rows = x.reshape((x.elem_count() / normed, normed))?;
                    &rms_norm::composed(&rows, gain, eps)?.reshape(x.shape())?
                }
                _ => &inputs[0],
            };
            table.composed(x, first_position)
        });
    }
    let rotation = Rotation { table: table.clone(), first_position, rows_per_sequence: t, parts };
    let Some(gain) = gain else { return rotate(tape, x, rotation) };
    let norm = RmsNorm { eps: eps as f32 };
    let y = rotation.forward(norm, x.value(), gain.value())?;
    if !tape.records(&inputs) {
        return Ok(Traced::constant(y));
    }
    let (x, gain, again) = (x.clone(), gain.clone(), rotation.clone());
    let (x_again, gain_again) = (x.value().clone(), gain.value().clone());
    let y = tape.record(y, move |dy, gradients| {
        let (x_values, g, dy) = (read(x.value())?, read(gain.value())?, read(&dy)?);
        norm.backward((&x, &x_values), (&gain, &g), gradients, |row, dy_row| {
            dy_row.copy_from_slice(&dy[row * normed..][..normed]);
            rotation.turn(dy_row, row, true);
        })
    });
    Ok(y.made_again_by(move || again.forward(norm, &x_again, &gain_again)))
}

/// The rotation alone.
fn rotate(tape: &mut Tape, x: &Traced, rotation: Rotation) -> Result<Traced> {
    let d = x.value().dim(D::Minus1)?;
    let y = tensor(rotation.rows(&read(x.value())?, d, false), x.value().shape())?;
    if !tape.records(&[x]) {
        return Ok(Traced::constant(y));
    }
    let x = x.place();
    Ok(tape.record(y, move |dy, gradients| {
        let dx = rotation.rows(&read(&dy)?, d, true);
        gradients.give(&x, tensor(dx, dy.shape())?)
    }))
}

/// The rotation of what is normed together in the rows of a batch.
#[derive(Clone)]
struct Rotation {
    table: RopeTable,
    first_position: usize,
    rows_per_sequence: usize,
    /// Parts of a row that are normed each by itself.
    parts: usize,
}

impl Rotation {
    /// Turns part `part` of all rows.
    fn turn(&self, values: &mut [f32], part: usize, inverse: bool) {
        let row = part / self.parts;
        self.table.rotate(values, self.first_position + row % self.rows_per_sequence, inverse);
    }

    /// Rows of width `d`, turned as a whole.
    fn rows(&self, x: &[f32], d: usize, inverse: bool) -> Vec<f32> {
        let mut y = output(x.len());
        let chunks = y.par_chunks_mut(d * ROWS).zip(x.par_chunks(d * ROWS)).enumerate();
        chunks.for_each(|(chunk, (y, x))| {
            y.copy_from_slice(x);
            for (row, y) in y.chunks_exact_mut(d).enumerate() {
                self.turn(y, (chunk * ROWS + row) * self.parts, inverse);
            }
        });
        y
    }

    fn forward(&self, norm: RmsNorm, x: &Tensor, gain: &Tensor) -> Result<Tensor> {
        let mut y = output(x.elem_count());
        {
            let (x, gain) = (read(x)?, read(gain)?);
            let d = gain.len();
            let chunks = y.par_chunks_mut(d * ROWS).zip(x.par_chunks(d * ROWS)).enumerate();
            chunks.for_each(|(chunk, (y, x))| {
                for (part, (y, x)) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)).enumerate() {
                    norm.row(x, &gain, y);
                    self.turn(y, chunk * ROWS + part, false);
                }
            });
        }
        tensor(y, x.shape())
    }
}
