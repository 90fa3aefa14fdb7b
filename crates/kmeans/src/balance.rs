//! Keeps clusters from growing above their share of a node's points.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::Result;
use crate::assignment::{Assignment, CHUNK};
use crate::centroids::Centroids;

/// Splits every cluster that holds more than `share` of the step's points at random, evenly,
/// with the smallest cluster at that moment (paper, section 2 and its appendix): the largest first,
/// until none is too large or the largest left cannot be split, because it holds one point many
/// times, or is no larger than the smallest but for one point.
pub(crate) fn balance(step: &mut Assignment, share: f64, rng: &mut ChaCha8Rng) -> Result<()> {
    let limit = share * step.labels.len() as f64;
    if step.counts.iter().all(|&count| count as f64 <= limit) {
        return Ok(());
    }
    let mut lists = lists(step);
    let mut divisible = vec![true; lists.len()];
    loop {
        // Of equals, the first: `max_by_key` alone would take the last.
        let sizes = || lists.iter().map(Vec::len).enumerate();
        let largest = sizes().rev().filter(|&(index, _)| divisible[index]).max_by_key(|&(_, n)| n);
        let (Some((from, n_from)), Some((to, n_to))) = (largest, sizes().min_by_key(|&(_, n)| n)) else {
            break;
        };
        if n_from as f64 <= limit || n_from < n_to + 2 {
            break;
        }
        if all_equal(step, &lists[from])? {
            divisible[from] = false;
            continue;
        }
        for _ in 0..(n_from - n_to) / 2 {
            let chosen = rng.random_range(0..lists[from].len());
            let position = lists[from].swap_remove(chosen);
            lists[to].push(position);
        }
    }
    let mut moves = vec![];
    for (to, list) in lists.iter().enumerate() {
        let moved = list.iter().filter(|&&position| step.labels[position as usize] != to as u32);
        moves.extend(moved.map(|&position| (position, to as u32)));
    }
    moves.sort_unstable();
    step.relabel(&moves);
    Ok(())
}

/// Positions of the points of each cluster.
fn lists(step: &Assignment) -> Vec<Vec<u32>> {
    let mut lists: Vec<Vec<u32>> = step.counts.iter().map(|&n| Vec::with_capacity(n)).collect();
    for (position, &label) in step.labels.iter().enumerate() {
        lists[label as usize].push(position as u32);
    }
    lists
}

/// Whether all these points are the same to the bit: no split of them could last.
fn all_equal(step: &Assignment, positions: &[u32]) -> Result<bool> {
    let Some(&first) = positions.first() else { return Ok(true) };
    let member = |position: u32| step.points.members[position as usize];
    let (first, mut buffer) = ([member(first)], vec![]);
    let first = step.points.chunk(&first, &mut buffer)?;
    for positions in positions.chunks(CHUNK) {
        let members: Vec<u32> = positions.iter().map(|&position| member(position)).collect();
        let mut buffer = vec![];
        let chunk = step.points.chunk(&members, &mut buffer)?;
        if (0..members.len()).any(|i| chunk.row(i) != first.row(0)) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A point that could move to another cluster, and how much farther that one is.
#[derive(PartialEq)]
struct Move {
    regret: f32,
    point: usize,
    to: usize,
}

impl Eq for Move {}

impl Ord for Move {
    fn cmp(&self, other: &Self) -> Ordering {
        self.regret.total_cmp(&other.regret).then(self.point.cmp(&other.point))
    }
}

impl PartialOrd for Move {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Moves points out of clusters with more than `limit`, those first that lose least, each to the nearest cluster with
/// room, by the distances that codes tell. A cluster that holds one point many times and nothing else stays as it is:
/// no other is better for some of them.
pub(crate) fn cap(step: &mut Assignment, centroids: &Centroids, limit: usize) -> Result<()> {
    let mut over: Vec<usize> = (0..centroids.len()).filter(|&cluster| step.counts[cluster] > limit).collect();
    over.sort_by_key(|&cluster| (Reverse(step.counts[cluster]), cluster));
    if over.is_empty() {
        return Ok(());
    }
    let lists = lists(step);
    for cluster in over {
        let positions = &lists[cluster];
        if all_equal(step, positions)? {
            continue;
        }
        let moves = relieve(step, centroids, (cluster, positions), limit)?;
        step.relabel(&moves);
    }
    Ok(())
}

/// The moves that bring a cluster down to the limit, or as far as there is room.
fn relieve(
    step: &Assignment,
    centroids: &Centroids,
    (cluster, positions): (usize, &[u32]),
    limit: usize,
) -> Result<Vec<(u32, u32)>> {
    let (k, mut counts) = (centroids.len(), step.counts.clone());
    let distances = step.approximate_distances(positions)?;
    let best = |point: usize, counts: &[usize]| {
        let row = &distances[point * k..][..k];
        let with_room = (0..k).filter(|&to| to != cluster && counts[to] < limit && centroids.is_active(to));
        let to = with_room.min_by(|&a, &b| row[a].total_cmp(&row[b]).then(a.cmp(&b)))?;
        Some(Reverse(Move { regret: row[to] - row[cluster], point, to }))
    };
    let mut queue: BinaryHeap<_> = (0..positions.len()).filter_map(|point| best(point, &counts)).collect();
    let mut moves = vec![];
    while counts[cluster] > limit
        && let Some(Reverse(next)) = queue.pop()
    {
        if counts[next.to] >= limit {
            // Its place was taken meanwhile.
            queue.extend(best(next.point, &counts));
            continue;
        }
        counts[cluster] -= 1;
        counts[next.to] += 1;
        moves.push((positions[next.point], next.to as u32));
    }
    moves.sort_unstable();
    Ok(moves)
}
