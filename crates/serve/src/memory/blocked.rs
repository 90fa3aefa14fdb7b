use std::collections::BTreeSet;

use cluster_tree::{ClusterId, ClusterPath, ClusterTree};

use super::{Error, Result};

/// Clusters whose memory is not to be used, each with all below it; by default none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Blocked {
    clusters: BTreeSet<ClusterId>,
}

impl Blocked {
    /// Those that prefixes of paths such as `"3"` or `"3/49"` name.
    ///
    /// # Errors
    /// On a prefix that is not one of the tree's.
    pub fn new(tree: &ClusterTree, prefixes: &[impl AsRef<str>]) -> Result<Self> {
        let cluster = |prefix: &_| cluster(tree, AsRef::<str>::as_ref(prefix));
        Ok(Self { clusters: prefixes.iter().map(cluster).collect::<Result<_>>()? })
    }

    /// Whether nothing is blocked.
    pub fn is_empty(&self) -> bool {
        self.clusters.is_empty()
    }

    /// The coarsest blocked cluster of a path, as a prefix of it; none of a path that may be used, which the
    /// generic one always is.
    pub fn prefix_of(&self, path: &ClusterPath) -> Option<String> {
        if self.clusters.is_empty() || path.is_generic() {
            return None;
        }
        let level = path.ids().find(|id| self.clusters.contains(id))?.level;
        Some(prefix_text(path, usize::from(level)))
    }

    /// The blocked prefixes, coarse to fine.
    pub fn prefixes(&self, tree: &ClusterTree) -> Vec<String> {
        self.clusters.iter().map(|&id| path_text(tree, id)).collect()
    }
}

/// The clusters of a path down to a level, as text.
fn prefix_text(path: &ClusterPath, level: usize) -> String {
    let indices: Vec<String> = (0..=level).map(|level| path.index(level).to_string()).collect();
    indices.join("/")
}

/// The clusters from level 0 down to this one, as `"3/49"`; the id itself if it is not the tree's.
pub(super) fn path_text(tree: &ClusterTree, id: ClusterId) -> String {
    let (mut text, mut cluster) = (id.index.to_string(), id);
    while let Ok(Some(parent)) = tree.parent(cluster) {
        text = format!("{}/{text}", parent.index);
        cluster = parent;
    }
    text
}

/// The cluster that a prefix of a path, such as `"3/49"`, names.
pub(super) fn cluster(tree: &ClusterTree, prefix: &str) -> Result<ClusterId> {
    let n_levels = tree.n_levels();
    let unknown = |expected: String| Error::UnknownPath { found: format!("{prefix:?}"), expected };
    let indices: Option<Vec<u32>> = prefix.split('/').map(|part| part.parse().ok()).collect();
    let indices = indices
        .filter(|indices| indices.len() <= n_levels)
        .ok_or_else(|| unknown(format!("1 to {n_levels} indices such as \"3\" or \"3/49\"")))?;
    of_indices(tree, &indices)
}

/// The cluster of these indices, one a level from the coarsest on; at least one.
pub(super) fn of_indices(tree: &ClusterTree, indices: &[u32]) -> Result<ClusterId> {
    let text = || indices.iter().map(u32::to_string).collect::<Vec<_>>().join("/");
    let unknown = |expected: String| Error::UnknownPath { found: text(), expected };
    let n_levels = tree.n_levels();
    let Some((&index, level)) =
        indices.last().zip(indices.len().checked_sub(1)).filter(|(_, l)| *l < n_levels)
    else {
        return Err(unknown(format!("1 to {n_levels} indices")));
    };
    let id = ClusterId { level: level as u8, index };
    if index as usize >= tree.n_clusters(level) {
        let last = tree.n_clusters(level) - 1;
        return Err(unknown(format!("an index of 0 to {last} at level {}", level + 1)));
    }
    let path = path_text(tree, id);
    if path != text() {
        return Err(unknown(path));
    }
    Ok(id)
}
