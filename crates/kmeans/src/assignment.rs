//! Points of a node with the cluster of each.

use nearest::{Codes, squared_distance};
use rayon::prelude::*;

use crate::Result;
use crate::centroids::{Centroids, Coded};
use crate::rows::{Chunk, Rows};
use crate::sums::{Grid, Sums};

/// Points that a task codes and assigns together.
pub(crate) const CHUNK: usize = 1024;

/// The label of a point that has none yet.
const NONE: u32 = u32::MAX;

/// The points that a node is trained on, at least one, and how they are seen.
pub(crate) struct Points<'a> {
    pub(crate) rows: &'a dyn Rows,
    pub(crate) members: &'a [u32],
    /// A point near all of them: codes are of differences from it.
    pub(crate) origin: &'a [f32],
    pub(crate) grid: Grid,
}

impl<'a> Points<'a> {
    pub(crate) fn len(&self) -> usize {
        self.members.len()
    }

    pub(crate) fn dim(&self) -> usize {
        self.rows.dim()
    }

    /// The same for some of the points.
    pub(crate) fn of<'b>(&'b self, members: &'b [u32]) -> Points<'b> {
        Points { rows: self.rows, members, origin: self.origin, grid: self.grid }
    }

    pub(crate) fn chunk<'b>(&self, members: &'b [u32], buffer: &'b mut Vec<f32>) -> Result<Chunk<'b>>
    where
        'a: 'b,
    {
        Chunk::of(self.rows, members, buffer)
    }

    /// The points in codes, [`CHUNK`] at a time.
    pub(crate) fn coded(&self) -> Result<Vec<Codes>> {
        let code = |members: &[u32]| {
            let mut codes = Codes::with_capacity(members.len(), self.dim());
            encode(&self.chunk(members, &mut vec![])?, members.len(), self.origin, &mut codes);
            Ok(codes)
        };
        match self.len() {
            n if n <= CHUNK => Ok(vec![code(self.members)?]),
            _ => self.members.par_chunks(CHUNK).map(code).collect(),
        }
    }

    /// Squared distance of each point to the centroid of its label, `[N]`.
    fn distances(&self, labels: &[u32], centroids: &Centroids) -> Result<Vec<f32>> {
        let of_chunk = |(members, labels): (&[u32], &[u32])| -> Result<Vec<f32>> {
            let mut buffer = vec![];
            let chunk = self.chunk(members, &mut buffer)?;
            // Points that were put into a cluster without a centroid have no distance yet.
            let distance = |(position, &label): (usize, &u32)| match centroids.is_active(label as usize) {
                true => squared_distance(chunk.row(position), centroids.get(label as usize)),
                false => 0.0,
            };
            Ok(labels.iter().enumerate().map(distance).collect())
        };
        let chunks: Result<Vec<Vec<f32>>> =
            self.members.par_chunks(CHUNK).zip(labels.par_chunks(CHUNK)).map(of_chunk).collect();
        Ok(chunks?.concat())
    }
}

fn encode(chunk: &Chunk, n: usize, origin: &[f32], codes: &mut Codes) {
    codes.clear();
    (0..n).for_each(|position| codes.push(chunk.row(position), origin));
}

/// Points with the cluster of each, kept from step to step.
pub(crate) struct Assignment<'a> {
    pub(crate) points: Points<'a>,
    codes: Option<Vec<Codes>>,
    /// The centroids of the last assignment, coded.
    coded: Coded,
    /// Cluster of each point, `[N]`.
    pub(crate) labels: Vec<u32>,
    /// Points of each cluster by the labels, `[K]`.
    pub(crate) counts: Vec<usize>,
    /// The labels that the sums are of, `[N]`.
    summed: Vec<u32>,
    pub(crate) sums: Sums,
}

impl<'a> Assignment<'a> {
    /// No point has a cluster yet. Codes are made at each assignment where none are given.
    pub(crate) fn none(points: Points<'a>, k: usize, codes: Option<Vec<Codes>>) -> Self {
        let (labels, summed) = (vec![NONE; points.len()], vec![NONE; points.len()]);
        let sums = Sums::zero(points.grid, k, points.dim());
        let coded = Coded::none(k, points.dim());
        Self { points, codes, coded, labels, counts: vec![0; k], summed, sums }
    }

    /// Assigns every point to its nearest centroid.
    pub(crate) fn assign(&mut self, centroids: &Centroids) -> Result<()> {
        self.coded.set(centroids, self.points.origin);
        // The first time, rows are added up as they are read: of a file they are read once.
        let is_first = self.summed.first() == Some(&NONE);
        let Self { points, codes, coded, labels, sums, .. } = self;
        let codes = |piece: usize| codes.as_ref().map(|codes| &codes[piece]);
        let label = |(piece, (members, labels)): (usize, (&[u32], &mut [u32])), sums: &mut Sums| {
            label_chunk(points, (codes(piece), members), labels, coded, |cluster, row| {
                if is_first {
                    sums.add(cluster, row);
                }
            })
        };
        if points.len() <= CHUNK {
            label((0, (points.members, labels)), sums)?;
        } else {
            let pieces = points.members.par_chunks(CHUNK).zip(labels.par_chunks_mut(CHUNK)).enumerate();
            sums_of(sums, pieces, label)?;
        }
        if is_first {
            self.summed.copy_from_slice(&self.labels);
        }
        self.counts.fill(0);
        self.labels.iter().for_each(|&label| self.counts[label as usize] += 1);
        Ok(())
    }

    /// Gives points to other clusters: pairs of a position and its new label.
    pub(crate) fn relabel(&mut self, moves: &[(u32, u32)]) {
        for &(at, to) in moves {
            let from = std::mem::replace(&mut self.labels[at as usize], to);
            self.counts[from as usize] -= 1;
            self.counts[to as usize] += 1;
        }
    }

    /// Squared distances of the points at `positions` to all of the centroids last assigned to, `[N, K]`, as codes tell
    /// them.
    pub(crate) fn approximate_distances(&self, positions: &[u32]) -> Result<Vec<f32>> {
        let k = self.counts.len();
        let of_chunk = |positions: &[u32]| -> Result<Vec<f32>> {
            let mut codes = Codes::with_capacity(positions.len(), self.points.dim());
            match &self.codes {
                Some(kept) => {
                    let place = |&at: &u32| (at as usize / CHUNK, at as usize % CHUNK);
                    positions.iter().map(place).for_each(|(piece, at)| codes.push_row(&kept[piece], at));
                }
                None => {
                    let member = |&at: &u32| self.points.members[at as usize];
                    let (members, mut buffer): (Vec<u32>, _) =
                        (positions.iter().map(member).collect(), vec![]);
                    encode(
                        &self.points.chunk(&members, &mut buffer)?,
                        members.len(),
                        self.points.origin,
                        &mut codes,
                    );
                }
            }
            let mut distances = vec![0f32; positions.len() * k];
            self.coded.panels.approximate(0, &codes, |row, panel, found| {
                let to = &mut distances[row * k..][..k];
                to[panel * 16..].iter_mut().zip(found).for_each(|(to, found)| *to = *found);
            });
            Ok(distances)
        };
        if positions.len() <= CHUNK {
            return of_chunk(positions);
        }
        Ok(positions.par_chunks(CHUNK).map(of_chunk).collect::<Result<Vec<_>>>()?.concat())
    }

    /// Brings the sums to what the labels say.
    pub(crate) fn add_up(&mut self) -> Result<()> {
        let Self { points, labels, summed, sums, .. } = self;
        let shift = |((members, labels), summed): ((&[u32], &[u32]), &mut [u32]), sums: &mut Sums| {
            let moved = |&i: &usize| labels[i] != summed[i];
            let positions: Vec<usize> = (0..labels.len()).filter(moved).collect();
            if positions.is_empty() {
                return Ok(());
            }
            let members: Vec<u32> = positions.iter().map(|&i| members[i]).collect();
            let mut buffer = vec![];
            let chunk = points.chunk(&members, &mut buffer)?;
            for (row, &i) in positions.iter().enumerate() {
                sums.shift(summed[i] as usize, labels[i] as usize, chunk.row(row));
                summed[i] = labels[i];
            }
            Ok(())
        };
        if points.len() <= CHUNK {
            return shift(((points.members, labels), summed), sums);
        }
        let pieces = points.members.par_chunks(CHUNK).zip(labels.par_chunks(CHUNK));
        sums_of(sums, pieces.zip(summed.par_chunks_mut(CHUNK)), shift)
    }

    /// The mean of each cluster's points. A cluster without points moves to the point that is farthest from its own
    /// centroid, the next one to the next; where every point lies on its centroid it becomes inactive.
    pub(crate) fn means(&mut self, centroids: &Centroids, spherical: bool) -> Result<Centroids> {
        self.add_up()?;
        let (k, dim) = (centroids.len(), self.points.dim());
        let mut means = Centroids::inactive(k, dim);
        let mut empty = vec![];
        for cluster in 0..k {
            match self.counts[cluster] {
                0 => empty.push(cluster),
                n => means.set(cluster, self.sums.mean(cluster, n, spherical)),
            }
        }
        if !empty.is_empty() {
            let distances = self.points.distances(&self.labels, centroids)?;
            for (&cluster, position) in empty.iter().zip(farthest(&distances, empty.len())) {
                let (member, mut buffer) = ([self.points.members[position as usize]], vec![]);
                let chunk = self.points.chunk(&member, &mut buffer)?;
                means.set(cluster, chunk.row(0).iter().copied());
            }
        }
        Ok(means)
    }
}

/// Adds to `sums` what `work` finds in each of the pieces, in parallel: exact sums have no order.
fn sums_of<P: Send>(
    sums: &mut Sums,
    pieces: impl ParallelIterator<Item = P>,
    work: impl Fn(P, &mut Sums) -> Result<()> + Sync,
) -> Result<()> {
    let zero = || sums.zeros();
    let found = pieces.try_fold(zero, |mut sums, piece| {
        work(piece, &mut sums)?;
        Ok::<_, crate::Error>(sums)
    });
    let found = found.try_reduce(zero, |a, b| Ok(a.merge(&b)))?;
    *sums = found.merge(sums);
    Ok(())
}

/// Labels the points of a chunk by their nearest centroids, and calls `found` with the label and the row of each.
fn label_chunk(
    points: &Points,
    (codes, members): (Option<&Codes>, &[u32]),
    labels: &mut [u32],
    to: &Coded,
    mut found: impl FnMut(usize, &[f32]),
) -> Result<()> {
    let (mut buffer, mut made) = (vec![], Codes::with_capacity(0, points.dim()));
    let chunk = points.chunk(members, &mut buffer)?;
    let codes = match codes {
        Some(codes) => codes,
        None => {
            encode(&chunk, members.len(), points.origin, &mut made);
            &made
        }
    };
    to.panels.nearest(
        0,
        codes,
        |i| chunk.row(i),
        |c| to.centroids.get(c),
        |i, cluster| {
            labels[i] = cluster as u32;
            found(cluster, chunk.row(i));
        },
    );
    Ok(())
}

/// The positions of the `n` largest distances, largest first, ties by position; those of 0 left out.
fn farthest(distances: &[f32], n: usize) -> Vec<u32> {
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
