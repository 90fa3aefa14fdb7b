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
}
