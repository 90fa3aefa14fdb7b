//! Causal attention with per-document masks: tiled over queries, recomputed in the backward, with work
//! proportional to the part of the mask that is not zero.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{D, Result, Tensor};
use rayon::prelude::*;

use crate::buffer::{Shared, output, read, tensor, with_mut};
use crate::gemm::{Addend, Output, Right, Threads, View, Write, multiply};
use crate::math::{dot, exp, exp_sub_sum, max, scale, soft_cap, tanh};
use crate::tape::{Place, repeat_a_slot};
use crate::{Gradients, Precision, Tape, Traced};

/// Query rows of a tile.
const ROWS: usize = 64;

/// A tile's first key is a multiple of this: packed keys come in panels of so many.
const KEYS: usize = 32;

/// Sizes of one attention call.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Sequences, B.
    pub batch: usize,
    /// Query positions, T. They are the last T of the S key positions.
    pub queries: usize,
    /// Key positions, S ≥ T.
    pub keys: usize,
    /// Heads of queries, H.
    pub heads: usize,
    /// Heads of keys and values, G, each for H/G heads of queries one after another (Ainslie et al.,
    /// arXiv 2305.13245).
    pub kv_heads: usize,
    /// Width of a head, K.
    pub head_width: usize,
    /// What products of queries and keys become.
    pub scoring: Scoring,
}

/// What products of queries and keys become before the softmax.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Scoring {
    /// Their factor; without one it is 1/√K.
    pub factor: Option<f64>,
    /// Scores s become cap·tanh(s / cap).
    pub cap: Option<f64>,
}

impl Scoring {
    /// The factor for heads of this width.
    pub fn factor(&self, head_width: usize) -> f32 {
        self.factor.map_or(1.0 / (head_width as f32).sqrt(), |factor| factor as f32)
    }

    pub(crate) fn cap(&self) -> Option<f32> {
        self.cap.map(|cap| cap as f32)
    }

    /// Whether they are those of most models.
    #[cfg(feature = "cuda")]
    fn are_plain(&self) -> bool {
        *self == Self::default()
    }
}

impl AttentionShape {
    /// Width of queries.
    fn width(&self) -> usize {
        self.heads * self.head_width
    }

    /// Width of keys and of values.
    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_width
    }

    /// Keys or values [B, S, G·K], once for every head of queries that shares them [B, S, H·K].
    fn repeated(&self, x: &Tensor) -> Result<Tensor> {
        let (b, s, g, k) = (self.batch, self.keys, self.kv_heads, self.head_width);
        let x = x.reshape((b, s, g, 1, k))?.broadcast_as((b, s, g, self.group(), k))?;
        x.contiguous()?.reshape((b, s, self.width()))
    }

    /// Heads of queries that share keys and values.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn check(&self, [q, k, v]: [&Tensor; 3], starts: &[u32]) -> Result<()> {
        let (b, t, s, d, e) = (self.batch, self.queries, self.keys, self.width(), self.kv_width());
        let whole = self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads);
        if q.dims() != [b, t, d] || k.dims() != [b, s, e] || v.dims() != [b, s, e] || s < t || !whole {
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
        // Documents of a sequence begin in order.
        let falls = |t: &usize| !t.is_multiple_of(self.queries) && starts[*t] < starts[t - 1];
        if let Some(i) = (1..starts.len()).find(falls) {
            candle_core::bail!(
                "attention: query {} of sequence {} starts at key {}, the one before at {}",
                i % t,
                i / t,
                starts[i],
                starts[i - 1]
            );
        }
        Ok(())
    }
}

/// softmax(q·kᵀ/√K)·v per head, where query t (at key position S − T + t) sees the keys
/// `starts[b, t] ..= S − T + t`; starts do not fall within a sequence. A window of w positions is starts of no less
/// than S − T + t − w + 1.
///
/// `q` [B, T, H·K], `k`, `v` [B, S, G·K]; the result is shaped like q.
///
/// # Errors
/// When the shapes do not fit, a query would see no key, starts fall, or an operand that has a gradient is given
/// twice.
pub fn attention(
    tape: &mut Tape,
    [q, k, v]: [&Traced; 3],
    starts: &Arc<[u32]>,
    shape: AttentionShape,
) -> Result<Traced> {
    shape.check([q, k, v].map(Traced::value), starts)?;
    if tape.records(&[q, k, v]) && repeat_a_slot([q, k, v]) {
        candle_core::bail!("attention: queries, keys and values must be different tensors");
    }
    #[cfg(feature = "cuda")]
    if crate::on_gpu(q.value()) && shape.scoring.are_plain() && crate::cuda::attention_fits(q.value(), shape)?
    {
        // Its kernels have no heads that share keys.
        let mut for_each_head = |x: &Traced| match shape.group() {
            1 => Ok(x.clone()),
            _ => tape.composed(&[x], |inputs| shape.repeated(&inputs[0])),
        };
        let (k, v) = (for_each_head(k)?, for_each_head(v)?);
        return crate::cuda::attention(tape, [q, &k, &v], starts, shape);
    }
    if !crate::fused(q.value()) {
        return tape.composed(&[q, k, v], |inputs| composed(inputs, starts, shape));
    }
    let op = Attention { shape, starts: starts.clone(), precision: tape.precision() };
    let (y, log_sum_exp) = {
        let (q, k, v) = (read(q.value())?, read(k.value())?, read(v.value())?);
        op.forward([&q, &k, &v])
    };
    let y = tensor(y, q.value().shape())?;
    if !tape.records(&[q, k, v]) {
        return Ok(Traced::constant(y));
    }
    let (inputs, places) = ([q, k, v].map(Traced::keep), [q, k, v].map(Traced::place));
    let kept = y.clone();
    Ok(tape.record(y, move |dy, gradients| {
        let [q, k, v] = &inputs;
        let inputs = [q.value()?, k.value()?, v.value()?];
        op.backward((&inputs, &places), [&kept, &dy], &log_sum_exp, gradients)
    }))
}

fn composed(inputs: &[Tensor], starts: &[u32], shape: AttentionShape) -> Result<Tensor> {
    let AttentionShape { batch: b, queries: t, keys: s, heads: h, head_width, scoring, .. } = shape;
    let (device, dtype) = (inputs[0].device(), inputs[0].dtype());
    let mut mask = vec![0f32; b * t * s];
    for (row, (mask, &start)) in mask.chunks_exact_mut(s).zip(starts).enumerate() {
        mask[..start as usize].fill(f32::NEG_INFINITY);
        mask[s - t + row % t + 1..].fill(f32::NEG_INFINITY);
    }
    let mask = Tensor::from_vec(mask, (b, 1, t, s), device)?.to_dtype(dtype)?;
    let split = |x: &Tensor, n: usize| x.reshape((b, n, h, head_width))?.transpose(1, 2)?.contiguous();
    let (k, v) = (shape.repeated(&inputs[1])?, shape.repeated(&inputs[2])?);
    let (q, k, v) = (split(&inputs[0], t)?, split(&k, s)?, split(&v, s)?);
    let factor = scoring.factor.unwrap_or(1.0 / (head_width as f64).sqrt());
    let mut products = (q.matmul(&k.t()?)? * factor)?;
    if let Some(cap) = scoring.cap {
        products = ((products / cap)?.tanh()? * cap)?;
    }
    let scores = products.broadcast_add(&mask)?;
    let largest = scores.max_keepdim(D::Minus1)?.detach();
    let weights = scores.broadcast_sub(&largest)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    weights.matmul(&v)?.transpose(1, 2)?.reshape((b, t, h * head_width))
}

struct Attention {
    shape: AttentionShape,
    starts: Arc<[u32]>,
    precision: Precision,
}

/// One tile: `n_rows` queries from `first_row` of one head of one sequence, against the keys
/// `keys` that any of them sees.
struct Tile {
    first_row: usize,
    n_rows: usize,
    keys: Range<usize>,
}

/// Buffers of a task, reused over its heads.
struct Scratch {
    scores: Vec<f32>,
    dscores: Vec<f32>,
    /// Keys and values packed as right operands: as they are, and transposed.
    packed: [Right; 3],
    /// Rows of queries or of output gradients.
    rows: Right,
}

impl Attention {
    fn scale(&self) -> f32 {
        self.shape.scoring.factor(self.shape.head_width)
    }

    fn scratch(&self) -> Scratch {
        let empty = || Right::empty(self.precision);
        let len = ROWS.min(self.shape.queries) * self.shape.keys;
        let packed = [empty(), empty(), empty()];
        Scratch { scores: output(len), dscores: output(len), packed, rows: empty() }
    }

    fn tiles(&self, sequence: usize) -> impl Iterator<Item = Tile> + '_ {
        let (t, s) = (self.shape.queries, self.shape.keys);
        (0..t).step_by(ROWS).map(move |first_row| {
            let n_rows = ROWS.min(t - first_row);
            let starts = &self.starts[sequence * t + first_row..][..n_rows];
            let first_key = starts.iter().copied().min().unwrap_or(0) as usize / KEYS * KEYS;
            Tile { first_row, n_rows, keys: first_key..s - t + first_row + n_rows }
        })
    }

    /// The columns of a tile that row `i` of it sees.
    fn visible(&self, sequence: usize, tile: &Tile, i: usize) -> Range<usize> {
        let row = tile.first_row + i;
        let start = self.starts[sequence * self.shape.queries + row] as usize;
        start - tile.keys.start..self.shape.keys - self.shape.queries + row + 1 - tile.keys.start
    }

    /// The output, and the log-sum-exp of every query's scores [B, H, T].
    fn forward(&self, [q, k, v]: [&[f32]; 3]) -> (Vec<f32>, Vec<f32>) {
        let AttentionShape { batch, queries: t, keys: s, heads, head_width, .. } = self.shape;
        let (d, e) = (self.shape.width(), self.shape.kv_width());
        let (scale_of_scores, cap) = (self.scale(), self.shape.scoring.cap());
        let mut y = output(q.len());
        let mut log_sum_exp = output(batch * heads * t);
        let y_shared = Shared::new(&mut y);
        let head_task = |scratch: &mut Scratch, (task, log_sum_exp): (usize, &mut [f32])| {
            let (sequence, head) = (task / heads, task % heads);
            let q_base = sequence * t * d + head * head_width;
            let k_base = sequence * s * e + head / self.shape.group() * head_width;
            let Scratch { scores, packed: [keys, values, _], .. } = scratch;
            keys.repack(View::transposed(&k[k_base..], e), (head_width, s), Threads::One);
            values.repack(View::rows(&v[k_base..], e), (s, head_width), Threads::One);
            for tile in self.tiles(sequence) {
                let (m, n) = (tile.n_rows, tile.keys.len());
                let scores = &mut scores[..m * n];
                let q = View::rows(&q[q_base + tile.first_row * d..], d);
                product((m, q), (keys, 0..head_width, tile.keys.clone()), scores);
                for (i, row) in scores.chunks_exact_mut(n).enumerate() {
                    let visible = self.visible(sequence, &tile, i);
                    row[..visible.start].fill(0.0);
                    row[visible.end..].fill(0.0);
                    let row = &mut row[visible];
                    match cap {
                        None => scale(row, scale_of_scores),
                        Some(cap) => soft_cap(row, scale_of_scores, cap),
                    }
                    let largest = max(row);
                    let sum = exp_sub_sum(row, largest);
                    scale(row, 1.0 / sum);
                    log_sum_exp[tile.first_row + i] = sum.ln() + largest;
                }
                let to =
                    Output { to: y_shared, offset: q_base + tile.first_row * d, row: d, from: Addend::Zero };
                let values = values.part(tile.keys.clone(), 0..head_width);
                // SAFETY: the head's columns of the tile's rows belong to this task alone, and lie in y.
                unsafe { multiply((m, View::rows(scores, n)), values, to) }
            }
        };
        log_sum_exp.par_chunks_mut(t).enumerate().for_each_init(|| self.scratch(), head_task);
        (y, log_sum_exp)
    }

    fn backward(
        &self,
        (inputs, receivers): (&[Tensor; 3], &[Place; 3]),
        [y, dy]: [&Tensor; 2],
        log_sum_exp: &[f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let AttentionShape { batch, kv_heads, .. } = self.shape;
        let [q, k, v] = inputs;
        let (q, k, v, y, dy) = (read(q)?, read(k)?, read(v)?, read(y)?, read(dy)?);
        let mut places = vec![];
        for (input, receiver) in inputs.iter().zip(receivers) {
            places.push(match gradients.buffer(receiver)? {
                Some(place) => place,
                None => (tensor(output(input.elem_count()), input.shape())?, Write::Over),
            });
        }
        let [(dq, into), (dk, k_into), (dv, v_into)] = &places[..] else { unreachable!("three inputs") };
        with_mut(dq, |dq| {
            with_mut(dk, |dk| {
                with_mut(dv, |dv| {
                    for (gradient, into) in [(&mut *dk, k_into), (&mut *dv, v_into)] {
                        if *into == Write::Over {
                            gradient.fill(0.0);
                        }
                    }
                    let to = [Shared::new(dq), Shared::new(dk), Shared::new(dv)];
                    (0..batch * kv_heads).into_par_iter().for_each_init(
                        || self.scratch(),
                        |scratch, task| {
                            self.backward_group(
                                task,
                                [&q, &k, &v, &y, &dy],
                                log_sum_exp,
                                (to, *into),
                                scratch,
                            );
                        },
                    );
                })
            })
        })???;
        Ok(())
    }

    /// One head of keys and values of a sequence, and the heads of queries that share it.
    fn backward_group(
        &self,
        task: usize,
        [q, k, v, y, dy]: [&[f32]; 5],
        log_sum_exp: &[f32],
        ([dq, dk, dv], into): ([Shared; 3], Write),
        scratch: &mut Scratch,
    ) {
        let AttentionShape { queries: t, keys: s, kv_heads, head_width, .. } = self.shape;
        let (d, e, group) = (self.shape.width(), self.shape.kv_width(), self.shape.group());
        let (sequence, kv_head) = (task / kv_heads, task % kv_heads);
        let first_key = sequence * s * e + kv_head * head_width;
        let Scratch { scores, dscores, packed: [key_columns, value_columns, keys], rows } = scratch;
        key_columns.repack(View::transposed(&k[first_key..], e), (head_width, s), Threads::One);
        value_columns.repack(View::transposed(&v[first_key..], e), (head_width, s), Threads::One);
        keys.repack(View::rows(&k[first_key..], e), (s, head_width), Threads::One);
        for (member, tile) in
            (0..group).flat_map(|member| self.tiles(sequence).map(move |tile| (member, tile)))
        {
            let (m, n) = (tile.n_rows, tile.keys.len());
            let head = kv_head * group + member;
            let row_base = (sequence * t + tile.first_row) * d + head * head_width;
            let key_base = first_key + tile.keys.start * e;
            let (p, dp) = (&mut scores[..m * n], &mut dscores[..m * n]);
            let (q_rows, dy_rows) = (View::rows(&q[row_base..], d), View::rows(&dy[row_base..], d));
            product((m, q_rows), (key_columns, 0..head_width, tile.keys.clone()), p);
            product((m, dy_rows), (value_columns, 0..head_width, tile.keys.clone()), dp);
            let log_sum_exp = &log_sum_exp[(task * group + member) * t + tile.first_row..][..m];
            for (i, (p, dp)) in p.chunks_exact_mut(n).zip(dp.chunks_exact_mut(n)).enumerate() {
                let visible = self.visible(sequence, &tile, i);
                for row in [&mut *p, &mut *dp] {
                    row[..visible.start].fill(0.0);
                    row[visible.end..].fill(0.0);
                }
                let row = row_base + i * d;
                let delta = dot(&y[row..row + head_width], &dy[row..row + head_width]);
                self.row_backward((&mut p[visible.clone()], &mut dp[visible]), log_sum_exp[i], delta);
            }
            let to = |to: Shared, offset: usize, row: usize, from: Addend| Output { to, offset, row, from };
            // SAFETY: one task holds a head of keys of a sequence and the heads of queries that share it, so its
            // columns of dq, dk and dv are its own; all offsets lie in the buffers.
            unsafe {
                rows.repack(dy_rows, (m, head_width), Threads::One);
                multiply((n, View::transposed(p, n)), rows.all(), to(dv, key_base, e, Addend::Itself));
                rows.repack(q_rows, (m, head_width), Threads::One);
                multiply((n, View::transposed(dp, n)), rows.all(), to(dk, key_base, e, Addend::Itself));
                let keys = keys.part(tile.keys.clone(), 0..head_width);
                multiply((m, View::rows(dp, n)), keys, to(dq, row_base, d, into.into()));
            }
        }
    }

    /// Of a row of products of a query and keys, the weights; and of their gradients that of the products.
    fn row_backward(&self, (p, dp): (&mut [f32], &mut [f32]), shift: f32, delta: f32) {
        let scale = self.scale();
        match self.shape.scoring.cap() {
            None => {
                for (p, dp) in p.iter_mut().zip(dp) {
                    *p = exp(*p * scale - shift);
                    *dp = *p * (*dp - delta) * scale;
                }
            }
            Some(cap) => {
                for (p, dp) in p.iter_mut().zip(dp) {
                    let capped = tanh(*p * scale / cap);
                    *p = exp(cap * capped - shift);
                    *dp = *p * (*dp - delta) * scale * (1.0 - capped * capped);
                }
            }
        }
    }
}

/// c = a · part, c being as narrow as the part.
fn product(a: (usize, View), (right, k, columns): (&Right, Range<usize>, Range<usize>), c: &mut [f32]) {
    let row = columns.len();
    assert_eq!(c.len(), a.0 * row);
    let to = Output { to: Shared::new(c), offset: 0, row, from: Addend::Zero };
    // SAFETY: c is as large as the product (above) and uniquely borrowed.
    unsafe { multiply(a, right.part(k, columns), to) }
}
