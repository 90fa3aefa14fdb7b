use std::path::PathBuf;

use crate::{ClusterId, ClusterPath};

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can be wrong with a tree, a path, an embedding or a tree file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tree has 1 to 255 levels.
    #[error("a cluster tree has 1 to 255 levels, found {found}")]
    LevelCount {
        /// Levels given.
        found: usize,
    },
    /// Too few or too many dimensions.
    #[error("a cluster tree has 1 to {max} dimensions, found {found}")]
    TreeDimension {
        /// Dimension given.
        found: usize,
        /// The most there may be.
        max: usize,
    },
    /// The branchings give no clusters, or more than an index can name.
    #[error("level {level} with branching {branching} has {found} clusters, expected 1 to {max}")]
    ClusterCount {
        /// Level counted.
        level: usize,
        /// Children of each cluster of the level above.
        branching: usize,
        /// Clusters of the level: the product of the branchings so far.
        found: u128,
        /// Largest number of clusters of a level.
        max: u32,
    },
    /// A level's array has the wrong length.
    #[error("level {level}: {array} has {found} values, expected {expected}")]
    LevelLength {
        /// Level of the array.
        level: usize,
        /// `centroids` or `counts`.
        array: &'static str,
        /// Length that dimension and branching ask for.
        expected: usize,
        /// Length found.
        found: usize,
    },
    /// A centroid holds NaN or infinity, or has a squared norm above 1e30.
    #[error("centroid {index} of level {level} has squared norm {norm_squared}, expected at most 1e30")]
    NonFiniteCentroid {
        /// Level of the centroid.
        level: usize,
        /// Index within the level.
        index: usize,
        /// The squared norm found.
        norm_squared: f32,
    },
    /// A cluster has points and its children none, or the other way round.
    #[error("cluster {index} of level {level} has {count} points but its children have {children}")]
    UnevenCounts {
        /// Level of the parent.
        level: usize,
        /// Index of the parent.
        index: usize,
        /// Points of the parent.
        count: u64,
        /// Points of its children together.
        children: u128,
    },
    /// No cluster of the tree has a point, so nothing can be descended into.
    #[error("every cluster of the tree is empty, expected at least one point")]
    NoPoints,
    /// The tree has no such cluster.
    #[error("no cluster {id} in the tree: level {} has {n_clusters} clusters", id.level)]
    UnknownCluster {
        /// The id asked for.
        id: ClusterId,
        /// Clusters of that level, 0 for a level that the tree does not have.
        n_clusters: usize,
    },
    /// An embedding of another dimension.
    #[error("embedding has {found} dimensions, the tree has {expected}")]
    Dimension {
        /// Dimension of the tree.
        expected: usize,
        /// Dimension of the embedding.
        found: usize,
    },
    /// An embedding holds NaN or infinity, or has a squared norm above 1e30.
    #[error("embedding has squared norm {norm_squared}, expected at most 1e30")]
    NonFiniteEmbedding {
        /// The squared norm found.
        norm_squared: f32,
    },
    /// A beam keeps at least one cluster.
    #[error("beam width is 0, expected at least 1")]
    ZeroWidth,
    /// A path is generic at every level or at none.
    #[error("path {path:?} is generic at some levels only, expected all or none")]
    MixedPath {
        /// The path's indices.
        path: Vec<u32>,
    },
    /// Text that is not a path.
    #[error("{text:?} is not a cluster path: expected {n_levels} indices such as \"3/49\", or \"generic\"")]
    PathText {
        /// The text.
        text: String,
        /// Levels that the path should have.
        n_levels: usize,
    },
    /// A leaf that cannot be divided.
    #[error("leaf {path} cannot be split: expected at least 2 points, found {count}")]
    TooFewToSplit {
        /// The leaf.
        path: ClusterPath,
        /// Its points.
        count: u64,
    },
    /// A half of a split without points.
    #[error("the halves of leaf {path} have {points:?} points, expected at least 1 each")]
    EmptyHalf {
        /// The leaf.
        path: ClusterPath,
        /// Points of the halves.
        points: [u64; 2],
    },
    /// A split needs an empty slot beside the leaf.
    #[error("leaf {path}: none of the {branching} slots under its parent is empty, merge two of them first")]
    NoEmptySlot {
        /// The leaf.
        path: ClusterPath,
        /// Slots under its parent.
        branching: usize,
    },
    /// Only leaves under one parent can be merged.
    #[error("leaves {} and {} are not siblings, expected two under one parent", paths[0], paths[1])]
    NotSiblings {
        /// The leaves.
        paths: Box<[ClusterPath; 2]>,
    },
    /// A leaf without points, where some are needed.
    #[error("leaf {path} is empty, expected points in it")]
    EmptyLeaf {
        /// The leaf.
        path: ClusterPath,
    },
    /// Points to add that are not one number a leaf.
    #[error("points added to {found} leaves, the tree has {expected}")]
    AddedLength {
        /// Leaves of the tree.
        expected: usize,
        /// Numbers given.
        found: usize,
    },
    /// Reading or writing a file failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that is not safetensors, or is cut short.
    #[error("{}: not a complete safetensors file: {source}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: safetensors::SafeTensorError,
    },
    /// A metadata value of a tree file is missing or wrong.
    #[error("{}: metadata {key:?} is {found}, expected {expected}", path.display())]
    Metadata {
        /// The file.
        path: PathBuf,
        /// The metadata key.
        key: &'static str,
        /// What it should hold.
        expected: String,
        /// What it holds.
        found: String,
    },
    /// A tensor of a tree file is missing, or of another type or shape.
    #[error("{}: tensor {tensor:?} is {found}, expected {expected}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Type and shape expected.
        expected: String,
        /// Type and shape found, or `missing`.
        found: String,
    },
    /// A file whose arrays do not make a tree.
    #[error("{}: {source}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with the arrays.
        source: Box<Error>,
    },
}
