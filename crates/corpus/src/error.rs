//! The errors of the crate.

use std::path::{Path, PathBuf};

/// What can go wrong between a document's file and a packed sequence. `url` is the file as it was
/// found: an absolute path or a URL; lines, rows and records count from 1.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to read or write a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A path, glob or URL under which there is no file to read.
    #[error("{pattern}: no file matches")]
    NoMatch {
        /// The pattern as given.
        pattern: String,
    },
    /// A file that is named for training and for validation.
    #[error("{url}: expected in files or in validation_files, found in both")]
    TrainedAndHeldOut {
        /// The file.
        url: String,
    },
    /// A pattern or URL that cannot be read as one.
    #[error("{url}: {reason}")]
    Url {
        /// The pattern or URL as given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An object store refused a request.
    #[error("{url}: {source}")]
    Store {
        /// What was asked for.
        url: String,
        /// What the store said.
        source: object_store::Error,
    },
    /// A file name that tells no format, and no format was given.
    #[error("{url}: unknown format: expected {expected}, or an explicit format")]
    UnknownFormat {
        /// The file.
        url: String,
        /// The extensions that are known.
        expected: &'static str,
    },
    /// Files without one document.
    #[error("no documents in {n_files} files of {patterns} ({n_empty} empty documents were skipped)")]
    EmptyCorpus {
        /// The patterns, joined by commas.
        patterns: String,
        /// Files read.
        n_files: usize,
        /// Documents skipped because they held no text.
        n_empty: u64,
    },
    /// Text that is not UTF-8.
    #[error("{url}:{record}: not utf-8 at byte {byte} of the record")]
    Utf8 {
        /// The file.
        url: String,
        /// The line or row.
        record: u64,
        /// Offset of the first wrong byte in the line or value.
        byte: usize,
    },
    /// A line that is not a JSON object.
    #[error("{url}:{line}: invalid json: {source}")]
    Json {
        /// The file.
        url: String,
        /// The line.
        line: u64,
        /// What the parser said; its column counts within the line.
        source: serde_json::Error,
    },
    /// A record without a key that it must have.
    #[error("{url}:{record}: no key `{key}`, found {found}")]
    MissingKey {
        /// The file.
        url: String,
        /// The line or row; 0 for a column that the whole file lacks.
        record: u64,
        /// The key asked for.
        key: String,
        /// The keys that are there.
        found: String,
    },
    /// A value of a type that the key cannot have.
    #[error("{url}:{record}: `{key}` must be {expected}, found {found}")]
    WrongType {
        /// The file.
        url: String,
        /// The line or row; 0 for a column of the whole file.
        record: u64,
        /// The key.
        key: String,
        /// The types that it may have.
        expected: &'static str,
        /// The type that it has.
        found: String,
    },
    /// A line or document too long to be one.
    #[error("{url}:{line}: longer than {limit} bytes")]
    TooLong {
        /// The file.
        url: String,
        /// The line.
        line: u64,
        /// The bound in bytes.
        limit: usize,
    },
    /// A file that ends before its content does.
    #[error("{url}:{record}: the file ends too early: {source}")]
    Truncated {
        /// The file.
        url: String,
        /// The line or row being read.
        record: u64,
        /// What the decoder said.
        source: std::io::Error,
    },
    /// A file that cannot be read on, or is damaged.
    #[error("{url}:{record}: {source}")]
    Read {
        /// The file.
        url: String,
        /// The line or row being read.
        record: u64,
        /// What the decoder or the system said.
        source: std::io::Error,
    },
    /// A file that is not parquet, or is damaged.
    #[error("{url}:{row}: {source}")]
    Parquet {
        /// The file.
        url: String,
        /// The row being read; 0 for the file's metadata.
        row: u64,
        /// What the decoder said.
        source: parquet::errors::ParquetError,
    },
    /// A tokenizer that cannot be loaded, trained, or applied.
    #[error("tokenizer {name}: {reason}")]
    Tokenizer {
        /// Its path, or what was done with it.
        name: String,
        /// What the library said.
        reason: String,
    },
    /// A tokenizer that has none of the end-of-text tokens looked for.
    #[error("tokenizer {}: no end-of-text token, looked for {looked_for}", path.display())]
    NoEndOfText {
        /// Its path.
        path: PathBuf,
        /// The spellings looked for.
        looked_for: String,
    },
    /// No text to train a tokenizer on.
    #[error("tokenizer: expected text to train on, found none")]
    NoTrainingText,
    /// Data made with another tokenizer.
    #[error("{}: made with tokenizer {expected}, found tokenizer {found}", path.display())]
    OtherTokenizer {
        /// The file.
        path: PathBuf,
        /// Hash of the tokenizer that the file names.
        expected: String,
        /// Hash of the tokenizer at hand.
        found: String,
    },
    /// A token id that the vocabulary does not have.
    #[error("{name}: token {token} at {position} is not below the vocabulary size {vocab_size}")]
    OutOfVocabulary {
        /// The file or text.
        name: String,
        /// Position of the token in it.
        position: u64,
        /// The token id.
        token: u32,
        /// The vocabulary size.
        vocab_size: usize,
    },
    /// An option outside its range.
    #[error("{key} must be {expected}, found {found}")]
    Option {
        /// The option.
        key: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// A file of another size than its header or manifest says: truncated, or of another corpus.
    #[error("{}: expected {expected} bytes, found {found}", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Bytes by the header or manifest.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// A file that is not what its name says.
    #[error("{}: expected {expected}, found {found}", path.display())]
    WrongFile {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        expected: String,
        /// What it holds.
        found: String,
    },
    /// A file of the prepared folder that no finished stage left.
    #[error("{}: not there: stage `{stage}` has not finished", path.display())]
    NotPrepared {
        /// The file.
        path: PathBuf,
        /// The stage that writes it.
        stage: &'static str,
    },
    /// An assignment of another number of windows: the tree is of another corpus.
    #[error("expected a leaf for each of {expected} windows, found {found}: the tree is of another corpus")]
    WindowCount {
        /// Windows in the folder.
        expected: usize,
        /// Leaves given.
        found: usize,
    },
    /// A window assigned to a leaf that the tree does not have.
    #[error("window {window}: leaf {leaf} is not below the number of leaves {n_leaves}")]
    Leaf {
        /// The window.
        window: usize,
        /// The leaf it was given.
        leaf: u32,
        /// Leaves of the tree.
        n_leaves: u64,
    },
    /// A branching that is no tree of at most 2^32 - 1 leaves and 255 levels.
    #[error("branching must be 1 to 255 levels of at least 1 and at most 2^32 - 1 leaves, found {found}")]
    Branching {
        /// The branching.
        found: String,
    },
    /// A prepared folder with nothing to train on.
    #[error("{}: no training sequence: {n_validation} of {n_documents} documents are validation", dir.display())]
    NoTrainingSequence {
        /// The folder.
        dir: PathBuf,
        /// Validation documents.
        n_validation: u64,
        /// All documents.
        n_documents: u64,
    },
    /// An index past the end.
    #[error("{what} {index} is not below {len}")]
    OutOfRange {
        /// What is counted.
        what: &'static str,
        /// The index.
        index: u64,
        /// How many there are.
        len: u64,
    },
    /// More of something than its index can count.
    #[error("too many {what}: at most {limit}")]
    TooMany {
        /// What is counted.
        what: &'static str,
        /// The bound.
        limit: u64,
    },
    /// Two corpora that differ.
    #[error("the corpus differs in {part}: expected {expected}, found {found}")]
    Differs {
        /// The file, or the part (`tokenizer`, `embedder`, `tree`, `assignment`, `option x`).
        part: String,
        /// Its hash or value in the first.
        expected: String,
        /// Its hash or value in the second.
        found: String,
    },
    /// A name that is no stage.
    #[error("expected a stage (tokenise, embed, cluster, pack), found `{found}`")]
    UnknownStage {
        /// The name.
        found: String,
    },
    /// A folder that another process is preparing.
    #[error("{}: another process is preparing this folder", dir.display())]
    Locked {
        /// The folder.
        dir: PathBuf,
    },
    /// An error of the cluster tree.
    #[error(transparent)]
    ClusterTree(#[from] cluster_tree::Error),
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// For `map_err`: an I/O error that names its file.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }

    /// An error while reading record `record` of a document file.
    pub(crate) fn reading(url: &str, record: u64, source: std::io::Error) -> Self {
        let url = url.to_owned();
        match source.kind() {
            std::io::ErrorKind::UnexpectedEof => Self::Truncated { url, record, source },
            _ => Self::Read { url, record, source },
        }
    }
}
