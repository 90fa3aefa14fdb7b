use cluster_tree::ClusterPath;

/// What can go wrong while retrieving.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tree was built on embeddings of another width.
    #[error("embedder of {embedder} dimensions for a cluster tree of {tree}")]
    Dimension {
        /// Dimensions of the embedder.
        embedder: usize,
        /// Dimensions of the tree's centroids.
        tree: usize,
    },
    /// A text to route is empty or blank.
    #[error("text {index} is empty, expected something to route by")]
    EmptyText {
        /// Index of the text in the call.
        index: usize,
    },
    /// A text that the oracle was told nothing about.
    #[error("expected a text whose path is known, found {text:?}")]
    UnknownText {
        /// Its beginning.
        text: String,
    },
    /// A path that is not one of the tree's.
    #[error("expected a path of the tree ({expected}), found {found}")]
    OtherPath {
        /// The tree's path to the same leaf, or what it has instead.
        expected: String,
        /// The path.
        found: ClusterPath,
    },
    /// A setting of a router that it cannot have.
    #[error("{name}: expected {expected}, found {found}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        found: usize,
    },
    /// Embeddings that are not one row a leaf given.
    #[error("embeddings of {rows} rows: expected {expected} numbers, found {found}")]
    Rows {
        /// Leaves given, one a row.
        rows: usize,
        /// Rows × dimension.
        expected: usize,
        /// Numbers given.
        found: usize,
    },
    /// A row that is not finite, or so long that distances to it overflow.
    #[error("embedding {row}: expected a squared norm of at most {max:e}, found {found:e}")]
    Norm {
        /// The row.
        row: usize,
        /// The largest squared norm there may be.
        max: f32,
        /// Its squared norm.
        found: f32,
    },
    /// A row that belongs to no leaf that the tree holds points in.
    #[error("embedding {row}: expected a leaf that holds points, of {n_leaves}, found {leaf}")]
    RowLeaf {
        /// The row.
        row: usize,
        /// Its leaf.
        leaf: u32,
        /// Leaves of the tree, the empty ones too.
        n_leaves: usize,
    },
    /// Prototypes of nothing.
    #[error("prototypes: expected at least one embedding that is not zero, found none")]
    NoRows,
    /// From the k-means of a leaf's prototypes.
    #[error("prototypes of leaf {leaf}: {problem}")]
    KMeans {
        /// The leaf.
        leaf: u32,
        /// What its k-means says.
        problem: String,
    },
    /// A router that named no leaf.
    #[error("text {index}: expected a leaf, found none")]
    NoRoute {
        /// Index of the text in the call.
        index: usize,
    },
    /// From the embedder.
    #[error(transparent)]
    Embed(#[from] embed::Error),
    /// From the tree.
    #[error(transparent)]
    Tree(#[from] cluster_tree::Error),
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;
