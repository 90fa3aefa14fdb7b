use std::path::{Path, PathBuf};

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can be wrong with an embedder's options, its files, or a text.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An option outside its range.
    #[error("{option} is {found}, expected {expected}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// The range.
        expected: &'static str,
        /// The value given.
        found: String,
    },
    /// Document frequencies were to be fitted on no text.
    #[error("no texts to fit document frequencies on, expected at least 1")]
    NoTexts,
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
    /// A metadata value of an embedder's file is missing or wrong.
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
    /// A tensor that is missing, or of another type or shape.
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
    /// A value of a tensor that cannot be used.
    #[error("{}: tensor {tensor:?} holds {found} at row {row}, expected {expected}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Row of the value.
        row: usize,
        /// What the value may be.
        expected: String,
        /// The value.
        found: String,
    },
    /// A tokenizer file that cannot be read as one.
    #[error("{}: not a tokenizer: {reason}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The tokenizer failed on a text.
    #[error("text {index} cannot be tokenised: {reason}")]
    Tokenise {
        /// Index of the text in the call.
        index: usize,
        /// What the tokenizer said.
        reason: String,
    },
}

impl Error {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}
