use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::node::Step;
use crate::points::Points;

/// Splits every cluster that holds more than `max_share` of the step's points at random, evenly,
/// with the smallest cluster at that moment (paper, section 2 and its appendix): the largest first,
/// until none is too large or the largest left cannot be split, because it holds one point many
/// times, or is no larger than the smallest but for one point.
pub(crate) fn balance(
    points: &Points,
    members: &[u32],
    step: &mut Step,
    max_share: f64,
    rng: &mut ChaCha8Rng,
) {
    let cap = max_share * members.len() as f64;
    if step.counts.iter().all(|&count| count as f64 <= cap) {
        return;
    }
    let mut lists = vec![Vec::new(); step.counts.len()];
    for (position, &label) in step.labels.iter().enumerate() {
        lists[label as usize].push(position as u32);
    }
    let mut divisible = vec![true; lists.len()];
    loop {
        // Of equals, the first: `max_by_key` alone would take the last.
        let sizes = || lists.iter().map(Vec::len).enumerate();
        let largest = sizes().rev().filter(|&(index, _)| divisible[index]).max_by_key(|&(_, n)| n);
        let (Some((from, n_from)), Some((to, n_to))) = (largest, sizes().min_by_key(|&(_, n)| n)) else {
            break;
        };
        if n_from as f64 <= cap || n_from < n_to + 2 {
            break;
        }
        if all_equal(points, members, &lists[from]) {
            divisible[from] = false;
            continue;
        }
        for _ in 0..(n_from - n_to) / 2 {
            let chosen = rng.random_range(0..lists[from].len());
            let position = lists[from].swap_remove(chosen);
            lists[to].push(position);
        }
    }
    apply(points, members, step, &lists);
}

/// Whether all these points are the same to the bit: no split of them could last.
fn all_equal(points: &Points, members: &[u32], positions: &[u32]) -> bool {
    let row = |position: u32| points.row(members[position as usize]);
    positions.windows(2).all(|pair| row(pair[0]) == row(pair[1]))
}

/// Brings labels, counts and sums to what the lists say.
fn apply(points: &Points, members: &[u32], step: &mut Step, lists: &[Vec<u32>]) {
    let dim = points.dim();
    for (to, list) in lists.iter().enumerate() {
        step.counts[to] = list.len() as u64;
        for &position in list {
            let from = std::mem::replace(&mut step.labels[position as usize], to as u32) as usize;
            if from == to {
                continue;
            }
            let row = points.row(members[position as usize]);
            for (axis, &value) in row.iter().enumerate() {
                step.sums[from * dim + axis] -= f64::from(value);
                step.sums[to * dim + axis] += f64::from(value);
            }
        }
    }
}
