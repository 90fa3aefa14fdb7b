use std::sync::atomic::{AtomicU64, Ordering};

use cluster_tree::{ClusterId, ClusterTree};

/// Times that the memory of each cluster was fetched for a request.
pub(super) struct Fetches {
    /// By level, one a cluster and one for the generic one.
    levels: Vec<Vec<AtomicU64>>,
}

impl Fetches {
    pub(super) fn new(tree: &ClusterTree) -> Self {
        let level = |level| (0..=tree.n_clusters(level)).map(|_| AtomicU64::new(0)).collect();
        Self { levels: (0..tree.n_levels()).map(level).collect() }
    }

    /// Counts clusters of the tree, or generic ones.
    pub(super) fn add(&self, ids: impl Iterator<Item = ClusterId>) {
        for id in ids {
            if let Some(count) = self.slot(id) {
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    pub(super) fn of(&self, id: ClusterId) -> u64 {
        self.slot(id).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// By level, `[N]` each; the generic ones not told.
    pub(super) fn all(&self) -> Vec<Vec<u64>> {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        self.levels.iter().map(|level| level[..level.len() - 1].iter().map(read).collect()).collect()
    }

    fn slot(&self, id: ClusterId) -> Option<&AtomicU64> {
        let level = self.levels.get(usize::from(id.level))?;
        level.get(if id.is_generic() { level.len() - 1 } else { id.index as usize })
    }
}
