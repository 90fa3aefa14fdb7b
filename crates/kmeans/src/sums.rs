//! Sums of points that do not depend on their order.

/// Rounds numbers to multiples of a power of two, small enough to lose little and large enough that f64 holds any sum
/// of N of them exactly: additions then commute to the last bit, whatever threads make them.
#[derive(Clone, Copy)]
pub(crate) struct Grid {
    /// 1.5 · 2⁵² multiples: adding it rounds to one of them.
    magic: f64,
}

impl Grid {
    /// For sums of at most `n` numbers of at most `largest` in absolute value.
    pub(crate) fn new(n: usize, largest: f32) -> Self {
        // n · largest < 2^exponent: read from its bits, which are the same on every machine.
        let sum = n as f64 * f64::from(largest);
        let exponent = (sum.to_bits() >> 52) as i32 - 1022;
        Self { magic: 1.5 * 2f64.powi(exponent) }
    }

    /// What numbers are rounded to multiples of.
    pub(crate) fn step(self) -> f64 {
        self.magic / 1.5 / 2f64.powi(52)
    }

    #[inline(always)]
    fn round(self, x: f32) -> f64 {
        (f64::from(x) + self.magic) - self.magic
    }
}

/// The sum of the points of each cluster.
pub(crate) struct Sums {
    grid: Grid,
    dim: usize,
    values: Vec<f64>, // [K, D]
}

impl Sums {
    pub(crate) fn zero(grid: Grid, k: usize, dim: usize) -> Self {
        Self { grid, dim, values: vec![0.0; k * dim] }
    }

    /// No sums yet of as many clusters.
    pub(crate) fn zeros(&self) -> Self {
        Self { values: vec![0.0; self.values.len()], ..*self }
    }

    pub(crate) fn add(&mut self, cluster: usize, row: &[f32]) {
        let sum = &mut self.values[cluster * self.dim..][..self.dim];
        sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum += self.grid.round(x));
    }

    /// Takes a point from one cluster to another.
    pub(crate) fn shift(&mut self, from: usize, to: usize, row: &[f32]) {
        let sum = &mut self.values[from * self.dim..][..self.dim];
        sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum -= self.grid.round(x));
        self.add(to, row);
    }

    pub(crate) fn merge(mut self, other: &Self) -> Self {
        self.values.iter_mut().zip(&other.values).for_each(|(sum, other)| *sum += other);
        self
    }

    /// The mean of a cluster's `count` points, of unit norm if `spherical`.
    pub(crate) fn mean(
        &self,
        cluster: usize,
        count: usize,
        spherical: bool,
    ) -> impl Iterator<Item = f32> + '_ {
        let sum = &self.values[cluster * self.dim..][..self.dim];
        let norm = sum.iter().map(|value| value * value).sum::<f64>().sqrt();
        // A sum of exactly 0 has no direction: its mean stays where it is.
        let divisor = if spherical && norm > 0.0 { norm } else { count as f64 };
        sum.iter().map(move |value| (value / divisor) as f32)
    }
}
