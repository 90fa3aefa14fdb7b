use crate::codes::{Coded, Codes, encode, padded, slack};
use crate::distance::squared_distance;
use crate::kernel::{LANES, Quad, ROWS, products};

/// Half the squared norm of a lane without a candidate: far enough for it to be never the nearest.
const ABSENT: f32 = 1e36;

/// Added to every bound: more than what is not coded, because it is too small, can be of a score.
const TINY: f32 = 1e-25;

/// Groups of K candidates each, coded for products with [`Codes`]. Their values stay with the caller.
#[derive(Clone, Debug, PartialEq)]
pub struct Panels {
    dim: usize,
    k: usize,
    quads: Vec<Quad>,  // [groups, ceil(K / 16), D padded / 4]
    facts: Vec<Facts>, // [groups, ceil(K / 16)]
}

/// What is known of the candidates of a panel c, as seen from the origin of their group.
#[derive(Clone, Debug, PartialEq)]
struct Facts {
    scale: [f32; LANES],
    /// |c|
    norm: [f32; LANES],
    /// At least |c − scale·code|.
    error: [f32; LANES],
    /// |c|²/2
    half: [f32; LANES],
    /// |scale·code|²
    square: [f32; LANES],
}

/// Between what squared distances a candidate lies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// At most the squared distance.
    pub least: f32,
    /// At least the squared distance.
    pub most: f32,
    /// The candidate, within its group.
    pub index: usize,
}

/// Bounds of x·c − |c|²/2 for the candidates of a panel; the nearest has the largest.
struct Scores {
    least: [f32; LANES],
    most: [f32; LANES],
}

impl Panels {
    /// Room for `n_groups` groups of `k` candidates of `dim` dimensions, all absent yet.
    pub fn absent(n_groups: usize, k: usize, dim: usize) -> Self {
        let n_panels = n_groups * k.div_ceil(LANES);
        let none = [0.0; LANES];
        let facts = Facts { scale: none, norm: none, error: none, half: [ABSENT; LANES], square: none };
        let quads = vec![Quad([[128; 4]; LANES]); n_panels * padded(dim) / 4];
        Self { dim, k, quads, facts: vec![facts; n_panels] }
    }

    /// Candidates K of a group.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Makes candidate `index` of a group `values`, as seen from the group's `origin`, both `[D]` and finite.
    pub fn set(&mut self, group: usize, index: usize, values: &[f32], origin: &[f32]) {
        let mut codes = vec![0i8; padded(self.dim)];
        let coded = encode(values, origin, &mut codes);
        self.place(group, index, &codes, &coded);
    }

    /// Makes candidate `index` of a group a row of `rows`, which were coded with the group's origin.
    pub fn set_row(&mut self, group: usize, index: usize, rows: &Codes, row: usize) {
        self.place(group, index, rows.row(row), &rows.coded(row));
    }

    fn place(&mut self, group: usize, index: usize, codes: &[i8], coded: &Coded) {
        let (panel, lane) = (group * self.n_panels() + index / LANES, index % LANES);
        let n_quads = padded(self.dim) / 4;
        let quads = &mut self.quads[panel * n_quads..][..n_quads];
        for (quad, codes) in quads.iter_mut().zip(codes.as_chunks::<4>().0) {
            quad.0[lane] = codes.map(|code| (i16::from(code) + 128) as u8);
        }
        let facts = &mut self.facts[panel];
        facts.scale[lane] = coded.scale;
        facts.norm[lane] = coded.norm;
        facts.error[lane] = coded.error;
        facts.half[lane] = coded.norm * coded.norm / 2.0;
        facts.square[lane] = coded.square;
    }

    /// Takes candidate `index` of a group away.
    pub fn unset(&mut self, group: usize, index: usize) {
        let panel = group * self.n_panels() + index / LANES;
        self.facts[panel].half[index % LANES] = ABSENT;
    }

    /// Calls `found` with each of the rows and its nearest candidate of a group, ties to the lower index. `values`
    /// gives the true values of a row, `candidate` those of a candidate. Absent candidates are never found; at
    /// least one is there.
    pub fn nearest<'a>(
        &self,
        group: usize,
        rows: &Codes,
        values: impl Fn(usize) -> &'a [f32],
        candidate: impl Fn(usize) -> &'a [f32],
        mut found: impl FnMut(usize, usize),
    ) {
        let n_panels = self.n_panels();
        let mut scores: Vec<[[f32; LANES]; ROWS]> = vec![[[0.0; LANES]; ROWS]; n_panels];
        let mut first = 0;
        while first < rows.len() {
            // Too few rows at the end are filled up with the last of them; a single one is scanned alone.
            let n = ROWS.min(rows.len() - first);
            let row = |r: usize| first + r.min(n - 1);
            let best = match n {
                1 => {
                    let [best] =
                        self.scan::<1>(group, rows, [first], |panel, r, most| scores[panel][r] = most);
                    std::array::from_fn(|_| best)
                }
                _ => {
                    let indices = std::array::from_fn(row);
                    self.scan::<ROWS>(group, rows, indices, |panel, r, most| scores[panel][r] = most)
                }
            };
            for (r, &best) in best.iter().enumerate().take(n) {
                let could_be = |panel: usize| mask(&scores[panel][r], best);
                found(first + r, closest((0..n_panels).map(could_be), || values(first + r), &candidate));
            }
            first += n;
        }
    }

    /// Calls `most` with the panel, the row and the upper bounds of its scores; the result is per row the largest
    /// lower bound.
    fn scan<const R: usize>(
        &self,
        group: usize,
        rows: &Codes,
        indices: [usize; R],
        mut most: impl FnMut(usize, usize, [f32; LANES]),
    ) -> [f32; R] {
        let n_panels = self.n_panels();
        let (codes, coded) = (indices.map(|i| rows.row(i)), indices.map(|i| rows.coded(i)));
        let mut least = [[f32::NEG_INFINITY; LANES]; R];
        for panel in 0..n_panels {
            let (quads, facts) = self.panel(group * n_panels + panel);
            let products = products(codes, quads);
            for r in 0..R {
                let scores = facts.scores(&products[r], &coded[r], slack(self.dim));
                least[r].iter_mut().zip(scores.least).for_each(|(least, score)| *least = least.max(score));
                most(panel, r, scores.most);
            }
        }
        least.map(|lanes| lanes.into_iter().fold(f32::NEG_INFINITY, f32::max))
    }

    /// Adds to `intervals` the squared distances of the candidates of a group to row `index` of `rows`.
    pub fn intervals(&self, group: usize, rows: &Codes, index: usize, intervals: &mut Vec<Interval>) {
        let n_panels = self.n_panels();
        let coded = rows.coded(index);
        let squared_norm = coded.norm * coded.norm;
        let slack = slack(self.dim);
        for panel in 0..n_panels {
            let (quads, facts) = self.panel(group * n_panels + panel);
            let scores = facts.scores(&products([rows.row(index)], quads)[0], &coded, slack);
            for lane in (0..LANES).filter(|&lane| facts.half[lane] < ABSENT) {
                intervals.push(Interval {
                    least: squared_norm - 2.0 * scores.most[lane],
                    most: squared_norm - 2.0 * scores.least[lane],
                    index: panel * LANES + lane,
                });
            }
        }
    }

    /// Calls `found` with each of the rows, the panel (16 candidates of a group) and the squared distances to them as
    /// the codes tell them: exactly 0 between equal ones, and off by about a percent of the product of both distances
    /// to the origin. Those of absent candidates mean nothing.
    pub fn approximate(&self, group: usize, rows: &Codes, mut found: impl FnMut(usize, usize, &[f32; 16])) {
        let n_panels = self.n_panels();
        for first in (0..rows.len()).step_by(ROWS) {
            let n = ROWS.min(rows.len() - first);
            let indices: [usize; ROWS] = std::array::from_fn(|r| first + r.min(n - 1));
            for panel in 0..n_panels {
                let (quads, facts) = self.panel(group * n_panels + panel);
                let products = products(indices.map(|i| rows.row(i)), quads);
                for (r, products) in products.iter().enumerate().take(n) {
                    let row = rows.coded(first + r);
                    let distance = |lane: usize| {
                        let product = (products[lane] - 128 * row.sum) as f32;
                        let product = row.scale * facts.scale[lane] * product;
                        (row.square + facts.square[lane] - 2.0 * product).max(0.0)
                    };
                    found(first + r, panel, &std::array::from_fn(distance));
                }
            }
        }
    }

    /// Panels of a group.
    fn n_panels(&self) -> usize {
        self.k.div_ceil(LANES)
    }

    fn panel(&self, panel: usize) -> (&[Quad], &Facts) {
        let n_quads = padded(self.dim) / 4;
        (&self.quads[panel * n_quads..][..n_quads], &self.facts[panel])
    }
}

impl Facts {
    /// With x = x̂ + ξ and c = ĉ + γ (hats are what the codes stand for), x·c − x̂·ĉ = ξ·c + x̂·γ, which is at most
    /// |ξ||c| + |x̂||γ| (Cauchy–Schwarz); |x̂| ≤ |x| + |ξ|.
    ///
    /// `slack` times the squared norms covers rounding: here, in the true distances that decide between what is left,
    /// and in |x|² − 2·score.
    #[inline(always)]
    fn scores(&self, products: &[i32; LANES], row: &Coded, slack: f32) -> Scores {
        let shift = 128 * row.sum;
        let (mut least, mut most) = ([0f32; LANES], [0f32; LANES]);
        let coded_norm = row.norm + row.error;
        let error = row.error + row.norm * slack;
        let of_row = row.norm * row.norm * slack + TINY;
        for lane in 0..LANES {
            let product = (products[lane] - shift) as f32 * (row.scale * self.scale[lane]);
            let score = product - self.half[lane];
            let bound = error * self.norm[lane]
                + coded_norm * self.error[lane]
                + self.half[lane] * (4.0 * slack)
                + of_row;
            least[lane] = score - bound;
            most[lane] = score + bound;
        }
        Scores { least, most }
    }
}

/// The lanes that reach `best`.
#[inline(always)]
fn mask(most: &[f32; LANES], best: f32) -> u16 {
    let mut mask = 0;
    for (lane, &most) in most.iter().enumerate() {
        mask |= u16::from(most >= best) << lane;
    }
    mask
}

/// The candidate of the least true distance among those of the masks, one per panel.
fn closest<'a>(
    masks: impl Iterator<Item = u16>,
    values: impl Fn() -> &'a [f32],
    candidate: impl Fn(usize) -> &'a [f32],
) -> usize {
    let (mut best, mut least) = (usize::MAX, None);
    for (panel, mut mask) in masks.enumerate() {
        while mask != 0 {
            let index = panel * LANES + mask.trailing_zeros() as usize;
            mask &= mask - 1;
            if best == usize::MAX {
                // Alone it is the nearest, and its distance is of no use.
                best = index;
                continue;
            }
            let distance = |index: usize| squared_distance(values(), candidate(index));
            let (least, found) = (least.get_or_insert_with(|| distance(best)), distance(index));
            if found < *least {
                (best, *least) = (index, found);
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn vectors(n: usize, dim: usize, around: &[f32], spread: f32, rng: &mut ChaCha8Rng) -> Vec<f32> {
        (0..n * dim).map(|i| around[i % dim] + spread * (rng.random::<f32>() - 0.5)).collect()
    }

    fn exact(x: &[f32], c: &[f32]) -> f64 {
        x.iter().zip(c).map(|(&x, &c)| (f64::from(x) - f64::from(c)).powi(2)).sum()
    }

    #[test]
    fn the_nearest_is_that_of_all_distances_and_intervals_hold_them() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for (n, k, dim, spread) in
            [(1, 1, 1, 1.0), (9, 5, 3, 1.0), (40, 16, 17, 0.1), (33, 40, 96, 1e-3), (25, 33, 384, 10.0)]
        {
            let around = vectors(1, dim, &vec![3.0; dim], 4.0, &mut rng);
            let (rows, values) =
                (vectors(n, dim, &around, spread, &mut rng), vectors(k, dim, &around, spread, &mut rng));
            let mut codes = Codes::with_capacity(n, dim);
            rows.chunks_exact(dim).for_each(|row| codes.push(row, &around));
            let mut panels = Panels::absent(2, k, dim);
            let present = |index: usize| k == 1 || index % 7 != 3;
            for index in (0..k).filter(|&index| present(index)) {
                panels.set(1, index, &values[index * dim..][..dim], &around);
            }
            let row = |i: usize| &rows[i * dim..][..dim];
            let candidate = |c: usize| &values[c * dim..][..dim];
            let mut n_found = 0;
            panels.nearest(1, &codes, row, candidate, |i, found| {
                assert_eq!(i, n_found);
                n_found += 1;
                let distance = |&c: &usize| (squared_distance(row(i), candidate(c)), c);
                let all = (0..k).filter(|&c| present(c));
                let best = all.min_by(|a, b| distance(a).partial_cmp(&distance(b)).unwrap()).unwrap();
                assert_eq!(found, best, "row {i} of {n} x {k} x {dim}");
                let mut intervals = vec![];
                panels.intervals(1, &codes, i, &mut intervals);
                assert_eq!(intervals.len(), (0..k).filter(|&c| present(c)).count());
                for Interval { least, most, index } in intervals {
                    let d = exact(row(i), candidate(index));
                    assert!(f64::from(least) <= d && d <= f64::from(most), "{least} <= {d} <= {most}");
                }
            });
            assert_eq!(n_found, n);
        }
    }

    #[test]
    fn tiny_and_far_values_are_compared_in_full() {
        // Around an origin, apart by less than codes can hold; and ties of rounded distances far away.
        let cases: [(&[f32], &[f32], &[f32]); 4] = [
            (&[1.0, 1e-38], &[1.0, 0.0, 1.0, 1e-38], &[1.0, 0.0]),
            (&[1.0, 3e-20], &[1.0, 0.0, 1.0, 5e-20], &[1.0, 0.0]),
            (&[1000.0], &[0.001, 0.001_005], &[0.0]),
            (&[-7e14], &[3e14, -2e14], &[1e14]),
        ];
        for (row, candidates, origin) in cases {
            let dim = row.len();
            let mut codes = Codes::with_capacity(9, dim);
            (0..9).for_each(|_| codes.push(row, origin));
            let mut panels = Panels::absent(1, 2, dim);
            let candidate = |c: usize| &candidates[c * dim..][..dim];
            (0..2).for_each(|c| panels.set(0, c, candidate(c), origin));
            let distances = [0, 1].map(|c| squared_distance(row, candidate(c)));
            let expected = usize::from(distances[1] < distances[0]);
            panels.nearest(0, &codes, |_| row, candidate, |_, found| assert_eq!(found, expected, "{row:?}"));
        }
    }

    #[test]
    fn approximate_distances_are_near_and_those_of_equal_rows_zero() {
        let mut rng = ChaCha8Rng::seed_from_u64(8);
        let (n, dim) = (21, 50);
        let origin = vec![0.25; dim];
        let mut rows = vectors(n, dim, &origin, 1.0, &mut rng);
        let equal = rows[..dim].to_vec();
        rows[5 * dim..6 * dim].copy_from_slice(&equal);
        let mut codes = Codes::with_capacity(n, dim);
        rows.chunks_exact(dim).for_each(|row| codes.push(row, &origin));
        let mut panels = Panels::absent(1, 16, dim);
        (0..16).for_each(|c| panels.set_row(0, c, &codes, c));
        panels.approximate(0, &codes, |i, _, distances| {
            for (c, &found) in distances.iter().enumerate() {
                let expected = exact(&rows[i * dim..][..dim], &rows[c * dim..][..dim]);
                assert!((f64::from(found) - expected).abs() <= 0.02 * expected + 1e-9, "{found} {expected}");
                assert!(expected > 0.0 || found == 0.0);
            }
        });
    }
}
