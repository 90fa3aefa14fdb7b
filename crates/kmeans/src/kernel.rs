//! The inner loop: scores of points against centroids, a small matrix product fused with the search
//! for the best. Plain products and sums, no fused multiply-add, so that every processor gives the
//! same bits; the fixed widths let the compiler keep the sums in vector registers.

use crate::points::{Points, norm_squared};

/// Centroids side by side in a panel: what one vector register of AVX-512 holds.
pub(crate) const LANES: usize = 16;

/// Points that share one read of a panel.
const ROWS: usize = 4;

/// Points scored against all panels before the next points: they stay in the nearer caches.
const BLOCK_ROWS: usize = 64;

/// The centroids of one node, K of them or fewer: an inactive one is never chosen.
#[derive(Clone, PartialEq)]
pub(crate) struct Centroids {
    dim: usize,
    values: Vec<f32>,  // [K, D]
    active: Vec<bool>, // [K]
}

impl Centroids {
    /// K inactive centroids.
    pub(crate) fn inactive(k: usize, dim: usize) -> Self {
        Self { dim, values: vec![0.0; k * dim], active: vec![false; k] }
    }

    /// Sets centroid `index`, which makes it active.
    pub(crate) fn set(&mut self, index: usize, values: impl Iterator<Item = f32>) {
        let centroid = &mut self.values[index * self.dim..][..self.dim];
        centroid.iter_mut().zip(values).for_each(|(to, from)| *to = from);
        self.active[index] = true;
    }

    pub(crate) fn len(&self) -> usize {
        self.active.len()
    }

    pub(crate) fn values(&self) -> &[f32] {
        &self.values
    }
}

/// Centroids laid out for the kernel: panels of 16, dimension by dimension.
pub(crate) struct Panels {
    dim: usize,
    values: Vec<[f32; LANES]>,     // [panels, D]
    half_norms: Vec<[f32; LANES]>, // [panels]; infinite where no active centroid is
}

impl Panels {
    pub(crate) fn new(centroids: &Centroids) -> Self {
        let dim = centroids.dim;
        let n_panels = centroids.len().div_ceil(LANES);
        let mut values = vec![[0.0; LANES]; n_panels * dim];
        let mut half_norms = vec![[f32::INFINITY; LANES]; n_panels];
        for (index, centroid) in centroids.values.chunks_exact(dim).enumerate() {
            let (panel, lane) = (index / LANES, index % LANES);
            if centroids.active[index] {
                half_norms[panel][lane] = norm_squared(centroid) / 2.0;
            }
            for (column, &value) in values[panel * dim..].iter_mut().zip(centroid) {
                column[lane] = value;
            }
        }
        Self { dim, values, half_norms }
    }

    /// Calls `visit(position, index, distance)` for each of `members` in order: the index of its
    /// nearest active centroid by squared L2, ties by lower index, and that squared distance.
    pub(crate) fn nearest(&self, points: &Points, members: &[u32], mut visit: impl FnMut(usize, u32, f32)) {
        let mut best = [(f32::INFINITY, 0u32); BLOCK_ROWS];
        for (block_index, block) in members.chunks(BLOCK_ROWS).enumerate() {
            best.fill((f32::INFINITY, 0));
            self.distances(points, block, |position, first, distances| {
                for (lane, &distance) in distances.iter().enumerate() {
                    if distance < best[position].0 {
                        best[position] = (distance, (first + lane) as u32);
                    }
                }
            });
            for (position, &(distance, index)) in best[..block.len()].iter().enumerate() {
                visit(block_index * BLOCK_ROWS + position, index, distance);
            }
        }
    }

    /// Calls `visit(position, first, distances)` for each of `members` and each panel, `first` the
    /// panel's first centroid: the squared distances to its centroids, infinite for inactive ones.
    pub(crate) fn distances(
        &self,
        points: &Points,
        members: &[u32],
        mut visit: impl FnMut(usize, usize, &[f32; LANES]),
    ) {
        for (panel_index, half_norms) in self.half_norms.iter().enumerate() {
            let panel = &self.values[panel_index * self.dim..][..self.dim];
            for (group_index, group) in members.chunks(ROWS).enumerate() {
                // A last group of fewer repeats its last point.
                let rows = std::array::from_fn(|row| points.row(group[row.min(group.len() - 1)]));
                let dots = dots(rows, panel);
                for (row, (&member, dots)) in group.iter().zip(&dots).enumerate() {
                    let norm = points.norm_squared(member);
                    // |x|² + |c|² − 2x·c; rounding can take it below 0.
                    let distances: [f32; LANES] =
                        std::array::from_fn(|lane| (norm - 2.0 * (dots[lane] - half_norms[lane])).max(0.0));
                    visit(group_index * ROWS + row, panel_index * LANES, &distances);
                }
            }
        }
    }
}

/// Dot products of 4 points with the 16 centroids of a panel.
fn dots([a, b, c, d]: [&[f32]; ROWS], panel: &[[f32; LANES]]) -> [[f32; LANES]; ROWS] {
    let mut sums = [[0f32; LANES]; ROWS];
    for ((((column, &a), &b), &c), &d) in panel.iter().zip(a).zip(b).zip(c).zip(d) {
        for lane in 0..LANES {
            sums[0][lane] += a * column[lane];
            sums[1][lane] += b * column[lane];
            sums[2][lane] += c * column[lane];
            sums[3][lane] += d * column[lane];
        }
    }
    sums
}
