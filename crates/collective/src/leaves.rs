use std::ops::Range;

/// The micro-batches of a step, in order, shared out among workers in ranges: the leaves of the tree that
/// sums are made by.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Leaves {
    /// Of the whole step.
    pub n: usize,
    /// Workers.
    pub world_size: usize,
}

impl Leaves {
    /// Those of a worker: as many as of any other, or one more.
    pub fn of(&self, rank: usize) -> Range<usize> {
        let begin = |rank: usize| rank * self.n / self.world_size;
        begin(rank)..begin(rank + 1)
    }

    /// Whose a leaf is.
    pub fn rank_of(&self, leaf: usize) -> usize {
        ((leaf + 1) * self.world_size - 1) / self.n
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_leaf_is_one_ranks() {
        for n in 1..30 {
            for world_size in 1..=n {
                let leaves = Leaves { n, world_size };
                let all: Vec<usize> = (0..world_size).flat_map(|rank| leaves.of(rank)).collect();
                assert_eq!(all, (0..n).collect::<Vec<_>>());
                for rank in 0..world_size {
                    assert!(leaves.of(rank).all(|leaf| leaves.rank_of(leaf) == rank));
                    assert!((n / world_size..=n.div_ceil(world_size)).contains(&leaves.of(rank).len()));
                }
            }
        }
    }
}
