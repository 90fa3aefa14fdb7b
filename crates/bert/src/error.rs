use std::path::{Path, PathBuf};

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can be wrong with a model's folder, or with fetching one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file, a tensor or the tokenizer.
    #[error(transparent)]
    File(#[from] embed::Error),
    /// A file that is not JSON, or lacks a key.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// A key whose value is not supported.
    #[error("{}: {key} is {found}, expected {expected}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is supported.
        expected: String,
        /// The value.
        found: String,
    },
    /// Neither a folder nor the form of a hub id.
    #[error("{}: no folder here, and no hub id, expected a folder or owner/name", path.display())]
    Name {
        /// What was given.
        path: PathBuf,
    },
    /// A hub id whose files could not be fetched.
    #[error("{id}: no folder here, and the Hugging Face hub did not give it: {reason}")]
    Hub {
        /// The hub id.
        id: String,
        /// What went wrong.
        reason: String,
    },
}

impl Error {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| embed::Error::Io { path: path.to_owned(), source }.into()
    }

    pub(crate) fn key(
        path: &Path,
        key: &'static str,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> Self {
        Self::Key { path: path.to_owned(), key, expected: expected.into(), found: found.to_string() }
    }
}
