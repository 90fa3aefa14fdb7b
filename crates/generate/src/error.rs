/// What can go wrong while generating.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A sampling option outside its range.
    #[error("generate.{key}: expected {expected}, found {found}")]
    Option {
        /// The option.
        key: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        found: f64,
    },
    /// A bound of an engine that it cannot work with.
    #[error("serve.{key}: expected {expected}, found {found}")]
    Engine {
        /// The option.
        key: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        found: u64,
    },
    /// A prompt that leaves no room for what is asked.
    #[error("prompt of {prompt} tokens plus {new} new ones exceeds the anchor's {limit} positions")]
    TooLong {
        /// Tokens of the longest prompt.
        prompt: usize,
        /// Tokens asked for.
        new: usize,
        /// Positions the anchor has.
        limit: usize,
    },
    /// A part of a request that no engine can do.
    #[error("{what}: expected {expected}, found {found}")]
    Request {
        /// The part.
        what: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A defect: what a step of an engine, or of one sequence in it, ended with.
    #[error("panicked: {message}")]
    Panicked {
        /// What it said.
        message: String,
    },
    /// The thread of an engine cannot be started.
    #[error("the engine's thread: {0}")]
    Thread(#[source] std::io::Error),
    /// A continuation of nothing: its first token has no probability.
    #[error("continuation {index}: expected a context of at least the end-of-text token, found 0 tokens")]
    EmptyContext {
        /// Which of the continuations.
        index: usize,
    },
    /// A path was asked for, but the model has no bank.
    #[error("memory path {path} asked of a run that has no memory bank")]
    NoBank {
        /// The path.
        path: String,
    },
    /// Some prompts of a batch fetch memory and others do not.
    #[error("a batch mixes {with} sequences with memory and {without} without")]
    Mixed {
        /// Sequences with a path.
        with: usize,
        /// Sequences without.
        without: usize,
    },
    /// The model put no finite probability on any token.
    #[error("the scores of the next token are not finite")]
    NotFinite,
    /// From the anchor.
    #[error(transparent)]
    Anchor(#[from] anchor::Error),
    /// From the memory bank.
    #[error(transparent)]
    Bank(#[from] memory_bank::Error),
    /// From the tokenizer.
    #[error(transparent)]
    Corpus(#[from] corpus::Error),
    /// From a tensor operation.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;
