use sha2::{Digest, Sha256};

use crate::descent::Descent;
use crate::{ClusterId, ClusterPath, Error, Result};

/// One level of a tree, as given to [`ClusterTree::new`].
#[derive(Clone, PartialEq, Debug)]
pub struct Level {
    /// Children of each cluster of the level above (of the root, for level 0).
    pub branching: usize,
    /// Centroids, `[N, D]`, N the product of the branchings down to this level.
    pub centroids: Vec<f32>,
    /// Points that each centroid was trained on, `[N]`. 0 is empty: never descended into.
    pub counts: Vec<u64>,
}

/// A tree of k-means clusters over unit vectors or any other embedding of `dim` dimensions.
#[derive(Clone, PartialEq, Debug)]
pub struct ClusterTree {
    dim: usize,
    levels: Vec<Level>,
    descent: Descent,
}

impl ClusterTree {
    /// A tree over embeddings of `dim` dimensions, coarse level first. Fails on a wrong shape, on a
    /// centroid that is not finite, on a tree without points, and on a cluster that has points
    /// while its children have none, or the other way round.
    pub fn new(dim: usize, levels: Vec<Level>) -> Result<Self> {
        if !(1..=nearest::MAX_DIM).contains(&dim) {
            return Err(Error::TreeDimension { found: dim, max: nearest::MAX_DIM });
        }
        if levels.is_empty() || levels.len() > usize::from(u8::MAX) {
            return Err(Error::LevelCount { found: levels.len() });
        }
        check_shapes(dim, &levels)?;
        check_centroids(dim, &levels)?;
        check_counts(&levels)?;
        let descent = Descent::new(dim, &levels);
        Ok(Self { dim, levels, descent })
    }

    /// Dimension of centroids and embeddings.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Number of levels, at least 1.
    pub fn n_levels(&self) -> usize {
        self.levels.len()
    }

    /// Children of each cluster of the level above.
    ///
    /// # Panics
    /// If `level >= n_levels`, as a slice does.
    pub fn branching(&self, level: usize) -> usize {
        self.levels[level].branching
    }

    /// Clusters of a level, the empty ones too.
    ///
    /// # Panics
    /// If `level >= n_levels`, as a slice does.
    pub fn n_clusters(&self, level: usize) -> usize {
        self.levels[level].counts.len()
    }

    /// Clusters of the deepest level, the empty ones too.
    pub fn n_leaves(&self) -> usize {
        self.n_clusters(self.n_levels() - 1)
    }

    /// Points that each cluster of a level was trained on, `[N]`; 0 is an empty cluster.
    ///
    /// # Panics
    /// If `level >= n_levels`, as a slice does.
    pub fn counts(&self, level: usize) -> &[u64] {
        &self.levels[level].counts
    }

    /// A centroid, `[D]`. Fails on an id that the tree does not have, the generic one included.
    pub fn centroid(&self, id: ClusterId) -> Result<&[f32]> {
        self.check(id)?;
        Ok(self.centroid_at(usize::from(id.level), id.index))
    }

    /// The cluster above this one, or none for a cluster of level 0. Fails on an id that the tree
    /// does not have, the generic one included.
    pub fn parent(&self, id: ClusterId) -> Result<Option<ClusterId>> {
        self.check(id)?;
        let branching = self.levels[usize::from(id.level)].branching as u32;
        Ok(id.level.checked_sub(1).map(|level| ClusterId { level, index: id.index / branching }))
    }

    /// The path to a leaf, by its index. Fails on a leaf that the tree does not have.
    pub fn path_of_leaf(&self, leaf: u32) -> Result<ClusterPath> {
        self.check(ClusterId { level: (self.n_levels() - 1) as u8, index: leaf })?;
        let mut indices = vec![leaf; self.n_levels()];
        for level in (1..self.n_levels()).rev() {
            indices[level - 1] = indices[level] / self.levels[level].branching as u32;
        }
        ClusterPath::new(indices)
    }

    /// The leaf that greedy descent finds: at each level the nearest non-empty child by squared L2,
    /// ties by lower index. The same as a beam of width 1; it can miss the nearest leaf (paper, v3,
    /// appendix J). `embedding` is `[D]`.
    pub fn descend(&self, embedding: &[f32]) -> Result<ClusterPath> {
        self.check_embedding(embedding)?;
        self.path_of_leaf(self.descent.greedy(self, embedding))
    }

    /// The leaf of [`ClusterTree::descend`] for each of `n` rows, `[N]`, faster than one after the other. `row` gives
    /// a row, `[D]`. Of several rows at fault, the error is that of the first.
    pub fn descend_all<'a>(&'a self, n: usize, row: impl Fn(usize) -> &'a [f32]) -> Result<Vec<u32>> {
        (0..n).try_for_each(|index| self.check_embedding(row(index)))?;
        Ok(self.descent.greedy_all(self, n, row))
    }

    /// The best leaf of a beam descent of `width`: of [`ClusterTree::descend`] for 1, else the first of
    /// [`ClusterTree::beam`]. `embedding` is `[D]`.
    pub fn nearest_leaf(&self, embedding: &[f32], width: usize) -> Result<ClusterPath> {
        if width == 1 {
            return self.descend(embedding);
        }
        self.check_embedding(embedding)?;
        if width == 0 {
            return Err(Error::ZeroWidth);
        }
        self.path_of_leaf(self.descent.beam(self, embedding, width)[0].index)
    }

    /// The leaves that a beam descent of `width` ends with, at most `width` of them, best first,
    /// with the squared L2 distance to the leaf's centroid; ties by lower index. A wide beam finds
    /// the nearest leaves exactly. `embedding` is `[D]`.
    pub fn beam(&self, embedding: &[f32], width: usize) -> Result<Vec<(ClusterPath, f32)>> {
        self.check_embedding(embedding)?;
        if width == 0 {
            return Err(Error::ZeroWidth);
        }
        let leaves = self.descent.beam(self, embedding, width);
        leaves.into_iter().map(|leaf| Ok((self.path_of_leaf(leaf.index)?, leaf.distance))).collect()
    }

    /// SHA-256, in hex, of dimension, branchings, centroids and counts: the identity of the tree,
    /// which a memory bank trained with it records.
    pub fn hash(&self) -> String {
        let mut hasher = Sha256::new();
        hasher.update((self.dim as u64).to_le_bytes());
        hasher.update((self.n_levels() as u64).to_le_bytes());
        for level in &self.levels {
            hasher.update((level.branching as u64).to_le_bytes());
            level.centroids.iter().for_each(|value| hasher.update(value.to_le_bytes()));
            level.counts.iter().for_each(|count| hasher.update(count.to_le_bytes()));
        }
        hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    pub(crate) fn levels(&self) -> &[Level] {
        &self.levels
    }

    pub(crate) fn centroid_at(&self, level: usize, index: u32) -> &[f32] {
        let start = index as usize * self.dim;
        &self.levels[level].centroids[start..start + self.dim]
    }

    fn check(&self, id: ClusterId) -> Result<()> {
        let n_clusters = self.levels.get(usize::from(id.level)).map_or(0, |level| level.counts.len());
        if id.index as usize >= n_clusters {
            return Err(Error::UnknownCluster { id, n_clusters });
        }
        Ok(())
    }

    fn check_embedding(&self, embedding: &[f32]) -> Result<()> {
        if embedding.len() != self.dim {
            return Err(Error::Dimension { expected: self.dim, found: embedding.len() });
        }
        let norm_squared = norm_squared(embedding);
        if !is_near_enough(norm_squared) {
            return Err(Error::NonFiniteEmbedding { norm_squared });
        }
        Ok(())
    }
}

fn check_shapes(dim: usize, levels: &[Level]) -> Result<()> {
    let mut n_clusters = 1usize;
    for (index, level) in levels.iter().enumerate() {
        let found = n_clusters as u128 * level.branching as u128;
        // The largest index stays below `ClusterId::GENERIC`.
        let max = ClusterId::GENERIC;
        if found == 0 || found > u128::from(max) {
            return Err(Error::ClusterCount { level: index, branching: level.branching, found, max });
        }
        n_clusters = found as usize;
        let arrays = [
            ("centroids", level.centroids.len(), n_clusters.saturating_mul(dim)),
            ("counts", level.counts.len(), n_clusters),
        ];
        for (array, found, expected) in arrays {
            if found != expected {
                return Err(Error::LevelLength { level: index, array, expected, found });
            }
        }
    }
    Ok(())
}

fn check_centroids(dim: usize, levels: &[Level]) -> Result<()> {
    for (level, values) in levels.iter().enumerate() {
        for (index, centroid) in values.centroids.chunks_exact(dim).enumerate() {
            let norm_squared = norm_squared(centroid);
            if !is_near_enough(norm_squared) {
                return Err(Error::NonFiniteCentroid { level, index, norm_squared });
            }
        }
    }
    Ok(())
}

fn norm_squared(row: &[f32]) -> f32 {
    row.chunks(32).map(|row| row.iter().map(|value| value * value).sum::<f32>()).sum()
}

/// Whether all values are finite, and so are all distances between such vectors.
fn is_near_enough(norm_squared: f32) -> bool {
    norm_squared <= nearest::MAX_SQUARED_NORM
}

fn check_counts(levels: &[Level]) -> Result<()> {
    if levels[0].counts.iter().all(|&count| count == 0) {
        return Err(Error::NoPoints);
    }
    for (level, pair) in levels.windows(2).enumerate() {
        let children = pair[1].counts.chunks_exact(pair[1].branching);
        for (index, (&count, children)) in pair[0].counts.iter().zip(children).enumerate() {
            let children = children.iter().map(|&count| u128::from(count)).sum();
            if (count == 0) != (children == 0) {
                return Err(Error::UnevenCounts { level, index, count, children });
            }
        }
    }
    Ok(())
}
