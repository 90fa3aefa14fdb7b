//! K-means over the points of one node of the tree.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::Result;
use crate::assignment::{Assignment, Points};
use crate::balance::{balance, cap};
use crate::centroids::Centroids;
use crate::options::Options;
use crate::progress::Meter;
use crate::rows::Rows;
use crate::seeding::seed;
use crate::sums::Grid;

/// Points per centroid that seeding draws from.
const SEEDING_POINTS: usize = 64;

/// Where a node stands in the tree: with the seed, it decides all that is random in the node.
#[derive(Copy, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) struct NodeId {
    pub(crate) level: usize,
    pub(crate) index: usize,
}

/// What training a node leaves.
pub(crate) struct Trained {
    /// `[K, D]`; zeros where no point went.
    pub(crate) centroids: Vec<f32>,
    /// Points of each cluster, `[K]`.
    pub(crate) counts: Vec<u64>,
    /// Cluster of each point, `[N]`.
    pub(crate) labels: Vec<u32>,
}

/// Trains the `k` centroids of a node on its points, and assigns the points to them under the cap.
pub(crate) fn train(
    points: Points,
    k: usize,
    options: &Options,
    id: NodeId,
    meter: &Meter,
) -> Result<Trained> {
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    rng.set_stream(((id.level as u64) << 32) | id.index as u64);
    let per_step = options.points_per_iteration.map_or(points.len(), |n| n.min(points.len()));
    let n_seeding = points.len().min(SEEDING_POINTS * k);
    let drawn = draw(points.len(), per_step, n_seeding, options.iterations, &mut rng);
    let members =
        |positions: &[u32]| positions.iter().map(|&at| points.members[at as usize]).collect::<Vec<u32>>();
    let takes_all = per_step == points.len();
    // Codes are kept where they are used again, but not of points that are not in memory themselves.
    let codes = if takes_all && points.rows.in_memory().is_some() { Some(points.coded()?) } else { None };
    let start = {
        let some = members(&drawn[..n_seeding]);
        let sample = points.of(if n_seeding == points.len() { points.members } else { &some });
        let mut buffer = vec![];
        let chunk = sample.chunk(sample.members, &mut buffer)?;
        match &codes {
            Some(codes) if n_seeding == points.len() => seed(codes, &chunk, k, &mut rng),
            _ => seed(&sample.coded()?, &chunk, k, &mut rng),
        }
    };
    let mut all = Assignment::none(points.of(points.members), k, codes);
    let (mut centroids, mut n_steps) = (start, 0);
    while n_steps < options.iterations {
        let next = if takes_all {
            step(&mut all, &centroids, options, (&mut rng, n_steps))?
        } else {
            let sample = members(&fresh(&drawn, per_step, n_steps));
            step(
                &mut Assignment::none(points.of(&sample), k, None),
                &centroids,
                options,
                (&mut rng, n_steps),
            )?
        };
        let settled = takes_all && next == centroids;
        centroids = next;
        n_steps += 1;
        meter.step(points.len());
        if settled {
            break;
        }
    }
    let trained = finish(all, centroids, options)?;
    meter.node(points.len(), n_steps);
    Ok(trained)
}

/// One step: points to their nearest centroids, large clusters relieved, centroids to the means.
///
/// In the first quarter of the steps large clusters are split at random, as in the paper: it moves centroids to where
/// points are many. It never lets a node settle, though, so that afterwards the points that lose least leave.
fn step(
    taken: &mut Assignment,
    centroids: &Centroids,
    options: &Options,
    (rng, n_steps): (&mut ChaCha8Rng, usize),
) -> Result<Centroids> {
    taken.assign(centroids)?;
    if n_steps < options.iterations / 4 {
        balance(taken, options.share(centroids.len()), rng)?;
    } else {
        let limit = options.limit(centroids.len(), taken.points.len());
        cap(taken, centroids, limit)?;
    }
    taken.means(centroids, options.spherical)
}

/// The last assignment: to the nearest centroids, then from clusters above the cap to others with room.
fn finish(mut all: Assignment, centroids: Centroids, options: &Options) -> Result<Trained> {
    let k = centroids.len();
    all.assign(&centroids)?;
    let limit = options.limit(k, all.points.len());
    cap(&mut all, &centroids, limit)?;
    let dim = all.points.dim();
    let mut values = vec![0f32; k * dim];
    all.add_up()?;
    for (cluster, to) in values.chunks_exact_mut(dim).enumerate().filter(|&(c, _)| all.counts[c] > 0) {
        let mean = all.sums.mean(cluster, all.counts[cluster], options.spherical);
        to.iter_mut().zip(mean).for_each(|(to, from)| *to = from);
    }
    let counts = all.counts.iter().map(|&count| count as u64).collect();
    Ok(Trained { centroids: values, counts, labels: all.labels })
}

/// Positions of as many of `n` points, in random order, as seeding takes, or as all the steps take together if a
/// step takes fewer than all.
fn draw(n: usize, per_step: usize, n_seeding: usize, iterations: usize, rng: &mut ChaCha8Rng) -> Vec<u32> {
    let n_steps = if per_step < n { per_step.saturating_mul(iterations) } else { 0 };
    let mut order: Vec<u32> = (0..n as u32).collect();
    let (drawn, _) = order.partial_shuffle(rng, n_steps.max(n_seeding).min(n));
    drawn.to_vec()
}

/// The positions of the points of a step: those after the points of the step before, from the start again when all
/// have been taken; in ascending order, which is mostly how they lie in memory.
fn fresh(drawn: &[u32], per_step: usize, iteration: usize) -> Vec<u32> {
    let start = iteration * per_step % drawn.len();
    let mut sample: Vec<u32> = drawn.iter().cycle().skip(start).take(per_step).copied().collect();
    sample.sort_unstable();
    sample
}

/// Centroids after at most `iterations` steps of Lloyd's algorithm over all of `rows` from `start`, `[K, D]`, without
/// a cap on shares; it ends before when no centroid moves. It keeps codes of all points, N × D bytes.
/// A centroid that no point is left for is zeros.
///
/// # Errors
/// On points as for [`build`](crate::build), and on a start that is not K finite rows.
pub fn lloyd(rows: &dyn Rows, start: &[f32], iterations: usize) -> Result<Vec<f32>> {
    let dim = rows.dim();
    let largest = crate::rows::check(rows)?;
    if start.is_empty() || !start.len().is_multiple_of(dim) {
        return Err(crate::Error::Length { values: start.len(), dim });
    }
    let k = start.len() / dim;
    let mut centroids = Centroids::inactive(k, dim);
    for (index, row) in start.chunks_exact(dim).enumerate() {
        let squared_norm = row.iter().map(|x| x * x).sum::<f32>();
        if squared_norm.is_nan() || squared_norm > nearest::MAX_SQUARED_NORM {
            return Err(crate::Error::Start { index, squared_norm });
        }
        centroids.set(index, row.iter().copied());
    }
    let members: Vec<u32> = (0..rows.len() as u32).collect();
    let origin = mean(start, dim);
    let grid = Grid::new(rows.len(), largest);
    let points = Points { rows, members: &members, origin: &origin, grid };
    let codes = points.coded()?;
    let mut all = Assignment::none(points, k, Some(codes));
    for _ in 0..iterations {
        all.assign(&centroids)?;
        let next = all.means(&centroids, false)?;
        if next == centroids {
            break;
        }
        centroids = next;
    }
    Ok(centroids.into_values())
}

/// The mean of rows, `[D]`.
pub(crate) fn mean(rows: &[f32], dim: usize) -> Vec<f32> {
    let n = (rows.len() / dim) as f64;
    let of_axis = |axis: usize| rows.chunks_exact(dim).map(|row| f64::from(row[axis])).sum::<f64>() / n;
    (0..dim).map(|axis| of_axis(axis) as f32).collect()
}
