use std::path::PathBuf;

/// What can go wrong while evaluating.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A line of a question file that is not a question.
    #[error("{}: line {line}: {problem}", path.display())]
    Question {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A question file that cannot be read or holds nothing.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Random memory needs a second leaf.
    #[error("random memory needs at least 2 leaves that hold documents, found {found}")]
    OneLeaf {
        /// Leaves there are.
        found: usize,
    },
    /// One path a question is needed.
    #[error("{questions} questions were given {paths} paths")]
    Paths {
        /// Questions asked.
        questions: usize,
        /// Paths given.
        paths: usize,
    },
    /// From generation and scoring.
    #[error(transparent)]
    Generate(#[from] generate::Error),
    /// From the anchor.
    #[error(transparent)]
    Anchor(#[from] anchor::Error),
    /// From the corpus.
    #[error(transparent)]
    Corpus(#[from] corpus::Error),
    /// From the cluster tree.
    #[error(transparent)]
    Tree(#[from] cluster_tree::Error),
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;
