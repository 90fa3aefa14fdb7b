use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::kernel::{Centroids, LANES, Panels};
use crate::points::Points;

/// Points that one task scores.
const CHUNK: usize = 1024;

/// Greedy k-means++ (Arthur and Vassilvitskii 2007, section 3 and its closing remark): each next
/// centroid is, of several points drawn with probability proportional to their squared distance to
/// the nearest centroid so far, the one that leaves the least sum of squared distances. With fewer
/// distinct points than `k`, the rest stay inactive.
pub(crate) fn seed(points: &Points, members: &[u32], k: usize, rng: &mut ChaCha8Rng) -> Centroids {
    let mut centroids = Centroids::inactive(k, points.dim());
    let mut choose = |index: usize, member: u32| centroids.set(index, points.row(member).iter().copied());
    let first = members[rng.random_range(0..members.len())];
    choose(0, first);
    let mut distances = vec![f32::INFINITY; members.len()];
    distances = closest_with(points, members, &distances, &[first]).1;
    let n_candidates = (2 + k.ilog2() as usize).min(LANES);
    for index in 1..k {
        let Some(candidates) = draw(members, &distances, n_candidates, rng) else { break };
        let (best, closest) = closest_with(points, members, &distances, &candidates);
        choose(index, candidates[best]);
        distances = closest;
    }
    centroids
}

/// Points drawn with probability proportional to their distance; none if all distances are 0.
fn draw(members: &[u32], distances: &[f32], n: usize, rng: &mut ChaCha8Rng) -> Option<Vec<u32>> {
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
    Some((0..n).map(|_| members[position(rng.random::<f64>() * total)]).collect())
}

/// The candidate (at most 16) with the least sum of squared distances to it or to an earlier
/// centroid, ties by order, and those distances, `[N]`.
fn closest_with(
    points: &Points,
    members: &[u32],
    distances: &[f32],
    candidates: &[u32],
) -> (usize, Vec<f32>) {
    let mut centroids = Centroids::inactive(candidates.len(), points.dim());
    for (index, &candidate) in candidates.iter().enumerate() {
        centroids.set(index, points.row(candidate).iter().copied());
    }
    let panels = Panels::new(&centroids);
    let chunks: Vec<([f64; LANES], Vec<[f32; LANES]>)> = members
        .par_chunks(CHUNK)
        .zip(distances.par_chunks(CHUNK))
        .map(|(members, distances)| {
            let mut sums = [0f64; LANES];
            let mut rows = Vec::with_capacity(members.len());
            panels.distances(points, members, |position, _, found| {
                let closest: [f32; LANES] = std::array::from_fn(|lane| found[lane].min(distances[position]));
                sums.iter_mut().zip(&closest).for_each(|(sum, &distance)| *sum += f64::from(distance));
                rows.push(closest);
            });
            (sums, rows)
        })
        .collect();
    let sum_of = |lane: usize| chunks.iter().map(|(sums, _)| sums[lane]).sum::<f64>();
    let best = (0..candidates.len()).min_by(|&a, &b| sum_of(a).total_cmp(&sum_of(b))).unwrap_or(0);
    (best, chunks.iter().flat_map(|(_, rows)| rows).map(|closest| closest[best]).collect())
}
