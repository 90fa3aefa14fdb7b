use std::path::PathBuf;

/// What can go wrong while training.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value of the configuration that cannot be trained with.
    #[error("train.{key}: expected {expected}, found {found}")]
    Config {
        /// The configuration key.
        key: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The loss or a gradient is no longer a number. Nothing of the step was applied or written.
    #[error(
        "step {step} diverged: {what} is {found} (last finite loss {last_loss}); lower train.learning_rate or resume from an earlier checkpoint"
    )]
    Diverged {
        /// The step that failed.
        step: u64,
        /// "loss" or "gradient norm".
        what: &'static str,
        /// Its value.
        found: f64,
        /// Loss of the step before.
        last_loss: f64,
    },
    /// A file of a checkpoint or of the run is not what it should be.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, naming expected and found.
        problem: String,
    },
    /// Another process has begun to train the run anew. What this one still has it keeps to itself.
    #[error("{}: attempt {number} was taken over by attempt {by}: another process trains this run", run_dir.display())]
    TakenOver {
        /// The run's folder.
        run_dir: PathBuf,
        /// The attempt that is over.
        number: u64,
        /// The later one.
        by: u64,
    },
    /// The loader thread ended early.
    #[error("the thread that reads sequences ended before step {step}")]
    Loader {
        /// The step that was waiting for data.
        step: u64,
    },
    /// From the corpus.
    #[error(transparent)]
    Corpus(#[from] corpus::Error),
    /// From the memory bank.
    #[error(transparent)]
    Bank(#[from] memory_bank::Error),
    /// From the other workers.
    #[error(transparent)]
    Workers(#[from] collective::Error),
    /// From the anchor.
    #[error(transparent)]
    Anchor(#[from] anchor::Error),
    /// From a tensor operation.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// From the model.
    #[error(transparent)]
    Generate(#[from] generate::Error),
    /// From the evaluation of held-out documents.
    #[error(transparent)]
    Eval(#[from] eval::Error),
}

impl Error {
    /// Who is the cause, if the run may go on from its last checkpoint: another process, and that may be there
    /// again.
    pub fn cause(&self) -> Option<String> {
        let bank = |error: &memory_bank::Error| match error {
            memory_bank::Error::Remote { is_transient: true, address, .. } => {
                Some(format!("shard {address}"))
            }
            _ => None,
        };
        match self {
            Self::Workers(error) => error.cause(),
            Self::Bank(error) | Self::Generate(generate::Error::Bank(error)) => bank(error),
            Self::Eval(eval::Error::Generate(generate::Error::Bank(error))) => bank(error),
            _ => None,
        }
    }

    pub(crate) fn file(path: impl Into<PathBuf>, problem: impl ToString) -> Self {
        Self::File { path: path.into(), problem: problem.to_string() }
    }
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;
