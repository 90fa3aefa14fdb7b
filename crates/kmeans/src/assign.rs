use cluster_tree::ClusterTree;
use rayon::prelude::*;

use crate::Result;
use crate::points::Points;

/// The leaf of each of `embeddings`, `[N, D]` row-major, by a beam descent of `width` (1 is greedy
/// descent, the paper's): the index of the best leaf, `[N]`. Fails on values that are not rows of
/// the tree's dimension, on no points, on a value that is not finite (the error names the row), and
/// on a width of 0.
pub fn assign(tree: &ClusterTree, embeddings: &[f32], width: usize) -> Result<Vec<u32>> {
    let points = Points::new(embeddings, tree.dim())?;
    let leaf = |index: u32| -> Result<u32> {
        let row = points.row(index);
        if width == 1 {
            return Ok(tree.descend(row)?.leaf().index);
        }
        // A tree has a non-empty leaf, and a beam at least one place for it.
        tree.beam(row, width)?
            .first()
            .map(|(path, _)| path.leaf().index)
            .ok_or(cluster_tree::Error::NoPoints.into())
    };
    // Collected before they are judged: the error is that of the first row, whichever thread is first.
    let leaves: Vec<Result<u32>> = (0..points.len() as u32).into_par_iter().map(leaf).collect();
    leaves.into_iter().collect()
}
