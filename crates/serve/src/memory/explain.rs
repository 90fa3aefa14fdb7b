use serde::Serialize;

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
