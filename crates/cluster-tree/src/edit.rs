//! Edits, each of which gives a new tree: a leaf split, two leaves merged, points added.
//!
//! The branching stays as it is: a split needs an empty slot under the leaf's parent, a merge leaves
//! one. What a cluster's children hold together changes only where points are added.

use crate::{ClusterId, ClusterTree, Error, Level, Result};

impl ClusterTree {
    /// Divides a leaf in two, and says which leaf the second half became: the first empty one under
    /// the same parent. Each half is a centroid, `[D]`, and the points that it was found from; the
    /// leaf's count is divided in proportion, so that every count above stays what it is.
    ///
    /// Fails on a leaf that the tree does not have, on one of fewer than 2 points, on a half without
    /// points or with a centroid that is not of the tree, and when no slot is empty.
    pub fn split_leaf(&self, leaf: u32, halves: [(&[f32], u64); 2]) -> Result<(Self, u32)> {
        let path = self.path_of_leaf(leaf)?;
        let (dim, mut levels) = (self.dim(), self.levels().to_vec());
        let Level { branching, centroids, counts } = last(&mut levels);
        let count = counts[leaf as usize];
        if count < 2 {
            return Err(Error::TooFewToSplit { path, count });
        }
        if let Some((centroid, _)) = halves.iter().find(|(centroid, _)| centroid.len() != dim) {
            return Err(Error::Dimension { expected: dim, found: centroid.len() });
        }
        let points = halves.map(|(_, points)| u128::from(points));
        if points.contains(&0) {
            return Err(Error::EmptyHalf { path, points: halves.map(|(_, points)| points) });
        }
        let first = leaf as usize / *branching * *branching;
        let empty = (first..first + *branching).find(|&slot| counts[slot] == 0);
        let Some(slot) = empty else {
            return Err(Error::NoEmptySlot { path, branching: *branching });
        };
        let all = points[0] + points[1];
        let kept = ((u128::from(count) * points[0] + all / 2) / all) as u64;
        // Neither half may come out empty.
        let kept = kept.clamp(1, count - 1);
        for (slot, (centroid, _), count) in
            [(leaf as usize, halves[0], kept), (slot, halves[1], count - kept)]
        {
            centroids[slot * dim..][..dim].copy_from_slice(centroid);
            counts[slot] = count;
        }
        Ok((Self::new(dim, levels)?, slot as u32))
    }

    /// Makes one leaf of two under the same parent: the lower slot gets their points and the mean of
    /// their centroids, weighted by points and of unit norm if `spherical`; the other becomes empty.
    ///
    /// Fails on a leaf that the tree does not have or that is empty, and on leaves that are the same
    /// or have not the same parent.
    pub fn merge_leaves(&self, a: u32, b: u32, spherical: bool) -> Result<Self> {
        let paths = [self.path_of_leaf(a)?, self.path_of_leaf(b)?];
        let (dim, mut levels) = (self.dim(), self.levels().to_vec());
        let Level { branching, centroids, counts } = last(&mut levels);
        let (lower, upper) = (a.min(b) as usize, a.max(b) as usize);
        if lower == upper || lower / *branching != upper / *branching {
            return Err(Error::NotSiblings { paths: Box::new(paths) });
        }
        for (leaf, path) in [a, b].into_iter().zip(paths) {
            if counts[leaf as usize] == 0 {
                return Err(Error::EmptyLeaf { path });
            }
        }
        let weights = [lower, upper].map(|leaf| counts[leaf] as f64);
        let mean = |d: usize| {
            let at = |leaf: usize| f64::from(centroids[leaf * dim + d]);
            (at(lower) * weights[0] + at(upper) * weights[1]) / (weights[0] + weights[1])
        };
        let mean: Vec<f64> = (0..dim).map(mean).collect();
        let norm = mean.iter().map(|value| value * value).sum::<f64>().sqrt();
        // A mean of exactly 0 has no direction.
        let divisor = if spherical && norm > 0.0 { norm } else { 1.0 };
        for (to, value) in centroids[lower * dim..][..dim].iter_mut().zip(mean) {
            *to = (value / divisor) as f32;
        }
        centroids[upper * dim..][..dim].fill(0.0);
        counts[lower] = counts[lower].saturating_add(counts[upper]);
        counts[upper] = 0;
        Self::new(dim, levels)
    }

    /// Adds points to leaves and to every cluster above them; `added` is `[n_leaves]`. Fails when it
    /// is of another length, and on points in an empty leaf, which no descent reaches.
    pub fn with_counts_added(&self, added: &[u64]) -> Result<Self> {
        if added.len() != self.n_leaves() {
            return Err(Error::AddedLength { expected: self.n_leaves(), found: added.len() });
        }
        let in_empty = |leaf: &usize| added[*leaf] > 0 && self.counts(self.n_levels() - 1)[*leaf] == 0;
        if let Some(leaf) = (0..added.len()).find(in_empty) {
            return Err(Error::EmptyLeaf { path: self.path_of_leaf(leaf as u32)? });
        }
        let (mut levels, mut added) = (self.levels().to_vec(), added.to_vec());
        for Level { branching, counts, .. } in levels.iter_mut().rev() {
            counts.iter_mut().zip(&added).for_each(|(count, &more)| *count = count.saturating_add(more));
            added = added.chunks_exact(*branching).map(|children| children.iter().sum()).collect();
        }
        Self::new(self.dim(), levels)
    }

    /// The share of its parent's points that a cluster holds, 0 to 1; of all points, for a cluster of
    /// level 0. Fails on an id that the tree does not have.
    pub fn share(&self, id: ClusterId) -> Result<f64> {
        let level = usize::from(id.level);
        let parent = self.parent(id)?;
        let whole = match parent {
            Some(parent) => self.counts(level - 1)[parent.index as usize],
            None => self.counts(0).iter().sum(),
        };
        Ok(self.counts(level)[id.index as usize] as f64 / (whole as f64).max(1.0))
    }
}

/// The level of the leaves. A tree has at least one level.
fn last(levels: &mut [Level]) -> &mut Level {
    let leaves = levels.len() - 1;
    &mut levels[leaves]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2 × 3 clusters in 2 dimensions; slot 5 is empty.
    fn tree() -> ClusterTree {
        let top = Level { branching: 2, centroids: vec![1., 0., 0., 1.], counts: vec![10, 7] };
        let centroids = vec![1., 0., 2., 0., 4., 0., 0., 1., 0., 3., 0., 0.];
        let leaves = Level { branching: 3, centroids, counts: vec![6, 1, 3, 4, 3, 0] };
        ClusterTree::new(2, vec![top, leaves]).unwrap()
    }

    fn leaf(tree: &ClusterTree, index: u32) -> (&[f32], u64) {
        let id = ClusterId { level: 1, index };
        (tree.centroid(id).unwrap(), tree.counts(1)[index as usize])
    }

    #[track_caller]
    fn assert_children_add_up(tree: &ClusterTree) {
        let sums: Vec<u64> = tree.counts(1).chunks(3).map(|children| children.iter().sum()).collect();
        assert_eq!(tree.counts(0), sums);
    }

    #[test]
    fn a_split_takes_the_empty_slot_and_a_merge_gives_it_back() {
        let before = tree();
        let (split, slot) = before.split_leaf(3, [(&[0.5, 1.0], 30), (&[-0.5, 1.0], 10)]).unwrap();
        assert_eq!(slot, 5);
        assert_eq!((leaf(&split, 3), leaf(&split, 5)), ((&[0.5, 1.0][..], 3), (&[-0.5, 1.0][..], 1)));
        assert_children_add_up(&split);
        assert!((0..5).filter(|&i| i != 3).all(|i| leaf(&split, i) == leaf(&before, i)));
        assert_ne!(split.hash(), before.hash());

        let merged = split.merge_leaves(5, 3, false).unwrap();
        // (3 × 0.5 − 1 × 0.5) / 4 = 0.25
        assert_eq!((leaf(&merged, 3), leaf(&merged, 5)), ((&[0.25, 1.0][..], 4), (&[0.0, 0.0][..], 0)));
        assert_eq!((merged.counts(0), merged.counts(1)), (before.counts(0), before.counts(1)));
        let unit = split.merge_leaves(3, 5, true).unwrap();
        let norm: f32 = leaf(&unit, 3).0.iter().map(|value| value * value).sum();
        assert!((norm - 1.0).abs() < 1e-6, "{norm}");
    }

    #[test]
    fn no_half_of_a_split_is_empty() {
        let (split, slot) = tree().split_leaf(4, [(&[0.0, 3.0], 1_000_000), (&[0.0, 4.0], 1)]).unwrap();
        assert_eq!((leaf(&split, 4).1, leaf(&split, slot).1), (2, 1));
    }

    #[test]
    fn added_points_count_on_the_whole_path() {
        let before = tree();
        let after = before.with_counts_added(&[0, 2, 0, 5, 0, 0]).unwrap();
        assert_eq!(after.counts(0), [12, 12]);
        assert_eq!(after.counts(1), [6, 3, 3, 9, 3, 0]);
        assert_children_add_up(&after);
        assert_ne!(after.hash(), before.hash());
        assert_eq!(before.with_counts_added(&[0; 6]).unwrap().hash(), before.hash());
        assert_eq!(after.share(ClusterId { level: 1, index: 3 }).unwrap(), 0.75);
        assert_eq!(after.share(ClusterId { level: 0, index: 1 }).unwrap(), 0.5);
    }

    #[test]
    fn impossible_edits_name_the_leaf() {
        let tree = tree();
        let halves: [(&[f32], u64); 2] = [(&[0.0, 1.0], 1), (&[1.0, 0.0], 1)];
        let message = |result: Result<ClusterTree>| result.unwrap_err().to_string();
        let split = |leaf, halves| message(tree.split_leaf(leaf, halves).map(|(tree, _)| tree));
        assert_eq!(
            split(0, halves),
            "leaf 0/0: none of the 3 slots under its parent is empty, merge two of them first"
        );
        assert_eq!(split(1, halves), "leaf 0/1 cannot be split: expected at least 2 points, found 1");
        assert!(split(9, halves).contains("no cluster"), "{}", split(9, halves));
        assert_eq!(
            split(3, [(&[0.0, 1.0], 0), halves[1]]),
            "the halves of leaf 1/3 have [0, 1] points, expected at least 1 each"
        );
        assert!(split(3, [(&[0.0], 1), halves[1]]).contains("1 dimensions"));
        assert_eq!(
            message(tree.merge_leaves(2, 3, false)),
            "leaves 0/2 and 1/3 are not siblings, expected two under one parent"
        );
        assert!(message(tree.merge_leaves(2, 2, false)).contains("not siblings"));
        assert_eq!(message(tree.merge_leaves(4, 5, false)), "leaf 1/5 is empty, expected points in it");
        assert_eq!(
            message(tree.with_counts_added(&[0, 0, 0, 0, 0, 1])),
            "leaf 1/5 is empty, expected points in it"
        );
        assert_eq!(message(tree.with_counts_added(&[1])), "points added to 1 leaves, the tree has 6");
    }
}
