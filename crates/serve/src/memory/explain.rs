use cluster_tree::{ClusterId, ClusterTree};
use eval::tree_page::{ClusterRow, TreePage};
use serde::Serialize;

use super::Bank;
use super::blocked::path_text;
use super::counts::Fetches;

/// What a cluster is about.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Explained {
    /// The cluster itself; of the root, the whole corpus.
    #[serde(flatten)]
    pub cluster: ClusterSummary,
    /// Texts nearest to its centroid, nearest first; none without the corpus, and of the root.
    pub examples: Vec<Example>,
    /// The clusters below it that hold documents, by index; none of a leaf.
    pub children: Vec<ClusterSummary>,
}

/// A cluster in short.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ClusterSummary {
    /// Its indices from level 0 down, as `"3/49"`; empty of the root.
    pub path: String,
    /// Levels of the path: 0 of the root, `n_levels` of a leaf.
    pub level: usize,
    /// Windows of documents that the tree was trained on there.
    pub n_windows: u64,
    /// Of all windows, 0 to 1.
    pub share: f64,
    /// Best first; none without the corpus.
    pub terms: Vec<TermWeight>,
    /// Steps that updated its block; none when the bank does not tell or the level has no memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub updates: Option<u64>,
    /// Times that its block was fetched for a request since the start.
    pub fetches: u64,
}

/// A word that is commoner in a cluster than beside it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TermWeight {
    /// The word.
    pub term: String,
    /// 1 over its rank: the corpus keeps the order alone.
    pub weight: f64,
}

/// A window of a document.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Example {
    /// Its label, or the number of its document.
    pub title: String,
    /// Its first words.
    pub text: String,
    /// Squared distance to the centroid.
    pub distance: f32,
}

/// What clusters are explained from.
pub(super) struct Explainer<'a> {
    pub(super) tree: &'a ClusterTree,
    pub(super) page: Option<&'a TreePage>,
    pub(super) bank: Option<&'a Bank>,
    pub(super) fetches: &'a Fetches,
}

impl Explainer<'_> {
    /// The whole tree, with the clusters of level 0.
    pub(super) fn root(&self) -> Explained {
        let n_windows = self.n_windows();
        let fetches =
            (0..self.tree.n_clusters(0) as u32).map(|index| self.fetches.of(ClusterId { level: 0, index }));
        let cluster =
            ClusterSummary { n_windows, share: 1.0, fetches: fetches.sum(), ..ClusterSummary::default() };
        Explained { cluster, examples: vec![], children: self.children(0, 0..self.tree.n_clusters(0)) }
    }

    /// A cluster of the tree.
    pub(super) fn cluster(&self, id: ClusterId) -> Explained {
        let below = usize::from(id.level) + 1;
        let children = match below < self.tree.n_levels() {
            true => {
                let (branching, index) = (self.tree.branching(below), id.index as usize);
                self.children(below, index * branching..(index + 1) * branching)
            }
            false => vec![],
        };
        let near = self.row(id).map(|row| row.near.as_slice()).unwrap_or_default();
        let example = |snippet: &eval::tree_page::Snippet| Example {
            title: snippet.label.clone().unwrap_or_else(|| format!("document {}", snippet.doc)),
            text: snippet.text.clone(),
            distance: snippet.distance,
        };
        Explained { cluster: self.summary(id), examples: near.iter().map(example).collect(), children }
    }

    fn children(&self, level: usize, indices: std::ops::Range<usize>) -> Vec<ClusterSummary> {
        let counts = &self.tree.counts(level)[indices.clone()];
        let used = indices.zip(counts).filter(|(_, count)| **count > 0);
        used.map(|(index, _)| self.summary(ClusterId { level: level as u8, index: index as u32 })).collect()
    }

    fn summary(&self, id: ClusterId) -> ClusterSummary {
        let n_windows = self.tree.counts(usize::from(id.level))[id.index as usize];
        ClusterSummary {
            path: path_text(self.tree, id),
            level: usize::from(id.level) + 1,
            n_windows,
            share: n_windows as f64 / self.n_windows() as f64,
            terms: self.terms(id),
            updates: self.bank.and_then(|bank| bank.updates(id)),
            fetches: self.fetches.of(id),
        }
    }

    fn terms(&self, id: ClusterId) -> Vec<TermWeight> {
        let words = self.page.map(|page| page.words.as_slice()).unwrap_or_default();
        let terms = self.row(id).map(|row| row.t.as_slice()).unwrap_or_default();
        let word = |(rank, &term): (usize, &u32)| {
            let term = words.get(term as usize)?.clone();
            Some(TermWeight { term, weight: 1.0 / (rank + 1) as f64 })
        };
        terms.iter().enumerate().filter_map(word).collect()
    }

    fn row(&self, id: ClusterId) -> Option<&ClusterRow> {
        let level = self.page?.clusters.get(usize::from(id.level))?;
        level.binary_search_by_key(&id.index, |row| row.i).ok().map(|place| &level[place])
    }

    /// A tree has points.
    fn n_windows(&self) -> u64 {
        self.tree.counts(0).iter().sum()
    }
}
