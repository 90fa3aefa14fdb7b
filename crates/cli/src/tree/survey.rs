//! Every window on its path: sizes, distances, and the windows at the middle and at the edge of each
//! cluster.

use anyhow::Result;
use cluster_tree::{ClusterId, ClusterTree};
use corpus::TokenStore;
use eval::Agreement;
use eval::tree_page::LevelRow;

use super::Opened;

/// Texts shown from the middle and from the edge of a cluster.
const N_NEAREST: usize = 3;
const N_FARTHEST: usize = 2;

/// A window, and its squared distance to a centroid.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Place {
    pub(super) window: u32,
    pub(super) document: u32,
    pub(super) distance: f32,
}

/// What the windows of a cluster say of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Members {
    pub(super) n_windows: u64,
    distance_sum: f64,
    /// Of different documents, nearest first.
    pub(super) nearest: Vec<Place>,
    /// Of different documents that are not among the nearest, farthest first.
    pub(super) farthest: Vec<Place>,
}

/// The windows of a corpus in its tree.
pub(super) struct Survey<'a> {
    /// Leaf of each window.
    pub(super) leaves: Vec<u32>,
    /// By level and index.
    pub(super) clusters: Vec<Vec<Members>>,
    /// Those of training windows, by cluster.
    pub(super) labels: Agreement<'a>,
}

impl Members {
    fn add(&mut self, place: Place) {
        self.n_windows += 1;
        self.distance_sum += f64::from(place.distance);
        insert(&mut self.nearest, N_NEAREST, place, |a, b| a.distance < b.distance);
        // With room for those that turn out to be among the nearest.
        insert(&mut self.farthest, N_NEAREST + N_FARTHEST, place, |a, b| a.distance > b.distance);
    }

    fn finish(&mut self) {
        let near = &self.nearest;
        self.farthest.retain(|far| near.iter().all(|near| near.document != far.document));
        self.farthest.truncate(N_FARTHEST);
    }

    /// Mean squared distance to the centroid; none of no windows.
    pub(super) fn distance(&self) -> Option<f64> {
        (self.n_windows > 0).then(|| self.distance_sum / self.n_windows as f64)
    }
}

/// Puts `place` into a list of at most `n`, best first, that holds a document once.
fn insert(list: &mut Vec<Place>, n: usize, place: Place, better: impl Fn(&Place, &Place) -> bool) {
    match list.iter().position(|other| other.document == place.document) {
        Some(same) if better(&place, &list[same]) => _ = list.remove(same),
        Some(_) => return,
        None => {}
    }
    let at = list.iter().position(|other| better(&place, other)).unwrap_or(list.len());
    if at < n {
        list.insert(at, place);
        list.truncate(n);
    }
}

impl<'a> Survey<'a> {
    pub(super) fn new(opened: &'a Opened) -> Result<Self> {
        let (tree, store) = (&opened.tree, &opened.windows.store);
        let leaves = opened.leaves()?;
        let mut clusters: Vec<Vec<Members>> =
            (0..tree.n_levels()).map(|level| vec![Members::default(); tree.n_clusters(level)]).collect();
        for (window, &leaf) in leaves.iter().enumerate() {
            let document = store.window(window)?.document;
            for id in tree.path_of_leaf(leaf)?.ids() {
                let distance = nearest::squared_distance(opened.row(window), tree.centroid(id)?);
                let place = Place { window: window as u32, document, distance };
                clusters[usize::from(id.level)][id.index as usize].add(place);
            }
        }
        clusters.iter_mut().flatten().for_each(Members::finish);
        let labels = agreement(store, &leaves, &opened.branching())?;
        Ok(Self { leaves, clusters, labels })
    }

    /// Clusters with windows, by level.
    pub(super) fn n_used(&self) -> Vec<usize> {
        let used = |level: &Vec<Members>| level.iter().filter(|members| members.n_windows > 0).count();
        self.clusters.iter().map(used).collect()
    }

    /// The sizes of a level.
    pub(super) fn level(&self, opened: &Opened, level: usize) -> Result<LevelRow> {
        let mut row = sizes(&opened.tree, level)?;
        row.cap = opened.cap(level);
        let windows: u64 = self.clusters[level].iter().map(|members| members.n_windows).sum();
        let sum: f64 = self.clusters[level].iter().map(|members| members.distance_sum).sum();
        row.distance = (windows > 0).then(|| sum / windows as f64);
        Ok(row)
    }
}

/// The sizes of a level by the tree's own counts.
fn sizes(tree: &ClusterTree, level: usize) -> Result<LevelRow> {
    let mut counts: Vec<u64> = tree.counts(level).iter().copied().filter(|&count| count > 0).collect();
    counts.sort_unstable();
    let n = counts.len() as f64;
    let mean = counts.iter().sum::<u64>() as f64 / n;
    let variance = counts.iter().map(|&count| (count as f64 - mean).powi(2)).sum::<f64>() / n;
    let share = |index| tree.share(ClusterId { level: level as u8, index: index as u32 });
    let shares = (0..tree.n_clusters(level)).map(share).collect::<cluster_tree::Result<Vec<f64>>>()?;
    // A tree has points, so that a level has a cluster that is not empty.
    Ok(LevelRow {
        clusters: tree.n_clusters(level),
        non_empty: counts.len(),
        min: counts[0],
        median: counts[(counts.len() - 1) / 2],
        max: counts[counts.len() - 1],
        variation: variance.sqrt() / mean,
        largest_share: shares.into_iter().fold(0.0, f64::max),
        ..LevelRow::default()
    })
}

/// The labels of training windows by cluster, as `eval` counts them.
pub(super) fn agreement<'a>(
    store: &'a TokenStore,
    leaves: &[u32],
    branching: &[usize],
) -> Result<Agreement<'a>> {
    let mut agreement = Agreement::new(branching);
    for (window, &leaf) in leaves.iter().enumerate() {
        let document = store.window(window)?.document;
        if store.is_validation(document)? {
            continue;
        }
        if let Some(label) = store.label(document)? {
            agreement.add(leaf, label);
        }
    }
    Ok(agreement)
}

#[cfg(test)]
mod tests {
    use cluster_tree::Level;

    use super::*;

    fn members(places: &[(u32, f32)]) -> Members {
        let mut members = Members::default();
        for (window, &(document, distance)) in places.iter().enumerate() {
            members.add(Place { window: window as u32, document, distance });
        }
        members.finish();
        members
    }

    #[test]
    fn a_document_is_shown_once_with_its_best_window() {
        let members = members(&[(0, 0.5), (1, 0.4), (0, 0.1), (2, 0.9), (1, 0.7), (3, 0.3), (4, 0.6)]);
        let ids =
            |places: &[Place]| places.iter().map(|place| (place.document, place.window)).collect::<Vec<_>>();
        assert_eq!(ids(&members.nearest), [(0, 2), (3, 5), (1, 1)]);
        // Document 1 is far too, but it is shown as near.
        assert_eq!(ids(&members.farthest), [(2, 3), (4, 6)]);
        assert!((members.distance().unwrap() - 3.5 / 7.0).abs() < 1e-6);
        assert_eq!(Members::default().distance(), None);
    }

    #[test]
    fn sizes_are_of_the_clusters_that_hold_points() {
        let top = Level { branching: 2, centroids: vec![0.0, 1.0], counts: vec![12, 8] };
        let centroids = vec![0.0; 6];
        let leaves = Level { branching: 3, centroids, counts: vec![2, 4, 6, 8, 0, 0] };
        let tree = ClusterTree::new(1, vec![top, leaves]).unwrap();
        let row = sizes(&tree, 1).unwrap();
        assert_eq!((row.clusters, row.non_empty, row.min, row.median, row.max), (6, 4, 2, 4, 8));
        assert_eq!(row.largest_share, 1.0);
        // Sizes 2, 4, 6 and 8: mean 5, variance 5.
        assert!((row.variation - 5f64.sqrt() / 5.0).abs() < 1e-12);
    }
}
