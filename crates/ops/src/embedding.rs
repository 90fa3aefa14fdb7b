//! Rows of a table by token id, with a gradient that is summed per row and not scattered with races.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::buffer::{output, tensor_like, values, with};

/// Rows of the table a task of the gradient takes.
const ROWS: usize = 256;

/// `table` [V, D] at `ids` (B·T of them) as [B, T, D].
///
/// # Errors
/// When an id is not below V, or there are not B·T of them.
pub fn embedding(table: &Tensor, ids: &[u32], (b, t): (usize, usize)) -> Result<Tensor> {
    let (v, d) = table.dims2()?;
    if let Some(&id) = ids.iter().find(|&&id| id as usize >= v) {
        candle_core::bail!("embedding: token {id} of a vocabulary of {v}");
    }
    if ids.len() != b * t {
        candle_core::bail!("embedding: {} tokens for a batch of {b} x {t}", ids.len());
    }
    if crate::fused(table) {
        return table.apply_op1(Embedding { ids: ids.to_vec(), shape: (b, t, d) });
    }
    let ids = Tensor::from_slice(ids, ids.len(), table.device())?;
    table.index_select(&ids, 0)?.reshape((b, t, d))
}

struct Embedding {
    ids: Vec<u32>,
    shape: (usize, usize, usize),
}

impl Embedding {
    /// Positions ordered by id: those of id v are `order[first[v]..first[v + 1]]`.
    fn positions_by_id(&self, n_ids: usize) -> (Vec<u32>, Vec<u32>) {
        let mut first = vec![0u32; n_ids + 1];
        for &id in &self.ids {
            first[id as usize + 1] += 1;
        }
        for i in 0..n_ids {
            first[i + 1] += first[i];
        }
        let mut next = first.clone();
        let mut order = vec![0u32; self.ids.len()];
        for (position, &id) in self.ids.iter().enumerate() {
            let slot = &mut next[id as usize];
            order[*slot as usize] = position as u32;
            *slot += 1;
        }
        (first, order)
    }
}

impl CustomOp1 for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn cpu_fwd(&self, table: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let d = self.shape.2;
        let table = values(table, layout)?;
        let mut y = output(self.ids.len() * d);
        for (y, &id) in y.chunks_exact_mut(d).zip(&self.ids) {
            y.copy_from_slice(&table[id as usize * d..][..d]);
        }
        Ok((CpuStorage::F32(y), Shape::from(self.shape)))
    }

    fn bwd(&self, table: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (v, d) = table.dims2()?;
        let (first, order) = self.positions_by_id(v);
        let gradient = with(dy, |dy| {
            let mut gradient = vec![0f32; v * d];
            gradient.par_chunks_mut(d * ROWS).enumerate().for_each(|(chunk, rows)| {
                for (row, sum) in rows.chunks_exact_mut(d).enumerate() {
                    let id = chunk * ROWS + row;
                    for &position in &order[first[id] as usize..first[id + 1] as usize] {
                        let dy = &dy[position as usize * d..][..d];
                        sum.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
                    }
                }
            });
            gradient
        })?;
        Ok(Some(tensor_like(gradient, table)?))
    }
}
