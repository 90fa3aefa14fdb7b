//! Rows that memory blocks serve: what is checked of them, tiles of rows that use one block of each part, and the
//! sums over rows that the gradient of a block is.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::buffer::{Shared, with_mut};
use crate::gemm::{Output, Right, Threads, View, Write, multiply_all};
use crate::{Gradients, Run, Traced};

/// Fails on a run of a block or of rows that do not exist, and on runs that overlap or are out of order.
pub(crate) fn check(op: &str, runs: &[Run], n_blocks: usize, n_rows: usize) -> Result<()> {
    let mut end = 0;
    for run in runs {
        let last = run.first_row + run.n_rows;
        if run.block >= n_blocks || run.first_row < end || last > n_rows || run.n_rows == 0 {
            candle_core::bail!(
                "{op}: {run:?} over {n_blocks} blocks and {n_rows} rows, rows below {end} being taken"
            );
        }
        end = last;
    }
    Ok(())
}

/// The block of a row.
fn block_of(runs: &[Run], row: usize) -> Option<usize> {
    let next = runs.partition_point(|run| run.first_row <= row);
    let run = runs[..next].last().filter(|run| row < run.first_row + run.n_rows)?;
    Some(run.block)
}

/// Rows that use one block of each part.
pub(crate) struct Tile {
    pub(crate) first_row: usize,
    pub(crate) n_rows: usize,
    /// Per part.
    pub(crate) blocks: Vec<Option<usize>>,
}

/// `n_rows` rows cut where the block of a part changes, and into tiles of at most `most`.
pub(crate) fn tiles(parts: &[&[Run]], n_rows: usize, most: usize) -> Vec<Tile> {
    let runs = parts.iter().copied().flatten();
    let mut cuts: Vec<usize> = runs.flat_map(|run| [run.first_row, run.first_row + run.n_rows]).collect();
    cuts.extend([0, n_rows]);
    cuts.sort_unstable();
    cuts.dedup();
    let mut tiles = vec![];
    for cut in cuts.windows(2) {
        // Of equal size as far as possible, whole groups of 8 rows.
        let n_tiles = (cut[1] - cut[0]).div_ceil(most);
        let rows = (cut[1] - cut[0]).div_ceil(n_tiles).next_multiple_of(8);
        let blocks: Vec<Option<usize>> = parts.iter().map(|runs| block_of(runs, cut[0])).collect();
        tiles.extend((cut[0]..cut[1]).step_by(rows).map(|first_row| Tile {
            first_row,
            n_rows: rows.min(cut[1] - first_row),
            blocks: blocks.clone(),
        }));
    }
    tiles
}

/// Packs operands of each block of a part: a single block by all threads, many by one each.
pub(crate) fn pack_blocks<T: Send>(
    blocks: &[Traced],
    pack: impl Fn(&Traced, Threads) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    match blocks.len() < rayon::current_num_threads() {
        true => blocks.iter().map(|block| pack(block, Threads::All)).collect(),
        false => blocks.par_iter().map(|block| pack(block, Threads::One)).collect(),
    }
}

/// Runs `add` on the gradient of every block that has one, with the rows of its runs: what it adds is over what the
/// gradient holds when it is the first.
pub(crate) fn add_to_blocks(
    (blocks, runs): (&[Traced], &[Run]),
    gradients: &mut Gradients,
    add: impl Fn(&mut [f32], Write, Range<usize>, Threads) + Sync,
) -> Result<()> {
    let mut runs_of = BTreeMap::<usize, Vec<&Run>>::new();
    for run in runs {
        runs_of.entry(run.block).or_default().push(run);
    }
    let mut tasks = vec![];
    for (block, runs) in runs_of {
        if let Some((gradient, into)) = gradients.buffer(&blocks[block])? {
            tasks.push((gradient, into, runs));
        }
    }
    let one = |(gradient, into, runs): (Tensor, Write, Vec<&Run>), threads: Threads| {
        with_mut(&gradient, |gradient| {
            for (n, run) in runs.into_iter().enumerate() {
                let into = if n == 0 { into } else { Write::Add };
                add(gradient, into, run.first_row..run.first_row + run.n_rows, threads);
            }
        })
    };
    match tasks.len() < rayon::current_num_threads() {
        true => tasks.into_iter().try_for_each(|task| one(task, Threads::All)),
        false => tasks.into_par_iter().try_for_each(|task| one(task, Threads::One)),
    }
}

/// c [m, D] = or += left · right[rows], `right` being the rows of `values` packed, of width D.
pub(crate) fn sum_over_rows(
    (m, left): (usize, View),
    (right, values, rows): (&Right, View, Range<usize>),
    (c, into): (&mut [f32], Write),
    threads: Threads,
) {
    let d = c.len() / m;
    let to = Output { to: Shared::new(c), offset: 0, row: d, from: into.into() };
    let own;
    let right = match right.begins_a_lane(rows.start) {
        true => right.part(rows, 0..d),
        false => {
            let (precision, values) = (right.precision(), values.skip_rows(rows.start));
            own = Right::pack(precision, values, (rows.len(), d), Threads::One);
            own.all()
        }
    };
    // SAFETY: c is m rows of d, uniquely borrowed.
    unsafe { multiply_all((m, left), right, to, threads) }
}
