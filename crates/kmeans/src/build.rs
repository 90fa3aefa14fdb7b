use std::sync::Mutex;

use cluster_tree::{ClusterTree, Level};
use rayon::prelude::*;

use crate::assignment::Points;
use crate::journal::Journal;
use crate::node::{NodeId, Trained, mean, train};
use crate::options::Options;
use crate::progress::{Meter, Progress};
use crate::rows::{Matrix, Rows, check};
use crate::sums::Grid;
use crate::{Result, options};

/// Points that the origin of the root's codes is the mean of, at most.
const ORIGIN_POINTS: usize = 256;

/// What goes with a build beyond points and options.
pub struct Job<'a> {
    /// The order that points are taken in, each once: the same points with the same order of them give the same tree
    /// however they are stored. Sorted by document, say. None is that of the rows.
    pub order: Option<&'a [u32]>,
    /// Where finished nodes are noted, so that a killed build goes on, and for what points they are good.
    pub journal: Option<JournalFile<'a>>,
    /// Called now and then, from any thread.
    pub progress: &'a (dyn Fn(Progress) + Sync),
}

/// The file that a build notes its nodes in.
#[derive(Clone, Copy)]
pub struct JournalFile<'a> {
    /// Made when it is not there; the caller removes it once the tree is safe.
    pub path: &'a std::path::Path,
    /// Says what the points are: nodes of a file with another identity or other options are not used.
    pub identity: &'a str,
}

impl Default for Job<'_> {
    fn default() -> Self {
        Self { order: None, journal: None, progress: &|_| () }
    }
}

/// What a build leaves.
#[derive(Clone, Debug)]
pub struct Built {
    /// The tree; its counts are those of `leaves`.
    pub tree: ClusterTree,
    /// Leaf of each row, `[N]`. It is the nearest at each level, but for points that had to leave a cluster above
    /// the cap.
    pub leaves: Vec<u32>,
}

/// Trains a cluster tree on `rows`, top-down. Every node is a k-means over the points that reach it (paper, section
/// 2), balanced step by step; then each of its points goes on to the nearest centroid, or, where that holds its share
/// already, to the nearest with room. A centroid is the mean of the points that went on to it.
///
/// The tree's counts are the points that reached each cluster, so that those of the children of a node add up to its
/// own; a cluster that none reached has count 0 and a centroid of zeros. The result has the same bits on any number
/// of threads and processors, and whether the points are in memory or read piece by piece.
///
/// Beyond the points and the tree, a build in memory takes D + 40 bytes a point; one of a file keeps to
/// `options.host_bytes` and 24 bytes a point. Both take 4·K + 24 bytes more for each point of one cluster that is
/// above the cap, and one that goes on from a journal 4 bytes a point and level.
///
/// # Errors
/// On an option out of range, on no points or more than 2³² − 2, on a point that is not finite or all zeros (the
/// error names the row), on points whose norms are too far apart, on an order that does not hold each row once, and when reading or the journal fails.
pub fn build(rows: &dyn Rows, options: &Options, job: &Job) -> Result<Built> {
    options.check()?;
    let largest = check(rows)?;
    let order = options::order(rows.len(), job.order)?;
    let journal = job.journal.map(|file| Journal::open(file, rows, &order, options)).transpose()?;
    let n_levels = options.branching.len();
    let mut n_clusters = 1;
    let levels = options.branching.iter().map(|&branching| {
        n_clusters *= branching;
        Level { branching, centroids: vec![0.0; n_clusters * rows.dim()], counts: vec![0; n_clusters] }
    });
    let mut builder = Builder {
        options,
        largest,
        levels: levels.collect(),
        leaves: vec![0; rows.len()],
        journal: journal.map(Mutex::new),
        meter: Meter::new(rows.len(), n_levels, options.iterations, job.progress),
    };
    builder.grow(rows, order, NodeId { level: 0, index: 0 })?;
    builder.meter.finish();
    let tree = ClusterTree::new(rows.dim(), builder.levels)?;
    Ok(Built { tree, leaves: builder.leaves })
}

struct Builder<'a> {
    options: &'a Options,
    /// The largest |value| of all points.
    largest: f32,
    /// The tree so far.
    levels: Vec<Level>,
    leaves: Vec<u32>,
    journal: Option<Mutex<Journal>>,
    meter: Meter<'a>,
}

/// The points of one node: a part of an order.
struct Part {
    id: NodeId,
    start: usize,
    len: usize,
}

impl Builder<'_> {
    /// Trains a node and all below it on `members` of `rows`.
    fn grow(&mut self, rows: &dyn Rows, members: Vec<u32>, id: NodeId) -> Result<()> {
        if members.is_empty() {
            return Ok(());
        }
        if rows.in_memory().is_some() {
            return self.grow_in_memory(rows, members, id, |member| member);
        }
        if members.len() <= self.options.loadable(rows.dim()) {
            let mut values = vec![0f32; members.len() * rows.dim()];
            let pieces = members.par_chunks(1024).zip(values.par_chunks_mut(1024 * rows.dim()));
            pieces.try_for_each(|(members, to)| rows.read(members, to))?;
            let local = (0..members.len() as u32).collect();
            let matrix = Matrix::new(&values, rows.dim())?;
            return self.grow_in_memory(&matrix, local, id, |position| members[position as usize]);
        }
        // Too large to load: its children may not be.
        let k = self.options.branching[id.level];
        let trained = self.train(rows, &members, id)?;
        self.place(id, &trained);
        let last = id.level + 1 == self.levels.len();
        let mut children = vec![vec![]; k];
        for (&member, &label) in members.iter().zip(&trained.labels) {
            match last {
                true => self.leaves[member as usize] = (id.index * k) as u32 + label,
                false => children[label as usize].push(member),
            }
        }
        drop((members, trained));
        for (child, members) in children.into_iter().enumerate() {
            self.grow(rows, members, NodeId { level: id.level + 1, index: id.index * k + child })?;
        }
        Ok(())
    }

    /// The same, level by level, of points in memory; `row` tells which row of the build a member is.
    fn grow_in_memory(
        &mut self,
        rows: &dyn Rows,
        mut order: Vec<u32>,
        root: NodeId,
        row: impl Fn(u32) -> u32,
    ) -> Result<()> {
        let mut parts = vec![Part { id: root, start: 0, len: order.len() }];
        for level in root.level..self.levels.len() {
            let k = self.options.branching[level];
            let train = |part: &Part| self.train(rows, &order[part.start..][..part.len], part.id);
            let trained: Vec<Result<Trained>> = parts.par_iter().map(train).collect();
            let mut children = vec![];
            let mut next = vec![0; order.len()];
            for (part, trained) in parts.iter().zip(trained) {
                let trained = trained?;
                self.place(part.id, &trained);
                let mut start = part.start;
                let starts: Vec<usize> =
                    trained.counts.iter().map(|&n| (start, start += n as usize).0).collect();
                let mut at = starts.clone();
                for (&member, &label) in order[part.start..][..part.len].iter().zip(&trained.labels) {
                    let at = &mut at[label as usize];
                    next[*at] = member;
                    *at += 1;
                }
                for (child, (&start, &n)) in starts.iter().zip(&trained.counts).enumerate() {
                    let id = NodeId { level: level + 1, index: part.id.index * k + child };
                    children.push(Part { id, start, len: n as usize });
                }
            }
            order = next;
            parts = children.into_iter().filter(|part| part.len > 0).collect();
        }
        // The parts are leaves now: ids of a level below the last.
        for part in parts {
            for &member in &order[part.start..][..part.len] {
                self.leaves[row(member) as usize] = part.id.index as u32;
            }
        }
        Ok(())
    }

    /// Trains one node, or takes it from the journal.
    fn train(&self, rows: &dyn Rows, members: &[u32], id: NodeId) -> Result<Trained> {
        let k = self.options.branching[id.level];
        if let Some(journal) = &self.journal {
            let found = journal.lock().expect("no thread panicked").take(id);
            if let Some(trained) = found {
                self.meter.skip(members.len());
                return Ok(trained);
            }
        }
        let origin = self.origin(rows, members, id)?;
        let grid = Grid::new(members.len(), self.largest);
        let points = Points { rows, members, origin: &origin, grid };
        let trained = train(points, k, self.options, id, &self.meter)?;
        if let Some(journal) = &self.journal {
            journal.lock().expect("no thread panicked").append(id, &trained)?;
        }
        Ok(trained)
    }

    /// A point near those of a node: its centroid, or for the root the mean of some points.
    fn origin(&self, rows: &dyn Rows, members: &[u32], id: NodeId) -> Result<Vec<f32>> {
        let dim = rows.dim();
        if let Some(above) = id.level.checked_sub(1) {
            return Ok(self.levels[above].centroids[id.index * dim..][..dim].to_vec());
        }
        let every = members.len().div_ceil(ORIGIN_POINTS);
        let some: Vec<u32> = members.iter().copied().step_by(every).collect();
        let mut values = vec![0f32; some.len() * dim];
        rows.read(&some, &mut values)?;
        Ok(mean(&values, dim))
    }

    fn place(&mut self, id: NodeId, trained: &Trained) {
        let Level { centroids, counts, .. } = &mut self.levels[id.level];
        let (k, n_values) = (trained.counts.len(), trained.centroids.len());
        centroids[id.index * n_values..][..n_values].copy_from_slice(&trained.centroids);
        counts[id.index * k..][..k].copy_from_slice(&trained.counts);
    }
}
