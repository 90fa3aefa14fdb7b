use nearest::{Codes, Panels};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::assignment::CHUNK;
use crate::centroids::Centroids;
use crate::rows::Chunk;

/// The most candidates that are weighed for one centroid: those of a panel.
const MAX_CANDIDATES: usize = 16;

/// Greedy k-means++ (Arthur and Vassilvitskii 2007, section 3 and its closing remark): each next
/// centroid is, of several points drawn with probability proportional to their squared distance to
/// the nearest centroid so far, the one that leaves the least sum of squared distances. With fewer
/// distinct points than `k`, the rest stay inactive. Distances are those of the 8-bit codes: a draw needs no more.
///
/// `codes` are those of the points to draw from, [`CHUNK`] at a time, and `chunk` their values.
pub(crate) fn seed(codes: &[Codes], chunk: &Chunk, k: usize, rng: &mut ChaCha8Rng) -> Centroids {
    let mut centroids = Centroids::inactive(k, codes[0].dim());
    let mut choose = |index: usize, position: usize| {
        centroids.set(index, chunk.row(position).iter().copied());
    };
    let n = codes.iter().map(Codes::len).sum();
    let first = rng.random_range(0..n);
    choose(0, first);
    let mut distances = vec![f32::INFINITY; n];
    distances = closest_with(codes, &distances, &[first]).1;
    let n_candidates = (2 + k.ilog2() as usize).min(MAX_CANDIDATES);
    for index in 1..k {
        let Some(candidates) = draw(&distances, n_candidates, rng) else { break };
        let (best, closest) = closest_with(codes, &distances, &candidates);
        choose(index, candidates[best]);
        distances = closest;
    }
    centroids
}

/// Positions drawn with probability proportional to their distance; none if all distances are 0.
fn draw(distances: &[f32], n: usize, rng: &mut ChaCha8Rng) -> Option<Vec<usize>> {
    let mut total = 0f64;
    let cumulative: Vec<f64> = distances
        .iter()
        .map(|&distance| {
            total += f64::from(distance);
            total
        })
        .collect();
    // The draw can round up to the total itself: it then means the last point with any distance.
    let last = distances.iter().rposition(|&distance| distance > 0.0)?;
    let position = |draw: f64| cumulative.partition_point(|&sum| sum <= draw).min(last);
    Some((0..n).map(|_| position(rng.random::<f64>() * total)).collect())
}

/// The candidate (of at most 16) with the least sum of squared distances to it or to an earlier centroid, ties by
/// order, and those distances, `[N]`.
fn closest_with(codes: &[Codes], distances: &[f32], candidates: &[usize]) -> (usize, Vec<f32>) {
    let mut panels = Panels::absent(1, candidates.len(), codes[0].dim());
    for (index, &candidate) in candidates.iter().enumerate() {
        panels.set_row(0, index, &codes[candidate / CHUNK], candidate % CHUNK);
    }
    let piece = |(codes, distances): (&Codes, &[f32])| {
        let mut sums = [0f64; MAX_CANDIDATES];
        let mut rows = Vec::with_capacity(codes.len());
        panels.approximate(0, codes, |position, _, found| {
            let closest: [f32; MAX_CANDIDATES] =
                std::array::from_fn(|lane| found[lane].min(distances[position]));
            sums.iter_mut().zip(&closest).for_each(|(sum, &distance)| *sum += f64::from(distance));
            rows.push(closest);
        });
        (sums, rows)
    };
    let pieces: Vec<_> = match codes {
        [only] => vec![piece((only, distances))],
        many => many.par_iter().zip(distances.par_chunks(CHUNK)).map(piece).collect(),
    };
    let sum_of = |lane: usize| pieces.iter().map(|(sums, _)| sums[lane]).sum::<f64>();
    let best = (0..candidates.len()).min_by(|&a, &b| sum_of(a).total_cmp(&sum_of(b))).unwrap_or(0);
    (best, pieces.iter().flat_map(|(_, rows)| rows).map(|closest| closest[best]).collect())
}
