//! Rows of a table by token id, with a gradient that is summed per row and not scattered with races.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::buffer::{output, read, tensor};
use crate::gemm::Write;
use crate::{Tape, Traced};

/// Rows of the table a task of the gradient takes.
const ROWS: usize = 256;

/// `table` [V, D] at `ids` (B·T of them) as [B, T, D].
///
/// # Errors
/// When an id is not below V, or there are not B·T of them.
pub fn embedding(tape: &mut Tape, table: &Traced, ids: &[u32], (b, t): (usize, usize)) -> Result<Traced> {
    let (v, d) = table.value().dims2()?;
    if let Some(&id) = ids.iter().find(|&&id| id as usize >= v) {
        candle_core::bail!("embedding: token {id} of a vocabulary of {v}");
    }
    if ids.len() != b * t {
        candle_core::bail!("embedding: {} tokens for a batch of {b} x {t}", ids.len());
    }
    #[cfg(feature = "cuda")]
    if crate::on_gpu(table.value()) {
        return crate::cuda::embedding(tape, table, ids, (b, t));
    }
    if !crate::fused(table.value()) {
        let ids = Tensor::from_slice(ids, ids.len(), table.value().device())?;
        return tape.composed(&[table], |inputs| inputs[0].index_select(&ids, 0)?.reshape((b, t, d)));
    }
    let mut y = output(ids.len() * d);
    {
        let table = read(table.value())?;
        y.par_chunks_mut(d).zip(ids).for_each(|(y, &id)| y.copy_from_slice(&table[id as usize * d..][..d]));
    }
    let y = tensor(y, (b, t, d))?;
    if !tape.records(&[table]) {
        return Ok(Traced::constant(y));
    }
    let (table, ids) = (table.clone(), ids.to_vec());
    Ok(tape.record(y, move |dy, gradients| {
        let (first, order) = positions_by_id(&ids, v);
        let dy = read(&dy)?;
        gradients.write(&table, |gradient, into| {
            gradient.par_chunks_mut(d * ROWS).enumerate().for_each(|(chunk, rows)| {
                for (row, sum) in rows.chunks_exact_mut(d).enumerate() {
                    let id = chunk * ROWS + row;
                    if into == Write::Over {
                        sum.fill(0.0);
                    }
                    for &position in &order[first[id] as usize..first[id + 1] as usize] {
                        let dy = &dy[position as usize * d..][..d];
                        sum.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
                    }
                }
            });
        })
    }))
}

/// Positions ordered by id: those of id v are `order[first[v]..first[v + 1]]`.
pub(crate) fn positions_by_id(ids: &[u32], n_ids: usize) -> (Vec<u32>, Vec<u32>) {
    let mut first = vec![0u32; n_ids + 1];
    for &id in ids {
        first[id as usize + 1] += 1;
    }
    for i in 0..n_ids {
        first[i + 1] += first[i];
    }
    let mut next = first.clone();
    let mut order = vec![0u32; ids.len()];
    for (position, &id) in ids.iter().enumerate() {
        let slot = &mut next[id as usize];
        order[*slot as usize] = position as u32;
        *slot += 1;
    }
    (first, order)
}
