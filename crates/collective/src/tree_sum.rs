use std::ops::Range;

/// A sum over leaves 0..n whose order of additions is a binary tree's: leaves 2i and 2i+1 are added, then
/// pairs of those, and so on, whoever has which. Leaves may be missing: they are added to nothing.
///
/// A worker adds its own leaves; what can be added up without those of others is, and at most
/// 2 log2(n) parts remain. Whoever puts all parts together ends with the bits of one worker that has all
/// leaves. Adding in pairs also keeps rounding errors at O(log n) (Higham 1993, doi 10.1137/0914050).
#[derive(Debug)]
pub struct TreeSum<T> {
    n_leaves: usize,
    /// The leaves that are added here.
    own: Range<usize>,
    /// Sums, in the order of their leaves, each with the range from its first leaf to its last.
    parts: Vec<(Range<usize>, T)>,
}

impl TreeSum<()> {
    /// The leaves of each part that remains of a sum over some leaves of `own`, ascending.
    pub fn ranges(
        n_leaves: usize,
        own: Range<usize>,
        leaves: impl Iterator<Item = usize>,
    ) -> Vec<Range<usize>> {
        let mut sum = Self::new(n_leaves, own);
        leaves.for_each(|leaf| sum.push(leaf..leaf + 1, (), |(), ()| ()));
        sum.finish(|(), ()| ()).into_iter().map(|(range, ())| range).collect()
    }
}

impl TreeSum<Vec<f32>> {
    /// [`TreeSum::push`] of an array.
    pub fn push_array(&mut self, leaves: Range<usize>, values: Vec<f32>) {
        self.push(leaves, values, |sum, values| add(sum, &values));
    }

    /// [`TreeSum::finish`] of arrays.
    pub fn finish_arrays(self) -> Vec<(Range<usize>, Vec<f32>)> {
        self.finish(|sum, values| add(sum, &values))
    }
}

fn add(sum: &mut [f32], values: &[f32]) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}

impl<T> TreeSum<T> {
    /// Of the leaves in `own`, of `n_leaves` in all.
    pub fn new(n_leaves: usize, own: Range<usize>) -> Self {
        Self { n_leaves, own, parts: vec![] }
    }

    /// Adds a leaf, or the sum of several that another has added up; they come in ascending order.
    pub fn push(&mut self, leaves: Range<usize>, value: T, mut add: impl FnMut(&mut T, T)) {
        debug_assert!(self.parts.last().is_none_or(|(last, _)| last.end <= leaves.start));
        self.settle(leaves.start, &mut add);
        self.parts.push((leaves, value));
    }

    /// What has been added up so far: fed to another sum over the same leaves, it ends with the same bits.
    pub fn into_parts(self) -> Vec<(Range<usize>, T)> {
        self.parts
    }

    /// The parts that remain when no more leaves of `own` come: one when it is all of them.
    pub fn finish(mut self, mut add: impl FnMut(&mut T, T)) -> Vec<(Range<usize>, T)> {
        self.settle(self.own.end, &mut add);
        self.parts
    }

    /// Adds up what no leaf before `next` can come in between of.
    fn settle(&mut self, next: usize, add: &mut impl FnMut(&mut T, T)) {
        while let [.., (left, _), (right, _)] = self.parts.as_slice() {
            let (node, right_child) = self.common(left.start, right.end - 1);
            let is_own = self.own.start <= node.start && node.end <= self.own.end;
            if !is_own || right_child.end > next {
                break;
            }
            let Some((right, value)) = self.parts.pop() else { break };
            if let Some((left, sum)) = self.parts.last_mut() {
                left.end = right.end;
                add(sum, value);
            }
        }
    }

    /// The smallest node above two different leaves, and its right child.
    fn common(&self, first: usize, last: usize) -> (Range<usize>, Range<usize>) {
        let level = usize::BITS - (first ^ last).leading_zeros();
        let start = first >> level << level;
        let end = self.n_leaves.min(start + (1 << level));
        (start..end, start + (1 << (level - 1))..end)
    }
}
