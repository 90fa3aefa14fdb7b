use crate::Call;

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a worker goes no further with the others.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A setting that makes no job.
    #[error("{field} is {found}, expected {expected}")]
    Setting {
        /// The setting.
        field: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The workers did not find each other.
    #[error("rank {rank} cannot join the job at {address}: {reason}")]
    Join {
        /// This worker.
        rank: usize,
        /// Where rank 0 is, or should be.
        address: String,
        /// What was expected and what came.
        reason: String,
        /// Whether it is another worker that was not there any more.
        is_transient: bool,
    },
    /// A worker from which nothing has come for too long.
    #[error("rank {rank} is late: rank {waiting} has waited {seconds} s for it in {call}")]
    Late {
        /// The one that is waited for.
        rank: usize,
        /// The one that waits.
        waiting: usize,
        /// Since when.
        seconds: u64,
        /// What it waits in.
        call: Call,
    },
    /// A worker whose connection ended.
    #[error("rank {rank} is gone: {reason}, in {call} of rank {waiting}")]
    Gone {
        /// The one that was waited for.
        rank: usize,
        /// The one that waited.
        waiting: usize,
        /// What the system says.
        reason: String,
        /// What it waited in.
        call: Call,
    },
    /// A worker said why it goes no further.
    #[error("rank {rank} gave up: {reason}")]
    GaveUp {
        /// Which one.
        rank: usize,
        /// Its words.
        reason: String,
        /// Who keeps it from going on, and may be there again; `None` when to go on from the last checkpoint
        /// would not help it.
        cause: Option<String>,
    },
    /// A worker is elsewhere in the program than this one.
    #[error("rank {rank} is in {found}, and rank {waiting} in {expected}")]
    OutOfStep {
        /// The other.
        rank: usize,
        /// This one.
        waiting: usize,
        /// Where this one is.
        expected: Call,
        /// Where the other is.
        found: Call,
    },
    /// A worker sent another number of bytes than the call takes.
    #[error("rank {rank} sent {found} bytes in {call}, expected {expected}")]
    Length {
        /// The other.
        rank: usize,
        /// The call.
        call: Call,
        /// Bytes that it takes.
        expected: usize,
        /// Bytes that came.
        found: usize,
    },
    /// NCCL failed: by itself, or since the GPU of another worker is gone.
    #[error("NCCL: {reason}, in {call}")]
    Nccl {
        /// The call.
        call: Call,
        /// What it says.
        reason: String,
    },
}

impl Error {
    /// Who or what is the cause, if the job may go on from its last checkpoint with whoever is there then.
    pub fn cause(&self) -> Option<String> {
        match self {
            Self::Late { rank, .. } | Self::Gone { rank, .. } => Some(format!("rank {rank}")),
            Self::Nccl { .. } => Some("NCCL".to_owned()),
            Self::GaveUp { cause, .. } => cause.clone(),
            Self::Join { is_transient, .. } => is_transient.then(|| "joining".to_owned()),
            Self::Setting { .. } | Self::OutOfStep { .. } | Self::Length { .. } => None,
        }
    }

    /// Whether the job may go on from its last checkpoint.
    pub fn is_transient(&self) -> bool {
        self.cause().is_some()
    }
}
