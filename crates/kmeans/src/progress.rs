use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// How far a build is, in points assigned once.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Progress {
    /// Assignments done, or no longer needed.
    pub done: u64,
    /// Assignments of the whole build, if no node settles early.
    pub total: u64,
    /// Nodes that are trained.
    pub nodes: u64,
}

/// Counts the work of all threads.
pub(crate) struct Meter<'a> {
    done: AtomicU64,
    nodes: AtomicU64,
    total: u64,
    /// Assignments of one point in a node: every step and the last one.
    per_node: u64,
    report: &'a (dyn Fn(Progress) + Sync),
}

impl<'a> Meter<'a> {
    pub(crate) fn new(
        n_points: usize,
        n_levels: usize,
        iterations: usize,
        report: &'a (dyn Fn(Progress) + Sync),
    ) -> Self {
        let per_node = iterations as u64 + 1;
        let total = n_points as u64 * n_levels as u64 * per_node;
        Self { done: AtomicU64::new(0), nodes: AtomicU64::new(0), total, per_node, report }
    }

    /// A step over `n_points` points is done.
    pub(crate) fn step(&self, n_points: usize) {
        self.done.fetch_add(n_points as u64, Relaxed);
        self.tell();
    }

    /// A node of `n_points` is done after `n_steps` steps.
    pub(crate) fn node(&self, n_points: usize, n_steps: usize) {
        self.done.fetch_add(n_points as u64 * (self.per_node - n_steps as u64), Relaxed);
        self.nodes.fetch_add(1, Relaxed);
        self.tell();
    }

    /// A node of `n_points` was done before.
    pub(crate) fn skip(&self, n_points: usize) {
        self.node(n_points, 0);
    }

    pub(crate) fn finish(&self) {
        debug_assert_eq!(self.done.load(Relaxed), self.total, "every node counts its points once");
        self.tell();
    }

    fn tell(&self) {
        let (done, nodes) = (self.done.load(Relaxed), self.nodes.load(Relaxed));
        (self.report)(Progress { done, total: self.total, nodes });
    }
}
