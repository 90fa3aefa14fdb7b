use cluster_tree::ClusterTree;
use rayon::prelude::*;

use crate::Result;
use crate::rows::{Chunk, Rows, check_row, count};

/// Rows that one task assigns: enough for many to meet in the clusters of the upper levels, and few enough for the
/// nearer caches.
const CHUNK: usize = 4096;

/// The leaf of each row, by a beam descent of `width` (1 is greedy descent, the paper's): its index, `[N]`.
///
/// # Errors
/// On points as for [`build`](crate::build), however far apart their norms are; on rows of another dimension than the
/// tree's, and on a width of 0.
pub fn assign(tree: &ClusterTree, rows: &dyn Rows, width: usize) -> Result<Vec<u32>> {
    let mut leaves = vec![0u32; count(rows)?];
    let of_chunk = |(chunk_index, leaves): (usize, &mut [u32])| -> Result<()> {
        let first = chunk_index * CHUNK;
        let members: Vec<u32> = (first as u32..(first + leaves.len()) as u32).collect();
        let mut buffer = vec![];
        let chunk = Chunk::of(rows, &members, &mut buffer)?;
        for position in 0..leaves.len() {
            check_row(first + position, chunk.row(position))?;
        }
        if width == 1 {
            leaves.copy_from_slice(&tree.descend_all(leaves.len(), |position| chunk.row(position))?);
            return Ok(());
        }
        for (position, leaf) in leaves.iter_mut().enumerate() {
            *leaf = tree.nearest_leaf(chunk.row(position), width)?.leaf().index;
        }
        Ok(())
    };
    let results: Vec<Result<()>> = leaves.par_chunks_mut(CHUNK).enumerate().map(of_chunk).collect();
    results.into_iter().collect::<Result<()>>()?;
    Ok(leaves)
}
