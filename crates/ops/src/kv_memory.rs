//! KV memory: pairs of keys and values that memory brings beside those of the attention, with a softmax of their own,
//! without positions and without a mask. Those of a block serve the rows of the sequences that fetched it.

use std::collections::BTreeMap;

use candle_core::{D, Result, Tensor};
use rayon::prelude::*;

use crate::buffer::{Shared, output, read, tensor, with_mut};
use crate::gemm::{Addend, Output, Right, Threads, View, Write, multiply};
use crate::math::{dot, exp_sub_sum, max, scale};
use crate::runs::{self, Tile};
use crate::tape::{Place, repeat_a_slot};
use crate::{Gradients, Precision, Run, Tape, Traced};

/// Rows of a tile, at most.
const ROWS: usize = 64;

/// Numbers of the scores that a backward pass holds at a time.
const SCORES: usize = 1 << 21;

/// Sizes of the attention that KV memory is added to.
#[derive(Clone, Copy, Debug)]
pub struct KvMemoryShape {
    /// Heads of queries, H.
    pub heads: usize,
    /// Heads of keys and values, G; each serves H/G heads of queries that follow each other.
    pub kv_heads: usize,
    /// Width of a head, K.
    pub head_width: usize,
    /// What scores are multiplied by; 1/√K as a rule.
    pub scale: f32,
}

/// As many pairs in every block, and the rows that each of them serves.
#[derive(Clone, Debug)]
pub struct KvPart {
    /// One a block, keys and then values, as [2, R, G·K]. A block in no run gets no gradient.
    pub blocks: Vec<Traced>,
    /// In order of rows, without overlap; rows in no run are not served.
    pub runs: Vec<Run>,
}

impl KvMemoryShape {
    fn width(&self) -> usize {
        self.heads * self.head_width
    }

    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_width
    }

    /// The head of keys of a head of queries.
    fn kv_head(&self, head: usize) -> usize {
        head / (self.heads / self.kv_heads)
    }
}

impl KvPart {
    /// The pairs R of a block, after a check against `n_rows` rows.
    fn check(&self, n_rows: usize, shape: KvMemoryShape) -> Result<usize> {
        let mut pairs = None;
        for block in &self.blocks {
            match block.value().dims() {
                &[2, r, width] if width == shape.kv_width() && r > 0 && *pairs.get_or_insert(r) == r => {}
                dims => candle_core::bail!("kv memory: a block of {dims:?} for {shape:?}"),
            }
        }
        runs::check("kv memory", &self.runs, self.blocks.len(), n_rows)?;
        Ok(pairs.unwrap_or(0))
    }
}

/// y = base + softmax(q·[keys of all parts]ᵀ·scale)·[values of all parts] per head, with the keys and values of the
/// row's block in each part (arXiv 2510.02375 §3: KV memory); the softmax is over the pairs of all parts together. A
/// row that no part serves is that of the base.
///
/// `base`, `q` and y [.., H·K]. The gradient of a block is summed over the runs that share it.
///
/// # Errors
/// When a run names a block or rows that do not exist, runs overlap or are out of order, blocks of a part differ in
/// size, or heads do not fit.
pub fn kv_memory(
    tape: &mut Tape,
    base: &Traced,
    q: &Traced,
    parts: &[KvPart],
    shape: KvMemoryShape,
) -> Result<Traced> {
    let width = shape.width();
    let fits = width > 0 && shape.kv_heads > 0 && shape.heads.is_multiple_of(shape.kv_heads);
    if !fits || q.value().dims().last() != Some(&width) || base.value().dims() != q.value().dims() {
        candle_core::bail!("kv memory: {shape:?}, base {:?}, q {:?}", base.value().dims(), q.value().dims());
    }
    let n_rows = q.value().elem_count() / width;
    let pairs: Vec<usize> = parts.iter().map(|part| part.check(n_rows, shape)).collect::<Result<_>>()?;
    let blocks: Vec<&Traced> = parts.iter().flat_map(|part| &part.blocks).collect();
    if repeat_a_slot(blocks.iter().copied()) {
        candle_core::bail!("kv memory: a block with a gradient is given twice");
    }
    if blocks.is_empty() {
        return Ok(base.clone());
    }
    let inputs: Vec<&Traced> = [base, q].into_iter().chain(blocks).collect();
    if !crate::fused(q.value()) {
        return tape.composed(&inputs, |inputs| composed(inputs, parts, shape));
    }
    let records = tape.records(&inputs);
    let op = KvMemory::new(tape.precision(), (parts.to_vec(), pairs), n_rows, shape);
    let y = tensor(op.forward(base, q)?, base.value().shape())?;
    if !records {
        return Ok(Traced::constant(y));
    }
    let (base, kept, q) = (base.place(), q.keep(), q.place());
    Ok(tape.record(y, move |dy, gradients| {
        op.backward((&q, &kept.value()?), &dy, gradients)?;
        gradients.give(&base, dy)
    }))
}

/// `inputs` are base, q and then all blocks.
fn composed(inputs: &[Tensor], parts: &[KvPart], shape: KvMemoryShape) -> Result<Tensor> {
    let [base, q, blocks @ ..] = inputs else { candle_core::bail!("kv memory: base or q is missing") };
    let KvMemoryShape { heads, kv_heads, head_width, .. } = shape;
    let (width, group) = (shape.width(), heads / kv_heads);
    let n_rows = q.elem_count() / width;
    let (q, base) = (q.reshape((n_rows, width))?, base.reshape(((), width))?);
    let mut pieces = vec![];
    let runs: Vec<&[Run]> = parts.iter().map(|part| &part.runs[..]).collect();
    for tile in runs::tiles(&runs, n_rows, n_rows) {
        let (mut pairs, mut first_block, m) = (vec![], 0, tile.n_rows);
        for (part, block) in parts.iter().zip(&tile.blocks) {
            // Parameters are f32 beside activations of bf16.
            pairs.extend(block.map(|block| blocks[first_block + block].to_dtype(q.dtype())).transpose()?);
            first_block += part.blocks.len();
        }
        let rows = base.narrow(0, tile.first_row, m)?;
        if pairs.is_empty() {
            pieces.push(rows);
            continue;
        }
        let pairs = Tensor::cat(&pairs, 1)?;
        let r = pairs.dim(1)?;
        let by_head = |i: usize| {
            let values = pairs.narrow(0, i, 1)?.reshape((r, kv_heads, head_width))?;
            values.transpose(0, 1)?.contiguous()
        };
        let q = q.narrow(0, tile.first_row, m)?.reshape((m, kv_heads, group, head_width))?;
        let q = q.transpose(0, 1)?.contiguous()?.reshape((kv_heads, m * group, head_width))?;
        let scores = (q.matmul(&by_head(0)?.t()?)? * f64::from(shape.scale))?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let mixed = weights.matmul(&by_head(1)?)?.reshape((kv_heads, m, group, head_width))?;
        pieces.push((rows + mixed.transpose(0, 1)?.contiguous()?.reshape((m, width))?)?);
    }
    Tensor::cat(&pieces, 0)?.reshape(inputs[0].dims())
}

struct KvMemory {
    precision: Precision,
    parts: Vec<KvPart>,
    /// Pairs of a block, per part.
    pairs: Vec<usize>,
    shape: KvMemoryShape,
    tiles: Vec<Tile>,
}

/// Operands per head of keys, block and part.
type Packed<const N: usize> = Vec<Vec<Vec<[Right; N]>>>;

/// The pairs of a tile: how many, and of each of its parts which block and the first column of its scores.
struct Columns {
    n: usize,
    parts: Vec<(usize, usize, usize)>,
}

impl KvMemory {
    fn new(
        precision: Precision,
        (parts, pairs): (Vec<KvPart>, Vec<usize>),
        n_rows: usize,
        shape: KvMemoryShape,
    ) -> Self {
        let runs: Vec<&[Run]> = parts.iter().map(|part| &part.runs[..]).collect();
        let tiles = runs::tiles(&runs, n_rows, ROWS);
        Self { precision, parts, pairs, shape, tiles }
    }

    fn columns(&self, tile: &Tile) -> Columns {
        let mut columns = Columns { n: 0, parts: vec![] };
        for (part, block) in tile.blocks.iter().enumerate() {
            if let Some(block) = *block {
                columns.parts.push((part, block, columns.n));
                columns.n += self.pairs[part];
            }
        }
        columns
    }

    /// Packs operands of every head of keys of every block: `pack(keys, values, R)`, both from the head's first on.
    fn pack<const N: usize>(
        &self,
        pack: impl Fn(&[f32], &[f32], usize) -> [Right; N] + Sync,
    ) -> Result<Packed<N>> {
        let (width, head_width) = (self.shape.kv_width(), self.shape.head_width);
        let of_part = |(part, &r): (&KvPart, &usize)| {
            let of_block = |block: &Traced| {
                let values = &*read(block.value())?;
                let head = |head| {
                    let (keys, values) = values.split_at(r * width);
                    pack(&keys[head * head_width..], &values[head * head_width..], r)
                };
                Ok((0..self.shape.kv_heads).into_par_iter().map(head).collect())
            };
            part.blocks.par_iter().map(of_block).collect::<Result<_>>()
        };
        self.parts.iter().zip(&self.pairs).map(of_part).collect()
    }

    /// [K, R] of keys or values: what gives a score for each pair.
    fn scoring(&self, rows: &[f32], r: usize) -> Right {
        let view = View::transposed(rows, self.shape.kv_width());
        Right::pack(self.precision, view, (self.shape.head_width, r), Threads::One)
    }

    /// [R, K] of keys or values: what scores mix.
    fn mixing(&self, rows: &[f32], r: usize) -> Right {
        let view = View::rows(rows, self.shape.kv_width());
        Right::pack(self.precision, view, (r, self.shape.head_width), Threads::One)
    }

    /// The weights of a tile's pairs for one head, [rows, columns], from its queries.
    fn weigh(&self, (m, q): (usize, View), keys: &[&Right], columns: &Columns, weights: &mut [f32]) {
        products((m, q), keys, columns, weights);
        for row in weights.chunks_exact_mut(columns.n) {
            scale(row, self.shape.scale);
            let sum = exp_sub_sum(row, max(row));
            scale(row, 1.0 / sum);
        }
    }

    fn forward(&self, base: &Traced, q: &Traced) -> Result<Vec<f32>> {
        let KvMemoryShape { heads, head_width, .. } = self.shape;
        let d = self.shape.width();
        let (base, q) = (&*read(base.value())?, &*read(q.value())?);
        let packed = self.pack(|keys, values, r| [self.scoring(keys, r), self.mixing(values, r)])?;
        let mut y = output(base.len());
        let y_shared = Shared::new(&mut y);
        self.tiles.par_iter().for_each_init(Vec::new, |weights, tile| {
            let (m, columns) = (tile.n_rows, self.columns(tile));
            let rows = tile.first_row * d..(tile.first_row + m) * d;
            // SAFETY: tiles do not overlap, so the rows of this one are this task's own.
            unsafe { y_shared.slice(rows.start, rows.len()) }.copy_from_slice(&base[rows]);
            if columns.n == 0 {
                return;
            }
            weights.resize(m * columns.n, 0.0);
            for head in 0..heads {
                let first = tile.first_row * d + head * head_width;
                let of = |which: usize| operands(&packed, &columns, self.shape.kv_head(head), which);
                self.weigh((m, View::rows(&q[first..], d)), &of(0), &columns, weights);
                for (&(_, _, column), values) in columns.parts.iter().zip(of(1)) {
                    let to = Output { to: y_shared, offset: first, row: d, from: Addend::Itself };
                    let weights = View::rows(&weights[column..], columns.n);
                    // SAFETY: as above; the head's columns lie in the rows.
                    unsafe { multiply((m, weights), values.all(), to) }
                }
            }
        });
        Ok(y)
    }

    /// Adds to the gradients of q and of all blocks, some tiles at a time.
    fn backward(
        &self,
        (q, q_values): (&Place, &Tensor),
        dy: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (q_values, dy) = (&*read(q_values)?, &*read(dy)?);
        let packed = self
            .pack(|keys, values, r| [self.scoring(keys, r), self.scoring(values, r), self.mixing(keys, r)])?;
        let dq = match gradients.buffer(q)? {
            Some(buffer) => buffer,
            None => (tensor(output(q_values.len()), q_values.len())?, Write::Over),
        };
        let mut first = 0;
        while first < self.tiles.len() {
            let (mut n_scores, mut end, mut begins) = (0, first, vec![]);
            while end < self.tiles.len() && (end == first || n_scores < SCORES) {
                begins.push(n_scores);
                let tile = &self.tiles[end];
                n_scores += tile.n_rows * self.columns(tile).n * self.shape.heads;
                end += 1;
            }
            let tiles: Vec<(&Tile, usize)> = self.tiles[first..end].iter().zip(begins).collect();
            let mut scores = [output(n_scores), output(n_scores)];
            let (weights, dscores) = scores.split_at_mut(1);
            let buffers = (&mut weights[0][..], &mut dscores[0][..]);
            with_mut(&dq.0, |into| {
                self.backward_tiles((&tiles, &packed), [q_values, dy], buffers, (into, dq.1));
            })?;
            for part in 0..self.parts.len() {
                self.backward_blocks((part, &tiles), [q_values, dy], &scores, gradients)?;
            }
            first = end;
        }
        Ok(())
    }

    /// Writes the weights of some tiles, [heads, rows, columns] of each from its beginning on, the gradients of their
    /// scores, and that of q.
    fn backward_tiles(
        &self,
        (tiles, packed): (&[(&Tile, usize)], &Packed<3>),
        [q, dy]: [&[f32]; 2],
        (weights, dscores): (&mut [f32], &mut [f32]),
        (dq, into): (&mut [f32], Write),
    ) {
        let KvMemoryShape { heads, head_width, .. } = self.shape;
        let d = self.shape.width();
        let (weights, dscores, dq) = (Shared::new(weights), Shared::new(dscores), Shared::new(dq));
        tiles.par_iter().for_each(|&(tile, begin)| {
            let (m, columns) = (tile.n_rows, self.columns(tile));
            let n = columns.n;
            for head in 0..heads {
                let first = tile.first_row * d + head * head_width;
                let (q, dy) = (View::rows(&q[first..], d), View::rows(&dy[first..], d));
                let mut to = Output { to: dq, offset: first, row: d, from: into.into() };
                if n == 0 {
                    // SAFETY: tiles do not overlap, so the head's columns of its rows are this task's own.
                    unsafe { to.write_addend((m, head_width)) }
                    continue;
                }
                // SAFETY: as above; each tile has a part of the scores.
                let [weights, dscores] =
                    [weights, dscores].map(|to| unsafe { to.slice(begin + head * m * n, m * n) });
                let of = |which: usize| operands(packed, &columns, self.shape.kv_head(head), which);
                self.weigh((m, q), &of(0), &columns, weights);
                products((m, dy), &of(1), &columns, dscores);
                for (weights, dscores) in weights.chunks_exact(n).zip(dscores.chunks_exact_mut(n)) {
                    let delta = dot(weights, dscores);
                    for (weight, dscore) in weights.iter().zip(dscores) {
                        *dscore = weight * (*dscore - delta) * self.shape.scale;
                    }
                }
                for (&(_, _, column), keys) in columns.parts.iter().zip(of(2)) {
                    // SAFETY: as above.
                    unsafe { multiply((m, View::rows(&dscores[column..], n)), keys.all(), to) }
                    to.from = Addend::Itself;
                }
            }
        });
    }

    /// Adds to the gradients of a part's blocks: of keys Σ dscoresᵀ·q, of values Σ weightsᵀ·dy, over the rows of some
    /// tiles and the heads that share them.
    fn backward_blocks(
        &self,
        (part, tiles): (usize, &[(&Tile, usize)]),
        [q, dy]: [&[f32]; 2],
        [weights, dscores]: &[Vec<f32>; 2],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let KvMemoryShape { heads, kv_heads, head_width, .. } = self.shape;
        let (d, width, r, group) =
            (self.shape.width(), self.shape.kv_width(), self.pairs[part], heads / kv_heads);
        let mut tiles_of = BTreeMap::<usize, Vec<(&Tile, usize)>>::new();
        for &(tile, begin) in tiles {
            tile.blocks[part]
                .into_iter()
                .for_each(|block| tiles_of.entry(block).or_default().push((tile, begin)));
        }
        let mut tasks = vec![];
        for (block, tiles) in tiles_of {
            if let Some((gradient, into)) = gradients.buffer(&self.parts[part].blocks[block])? {
                tasks.push((gradient, into, tiles));
            }
        }
        let of_head = |(gradient, tiles): (Shared, &[(&Tile, usize)]), kv_head: usize| {
            let mut packed = Right::empty(self.precision);
            for &(tile, begin) in tiles {
                let (m, columns) = (tile.n_rows, self.columns(tile));
                let column = columns.parts.iter().find(|found| found.0 == part).map_or(0, |found| found.2);
                for head in kv_head * group..(kv_head + 1) * group {
                    let first = tile.first_row * d + head * head_width;
                    let scores = begin + head * m * columns.n + column;
                    for (place, scores, rows) in [(0, &dscores[scores..], q), (r, &weights[scores..], dy)] {
                        packed.repack(View::rows(&rows[first..], d), (m, head_width), Threads::One);
                        let offset = place * width + kv_head * head_width;
                        let to = Output { to: gradient, offset, row: width, from: Addend::Itself };
                        // SAFETY: the head's columns of the block's gradient are this task's own.
                        unsafe { multiply((r, View::transposed(scores, columns.n)), packed.all(), to) }
                    }
                }
            }
        };
        tasks.into_par_iter().try_for_each(|(gradient, into, tiles)| {
            with_mut(&gradient, |gradient| {
                if into == Write::Over {
                    gradient.fill(0.0);
                }
                let gradient = Shared::new(gradient);
                (0..kv_heads).into_par_iter().for_each(|kv_head| of_head((gradient, &tiles), kv_head));
            })
        })
    }
}

/// One of the operands of a head of keys, for each part of a tile.
fn operands<'a, const N: usize>(
    packed: &'a Packed<N>,
    columns: &Columns,
    kv_head: usize,
    which: usize,
) -> Vec<&'a Right> {
    columns.parts.iter().map(|&(part, block, _)| &packed[part][block][kv_head][which]).collect()
}

/// Products of `m` rows with the operands of each part, side by side.
fn products(rows: (usize, View), operands: &[&Right], columns: &Columns, to: &mut [f32]) {
    assert_eq!(to.len(), rows.0 * columns.n, "products of {} rows", rows.0);
    let to = Shared::new(to);
    for (&(_, _, column), operand) in columns.parts.iter().zip(operands) {
        let to = Output { to, offset: column, row: columns.n, from: Addend::Zero };
        // SAFETY: the products have room for all columns of all rows (above), and are uniquely borrowed.
        unsafe { multiply(rows, operand.all(), to) }
    }
}
