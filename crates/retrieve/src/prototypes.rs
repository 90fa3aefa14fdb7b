use std::sync::Arc;

use cluster_tree::ClusterTree;
use linfa::DatasetBase;
use linfa::traits::Fit;
use linfa_clustering::KMeans;
use ndarray::Array2;
use nearest::{MAX_SQUARED_NORM, squared_distance};
use rand_xoshiro::Xoshiro256Plus;
use rand_xoshiro::rand_core::SeedableRng;
use rayon::prelude::*;

use crate::leaves::{Leaves, nearest};
use crate::{Error, Query, Result, Route, Router};

/// Steps of a leaf's k-means at most.
const ITERATIONS: u64 = 20;

/// How prototypes are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrototypeOptions {
    /// Prototypes of a leaf, at most.
    pub per_leaf: usize,
    /// Decides where each k-means begins.
    pub seed: u64,
    /// Leaves that a route names, at most.
    pub n: usize,
}

impl Default for PrototypeOptions {
    fn default() -> Self {
        Self { per_leaf: 8, seed: 1, n: 4 }
    }
}

/// The leaf of the prototype with the largest cosine to the text. A leaf's prototypes are the k-means
/// centroids of its training embeddings, so a leaf of several parts is found by any of them; its own
/// centroid may lie between them and near none.
pub struct Prototypes {
    leaves: Leaves,
    /// The leaf of each prototype, rising.
    owners: Vec<u32>,
    /// The prototypes, `[P, D]`, of unit length.
    units: Vec<f32>,
    n: usize,
}

impl Prototypes {
    /// Prototypes of `embeddings`, `[N, D]` row-major, whose leaves are `leaves`, `[N]`. A leaf of at
    /// most `per_leaf` different embeddings has these themselves as prototypes; one without any has
    /// none, and is never routed to. The same for the same input and seed, on any number of threads.
    ///
    /// # Errors
    /// On no embeddings but zeros, on other than N × D numbers, on a row that is not finite or too
    /// long, and on a leaf that the tree holds no points in.
    pub fn fit(
        tree: Arc<ClusterTree>,
        (embeddings, leaves): (&[f32], &[u32]),
        options: PrototypeOptions,
    ) -> Result<Self> {
        for (name, found) in [("per_leaf", options.per_leaf), ("n", options.n)] {
            if found == 0 {
                return Err(Error::Setting { name, expected: "at least 1", found });
            }
        }
        let rows = Rows::new(&tree, embeddings, leaves)?;
        let of_leaf = |leaf: &(u32, Vec<usize>)| rows.prototypes(leaf, options);
        let fitted: Vec<Result<Vec<f32>>> = rows.by_leaf.par_iter().map(of_leaf).collect();
        let (dim, mut owners, mut units) = (tree.dim(), vec![], vec![]);
        for ((leaf, _), fitted) in rows.by_leaf.iter().zip(fitted) {
            for unit in fitted?.chunks_exact(dim).filter_map(unit) {
                owners.push(*leaf);
                units.extend(unit);
            }
        }
        match owners.is_empty() {
            true => Err(Error::NoRows),
            false => Ok(Self { leaves: Leaves::new(tree), owners, units, n: options.n }),
        }
    }
}

impl Router for Prototypes {
    fn dim(&self) -> usize {
        self.leaves.dim()
    }

    fn route(&self, Query { embedding, .. }: Query<'_>) -> Result<Vec<Route>> {
        self.leaves.check(embedding)?;
        // Of unit vectors, the nearest is that of the largest cosine.
        let direction = unit(embedding).map_or_else(|| embedding.to_vec(), Iterator::collect);
        let units = self.units.chunks_exact(self.dim()).map(|unit| squared_distance(&direction, unit));
        // The best of each leaf, whose prototypes stand together.
        let mut best: Vec<(u32, f32)> = vec![];
        for (&leaf, distance) in self.owners.iter().zip(units) {
            match best.last_mut() {
                Some(last) if last.0 == leaf => last.1 = last.1.min(distance),
                _ => best.push((leaf, distance)),
            }
        }
        nearest(best, self.n).into_iter().map(|(leaf, _)| self.leaves.route(leaf, embedding)).collect()
    }
}

/// The rows of each leaf.
struct Rows<'a> {
    embeddings: &'a [f32],
    dim: usize,
    /// Leaves with their rows, both rising.
    by_leaf: Vec<(u32, Vec<usize>)>,
}

impl<'a> Rows<'a> {
    fn new(tree: &ClusterTree, embeddings: &'a [f32], leaves: &[u32]) -> Result<Self> {
        let (dim, n_leaves) = (tree.dim(), tree.n_leaves());
        let (expected, found) = (leaves.len() * dim, embeddings.len());
        if expected != found {
            return Err(Error::Rows { rows: leaves.len(), expected, found });
        }
        let counts = tree.counts(tree.n_levels() - 1);
        let mut by_leaf = vec![vec![]; n_leaves];
        for (row, (&leaf, values)) in leaves.iter().zip(embeddings.chunks_exact(dim)).enumerate() {
            if counts.get(leaf as usize).is_none_or(|&count| count == 0) {
                return Err(Error::RowLeaf { row, leaf, n_leaves });
            }
            // linfa panics where a distance overflows.
            let found = values.iter().map(|value| value * value).sum::<f32>();
            if found.is_nan() || found > MAX_SQUARED_NORM {
                return Err(Error::Norm { row, max: MAX_SQUARED_NORM, found });
            }
            by_leaf[leaf as usize].push(row);
        }
        let by_leaf: Vec<_> = (0u32..).zip(by_leaf).filter(|(_, rows)| !rows.is_empty()).collect();
        Ok(Self { embeddings, dim, by_leaf })
    }

    fn row(&self, index: usize) -> &'a [f32] {
        &self.embeddings[index * self.dim..][..self.dim]
    }

    /// The prototypes of one leaf, `[P, D]`, 1 ≤ P ≤ `per_leaf`.
    fn prototypes(&self, (leaf, rows): &(u32, Vec<usize>), options: PrototypeOptions) -> Result<Vec<f32>> {
        let mut different: Vec<&[f32]> = vec![];
        for row in rows.iter().map(|&row| self.row(row)) {
            if different.len() > options.per_leaf {
                break;
            }
            if !different.contains(&row) {
                different.push(row);
            }
        }
        if different.len() <= options.per_leaf {
            return Ok(different.concat());
        }
        let problem = |problem: String| Error::KMeans { leaf: *leaf, problem };
        let points: Vec<f32> = rows.iter().flat_map(|&row| self.row(row)).copied().collect();
        let points = Array2::from_shape_vec((rows.len(), self.dim), points);
        let points = DatasetBase::from(points.map_err(|e| problem(e.to_string()))?);
        // A stream of its own for each leaf: none begins where another does.
        let seed = options.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(u64::from(*leaf));
        let kmeans = KMeans::params_with_rng(options.per_leaf, Xoshiro256Plus::seed_from_u64(seed))
            .n_runs(1)
            .max_n_iterations(ITERATIONS)
            .fit(&points)
            .map_err(|e| problem(e.to_string()))?;
        Ok(kmeans.centroids().iter().copied().collect())
    }
}

/// `values` at unit length; none of zeros, which have no direction.
fn unit(values: &[f32]) -> Option<impl Iterator<Item = f32>> {
    let norm = values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    (norm > 0.0).then(|| values.iter().map(move |&value| (f64::from(value) / norm) as f32))
}
