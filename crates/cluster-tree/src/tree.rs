use sha2::{Digest, Sha256};

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
    /// `|c|²/2` of every centroid, `[N]` per level: the nearest centroid to `x` is the one of the
    /// largest `x·c − |c|²/2`, which costs one dot product.
    half_norms: Vec<Vec<f32>>,
}

/// A cluster met in a descent, with `x·c − |c|²/2` (larger is nearer).
#[derive(Copy, Clone)]
struct Candidate {
    score: f32,
    index: u32,
}

impl ClusterTree {
    /// A tree over embeddings of `dim` dimensions, coarse level first. Fails on a wrong shape, on a
    /// centroid that is not finite, on a tree without points, and on a cluster that has points
    /// while its children have none, or the other way round.
    pub fn new(dim: usize, levels: Vec<Level>) -> Result<Self> {
        if dim == 0 {
            return Err(Error::ZeroDimension);
        }
        if levels.is_empty() || levels.len() > usize::from(u8::MAX) {
            return Err(Error::LevelCount { found: levels.len() });
        }
        check_shapes(dim, &levels)?;
        let half_norms = half_norms(dim, &levels)?;
        check_counts(&levels)?;
        Ok(Self { dim, levels, half_norms })
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
        let mut indices = Vec::with_capacity(self.n_levels());
        let mut parent = 0;
        for level in 0..self.n_levels() {
            let mut children = self.children(level, parent, embedding);
            let first = children.next().ok_or(Error::NoPoints)?;
            let best =
                children.fold(first, |best, other| if nearer(&other, &best).is_lt() { other } else { best });
            parent = best.index;
            indices.push(parent);
        }
        ClusterPath::new(indices)
    }

    /// The leaves that a beam descent of `width` ends with, at most `width` of them, best first,
    /// with the squared L2 distance to the leaf's centroid; ties by lower index. A wide beam finds
    /// the nearest leaves exactly. `embedding` is `[D]`.
    pub fn beam(&self, embedding: &[f32], width: usize) -> Result<Vec<(ClusterPath, f32)>> {
        self.check_embedding(embedding)?;
        if width == 0 {
            return Err(Error::ZeroWidth);
        }
        let mut beam = vec![Candidate { score: 0.0, index: 0 }]; // the root
        let mut next = Vec::new();
        for level in 0..self.n_levels() {
            next.clear();
            for parent in &beam {
                next.extend(self.children(level, parent.index, embedding));
            }
            keep_nearest(&mut next, width);
            std::mem::swap(&mut beam, &mut next);
        }
        let mut leaves = Vec::with_capacity(beam.len());
        for candidate in &beam {
            let centroid = self.centroid_at(self.n_levels() - 1, candidate.index);
            leaves.push((candidate.index, squared_distance(embedding, centroid)));
        }
        // The scores of close leaves can round to another order than the distances returned.
        leaves.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
        leaves.into_iter().map(|(leaf, distance)| Ok((self.path_of_leaf(leaf)?, distance))).collect()
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

    /// The non-empty children of cluster `parent` of the level above, scored.
    fn children<'a>(
        &'a self,
        level: usize,
        parent: u32,
        embedding: &'a [f32],
    ) -> impl Iterator<Item = Candidate> + 'a {
        let Level { branching, counts, .. } = &self.levels[level];
        let half_norms = &self.half_norms[level];
        let first = parent as usize * branching;
        (first..first + branching).filter(|&child| counts[child] > 0).map(move |child| Candidate {
            score: dot(embedding, self.centroid_at(level, child as u32)) - half_norms[child],
            index: child as u32,
        })
    }

    fn centroid_at(&self, level: usize, index: u32) -> &[f32] {
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
        let norm_squared = dot(embedding, embedding);
        if !norm_squared.is_finite() {
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

/// A finite norm says that every value of the centroid is finite, and, with a finite norm of the
/// embedding, that no dot product of the two overflows.
fn half_norms(dim: usize, levels: &[Level]) -> Result<Vec<Vec<f32>>> {
    let half_norm = |level: usize, index: usize, centroid: &[f32]| {
        let norm_squared = dot(centroid, centroid);
        if norm_squared.is_finite() {
            Ok(norm_squared / 2.0)
        } else {
            Err(Error::NonFiniteCentroid { level, index, norm_squared })
        }
    };
    let of_level = |(level, values): (usize, &Level)| {
        let centroids = values.centroids.chunks_exact(dim).enumerate();
        centroids.map(|(index, centroid)| half_norm(level, index, centroid)).collect()
    };
    levels.iter().enumerate().map(of_level).collect()
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

/// The order of a beam: larger score first, then lower index. Scores are finite (see
/// [`half_norms`]) and never −0, so that a tie is a tie.
fn nearer(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.score.total_cmp(&a.score).then(a.index.cmp(&b.index))
}

fn keep_nearest(candidates: &mut Vec<Candidate>, width: usize) {
    if candidates.len() > width {
        candidates.select_nth_unstable_by(width - 1, nearer);
        candidates.truncate(width);
    }
}

fn squared_distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| (x - y) * (x - y)).sum()
}

/// Dot product in 32 partial sums, which the compiler keeps in vector registers; always the same
/// order of additions, so the same result wherever it runs. Adding the partial sums one by one is
/// on purpose: a tree of additions here makes the compiler split the loop above into pairs.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<32>(), b.as_chunks::<32>());
    let mut sums = [0f32; 32];
    for (x, y) in a.iter().zip(b) {
        for lane in 0..32 {
            sums[lane] += x[lane] * y[lane];
        }
    }
    let mut total = 0.0;
    for sum in sums {
        total += sum;
    }
    for (x, y) in a_rest.iter().zip(b_rest) {
        total += x * y;
    }
    total
}
