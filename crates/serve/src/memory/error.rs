use std::path::PathBuf;
use std::sync::Arc;

use cluster_tree::ClusterPath;
use memory_bank::Step;

/// The result of every fallible function of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong while memory is found and fetched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A bank of a name that none has.
    #[error("no bank {name:?}: expected one of {loaded:?}")]
    UnknownBank {
        /// The name.
        name: String,
        /// The names of those that are loaded.
        loaded: Vec<String>,
    },
    /// A bank that does not belong to what is served.
    #[error("{place}: {what} is {found}, expected {expected}")]
    OtherBank {
        /// Where the bank is.
        place: String,
        /// What differs: the spec, or a hash by its name.
        what: String,
        /// As served.
        expected: String,
        /// The bank's.
        found: String,
    },
    /// A source of a bank that holds none.
    #[error("{place}: expected a bank {expected}, found none")]
    NoBank {
        /// Where it was looked for.
        place: String,
        /// What there should be.
        expected: String,
    },
    /// A path asked for that is blocked.
    #[error("path {path} is blocked by {prefix}: expected one that is not")]
    BlockedPath {
        /// The path.
        path: ClusterPath,
        /// The blocked prefix that it begins with.
        prefix: String,
    },
    /// A path or a prefix that is not one of the tree's.
    #[error("no cluster {found}: expected {expected}")]
    UnknownPath {
        /// What was asked for.
        found: String,
        /// What there is.
        expected: String,
    },
    /// Embeddings that are not what the tree takes.
    #[error("embedding {row}: expected {expected} numbers, found {found}")]
    Dimension {
        /// Its row.
        row: usize,
        /// Dimension of the tree.
        expected: usize,
        /// Its numbers.
        found: usize,
    },
    /// Options that do not fit what is served.
    #[error("{name}: expected {expected}, found {found}")]
    Setting {
        /// The option.
        name: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A name that a bank cannot have.
    #[error("name of a bank: expected 1 to 64 of a-z, A-Z, 0-9, '.', '_' and '-', found {found:?}")]
    BankName {
        /// The name.
        found: String,
    },
    /// The shards are at another step than was asked for.
    #[error("{place}: expected step {expected}, found {found}")]
    OtherStep {
        /// The shards.
        place: String,
        /// The step asked for.
        expected: Step,
        /// Theirs.
        found: Step,
    },
    /// A folder that cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// Work on another thread that did not come to its end.
    #[error("work beside the request did not finish: {0}")]
    Task(String),
    /// The error of a fetch that several waited for.
    #[error(transparent)]
    Shared(Arc<Error>),
    /// From the router or the embedder.
    #[error(transparent)]
    Retrieve(#[from] retrieve::Error),
    /// From the tree.
    #[error(transparent)]
    Tree(#[from] cluster_tree::Error),
    /// From the bank or its tiers.
    #[error(transparent)]
    Bank(#[from] memory_bank::Error),
    /// From packing a block.
    #[error(transparent)]
    Anchor(#[from] anchor::Error),
}
