//! K-means over the points of one node of the tree.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::balance::balance;
use crate::build::Options;
use crate::kernel::{Centroids, Panels};
use crate::points::Points;
use crate::seeding::seed;

/// Points that one task assigns, at least.
const MIN_CHUNK: usize = 1024;

/// Bytes that the sums of all the tasks of a step may take together.
const SUM_BYTES: usize = 64 << 20;

/// Points per centroid that seeding draws from.
const SEEDING_POINTS: usize = 64;

/// Where a node stands in the tree: with the seed, it decides all that is random in the node.
#[derive(Copy, Clone)]
pub(crate) struct NodeId {
    pub(crate) level: usize,
    pub(crate) index: usize,
}

/// One assignment step over the points taken for it, `M` of them.
pub(crate) struct Step {
    /// Centroid of each point, `[M]`.
    pub(crate) labels: Vec<u32>,
    /// Squared distance to that centroid, `[M]`.
    distances: Vec<f32>,
    /// Sum of the points of each centroid, `[K, D]`.
    pub(crate) sums: Vec<f64>,
    /// Points of each centroid, `[K]`.
    pub(crate) counts: Vec<u64>,
}

/// Trains the `k` centroids of a node on its points, `members`, at least one.
pub(crate) fn train(points: &Points, members: &[u32], k: usize, options: &Options, id: NodeId) -> Centroids {
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    rng.set_stream(((id.level as u64) << 32) | id.index as u64);
    let per_step = options.points_per_iteration.map_or(members.len(), |n| n.min(members.len()));
    let n_seeding = members.len().min(SEEDING_POINTS * k);
    let drawn = draw(members, per_step, n_seeding, options.iterations, &mut rng);
    let max_share = options.max_share.unwrap_or(1.5 / k as f64);
    let mut centroids = seed(points, &drawn[..n_seeding], k, &mut rng);
    for iteration in 0..options.iterations {
        let sample: Vec<u32>;
        let taken = if per_step == members.len() {
            members
        } else {
            sample = fresh(&drawn, per_step, iteration);
            &sample
        };
        let mut step = assignment(points, taken, &centroids);
        balance(points, taken, &mut step, max_share, &mut rng);
        let next = update(points, taken, &step, options.spherical);
        let settled = taken.len() == members.len() && next == centroids;
        centroids = next;
        if settled {
            break;
        }
    }
    centroids
}

/// The nearest centroid of each point, `[M]`.
pub(crate) fn labels(points: &Points, members: &[u32], centroids: &Centroids) -> Vec<u32> {
    let panels = Panels::new(centroids);
    let mut labels = vec![0; members.len()];
    labels.par_chunks_mut(MIN_CHUNK).zip(members.par_chunks(MIN_CHUNK)).for_each(|(labels, members)| {
        panels.nearest(points, members, |position, index, _| labels[position] = index);
    });
    labels
}

/// As many points, in random order, as seeding takes, or as all the steps take together if a step
/// takes fewer than all.
fn draw(
    members: &[u32],
    per_step: usize,
    n_seeding: usize,
    iterations: usize,
    rng: &mut ChaCha8Rng,
) -> Vec<u32> {
    let n_steps = if per_step < members.len() { per_step.saturating_mul(iterations) } else { 0 };
    let mut order = members.to_vec();
    let (drawn, _) = order.partial_shuffle(rng, n_steps.max(n_seeding).min(members.len()));
    drawn.to_vec()
}

/// The points of a step: those after the points of the step before, from the start again when all
/// have been taken; in ascending order, which is how they lie in memory.
fn fresh(drawn: &[u32], per_step: usize, iteration: usize) -> Vec<u32> {
    let start = iteration * per_step % drawn.len();
    let mut sample: Vec<u32> = drawn.iter().cycle().skip(start).take(per_step).copied().collect();
    sample.sort_unstable();
    sample
}

/// Assigns points to their nearest centroids, and adds up the points of each.
fn assignment(points: &Points, members: &[u32], centroids: &Centroids) -> Step {
    let (k, dim) = (centroids.len(), points.dim());
    let panels = Panels::new(centroids);
    // Depends on the sizes alone, never on the number of threads: the sums round the same way.
    let n_chunks = (SUM_BYTES / (k * dim * size_of::<f64>())).max(1);
    let chunk = members.len().div_ceil(n_chunks).max(MIN_CHUNK);
    let chunks: Vec<Step> = members
        .par_chunks(chunk)
        .map(|members| {
            let mut step = Step::new(members.len(), k, dim);
            panels.nearest(points, members, |position, index, distance| {
                step.labels.push(index);
                step.distances.push(distance);
                step.counts[index as usize] += 1;
                let sum = &mut step.sums[index as usize * dim..][..dim];
                let row = points.row(members[position]);
                sum.iter_mut().zip(row).for_each(|(sum, &value)| *sum += f64::from(value));
            });
            step
        })
        .collect();
    let mut whole = Step::new(members.len(), k, dim);
    for step in &chunks {
        whole.labels.extend_from_slice(&step.labels);
        whole.distances.extend_from_slice(&step.distances);
        whole.counts.iter_mut().zip(&step.counts).for_each(|(count, other)| *count += other);
        whole.sums.iter_mut().zip(&step.sums).for_each(|(sum, other)| *sum += other);
    }
    whole
}

impl Step {
    fn new(n_points: usize, k: usize, dim: usize) -> Self {
        Self {
            labels: Vec::with_capacity(n_points),
            distances: Vec::with_capacity(n_points),
            sums: vec![0.0; k * dim],
            counts: vec![0; k],
        }
    }
}

/// The mean of each centroid's points, of unit norm if `spherical`. A centroid without points moves
/// to the point that is farthest from its own, the next one to the next; where every point lies on
/// its centroid it becomes inactive.
fn update(points: &Points, members: &[u32], step: &Step, spherical: bool) -> Centroids {
    let dim = points.dim();
    let mut centroids = Centroids::inactive(step.counts.len(), dim);
    for (index, (&count, sum)) in step.counts.iter().zip(step.sums.chunks_exact(dim)).enumerate() {
        if count == 0 {
            continue;
        }
        let norm = sum.iter().map(|value| value * value).sum::<f64>().sqrt();
        // A sum of exactly 0 has no direction: its mean stays where it is.
        let divisor = if spherical && norm > 0.0 { norm } else { count as f64 };
        centroids.set(index, sum.iter().map(|value| (value / divisor) as f32));
    }
    let empty: Vec<usize> = (0..step.counts.len()).filter(|&index| step.counts[index] == 0).collect();
    for (&index, position) in empty.iter().zip(farthest(&step.distances, empty.len())) {
        centroids.set(index, points.row(members[position as usize]).iter().copied());
    }
    centroids
}

/// The positions of the `n` largest distances, largest first, ties by position; those of 0 left out.
fn farthest(distances: &[f32], n: usize) -> Vec<u32> {
    if n == 0 {
        return Vec::new();
    }
    let mut positions: Vec<u32> =
        (0..distances.len() as u32).filter(|&position| distances[position as usize] > 0.0).collect();
    let order = |a: &u32, b: &u32| distances[*b as usize].total_cmp(&distances[*a as usize]).then(a.cmp(b));
    if positions.len() > n {
        positions.select_nth_unstable_by(n - 1, order);
        positions.truncate(n);
    }
    positions.sort_unstable_by(order);
    positions
}
