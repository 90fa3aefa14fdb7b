use std::path::PathBuf;
use std::sync::Arc;

use cluster_tree::ClusterId;

use crate::{BlockDtype, Step};

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Characters that a message shows of what stands in a file.
const MAX_SHOWN: usize = 2000;

/// What can be wrong with a spec, a request to a bank, or a bank's files.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of a spec or of options has a value that it cannot have.
    #[error("{field} is {found}, expected {expected}")]
    Setting {
        /// The field.
        field: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A block that the spec does not have.
    #[error("no block {id}: level {} has {n_blocks} blocks", id.level)]
    UnknownBlock {
        /// The block asked for.
        id: ClusterId,
        /// Blocks of that level: 0 for a level beyond the spec or of width 0.
        n_blocks: usize,
    },
    /// A gradient of the wrong length.
    #[error("gradient of block {id} has {found} values, expected {expected}")]
    GradientLength {
        /// The block.
        id: ClusterId,
        /// Values of a block of its level.
        expected: usize,
        /// Values pushed.
        found: usize,
    },
    /// A gradient with NaN, infinity or a value too large to be squared.
    #[error(
        "gradient of block {id} has {value} at position {position}, expected a magnitude of at most {limit}"
    )]
    GradientValue {
        /// The block.
        id: ClusterId,
        /// Position of the first such value.
        position: usize,
        /// The value.
        value: f32,
        /// [`crate::MAX_GRADIENT`].
        limit: f32,
    },
    /// Two gradients of one block in one push.
    #[error("push holds two gradients of block {id}, expected one")]
    RepeatedGradient {
        /// The block.
        id: ClusterId,
    },
    /// A rank that the bank does not wait for.
    #[error("push from rank {rank}, expected a rank below the world size {world_size}")]
    Rank {
        /// The rank.
        rank: usize,
        /// Number of ranks.
        world_size: usize,
    },
    /// A push that skips a step, or one for step 0.
    #[error("push of step {found}, but steps up to {applied} are applied: expected {}", steps(*applied, *last))]
    PushStep {
        /// Step pushed.
        found: Step,
        /// Last step applied.
        applied: Step,
        /// Last step that may be pushed now.
        last: Step,
    },
    /// A block asked of, or pushed to, a shard that does not own it.
    #[error("block {id} belongs to shard {owner} of {n_shards}, not to shard {shard}")]
    NotOwned {
        /// The block.
        id: ClusterId,
        /// The shard that owns it.
        owner: usize,
        /// The shard that was asked.
        shard: usize,
        /// Shards of the bank.
        n_shards: usize,
    },
    /// A stored block whose weights or moments are of another length than the spec's.
    #[error("row of block {id} has {found} values, expected {expected}")]
    RowLength {
        /// The block.
        id: ClusterId,
        /// Values of a block of its level.
        expected: usize,
        /// Values found.
        found: usize,
    },
    /// A stored block that is there twice.
    #[error("block {id} is stored twice, expected once")]
    RepeatedRow {
        /// The block.
        id: ClusterId,
    },
    /// A save of another step than the bank is at.
    #[error("save of step {expected}, but the bank is at step {applied}")]
    SaveStep {
        /// Step to save.
        expected: Step,
        /// Last step applied.
        applied: Step,
    },
    /// A push or a save to a bank that was opened to be read.
    #[error("cannot {action} step {step}: the bank at step {applied} is open read-only")]
    ReadOnly {
        /// `push` or `save`.
        action: &'static str,
        /// Step of the request.
        step: Step,
        /// Step that the files hold.
        applied: Step,
    },
    /// A fetch from a read-only bank of a step that its files do not reach.
    #[error("fetch after step {after}, but the bank is open read-only at step {applied}")]
    NotReached {
        /// Step to wait for.
        after: Step,
        /// Step that the files hold.
        applied: Step,
    },
    /// An update of the bank panicked, so its blocks may be half updated.
    #[error("an earlier update of the bank did not finish, resume from a checkpoint")]
    Unfinished,
    /// A background task of the bank panicked or was cancelled.
    #[error("a task of the bank failed: {source}")]
    Task {
        /// What the runtime said.
        source: tokio::task::JoinError,
    },
    /// A shard elsewhere refused a request or could not be reached.
    #[error("shard {address}: {message}")]
    Remote {
        /// `host:port`.
        address: String,
        /// What it said, or why it could not be asked.
        message: String,
        /// Whether a run may go on from its last checkpoint: the shard was not there, or has lost something.
        is_transient: bool,
    },
    /// Reading or writing a file failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A request to an object store failed.
    #[error("{}: {source}", place.display())]
    Store {
        /// The file or folder, below what the store was opened as.
        place: PathBuf,
        /// What the store said.
        source: Box<object_store::Error>,
    },
    /// A store that does not keep what conditional writes promise, so that two writers could destroy
    /// each other's saves.
    #[error("{}: the store {did}, expected it to {expected}", place.display())]
    UnfitStore {
        /// The bank's folder.
        place: PathBuf,
        /// What the probe saw.
        did: String,
        /// What a store has to do.
        expected: &'static str,
    },
    /// Another save of the same step that holds something else.
    #[error("{}: a manifest of sha256 {found} is there, expected this save's of sha256 {expected}", path.display())]
    Committed {
        /// The manifest.
        path: PathBuf,
        /// The hash of the one that was to be written.
        expected: String,
        /// The hash of the one that is there.
        found: String,
    },
    /// A block that banks to be merged hold with different contents.
    #[error("block {id} is in {} and in {} with different contents, expected the same", first.display(), second.display())]
    Conflict {
        /// The block.
        id: ClusterId,
        /// Manifest of the first bank.
        first: PathBuf,
        /// Manifest of the second bank.
        second: PathBuf,
    },
    /// A manifest that does not parse.
    #[error("{}: {part} is corrupt: {}", path.display(), one_line(&source.to_string()))]
    Json {
        /// The file.
        path: PathBuf,
        /// `manifest` or `owner`.
        part: &'static str,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// A file that holds something other than it should.
    #[error("{}: {what} is {found}, expected {expected}", path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// What differs: a key, a tensor, the size or the hash.
        what: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A tier that answered something other than the blocks it was asked for.
    #[error("tier {tier} answered {found}, expected {expected}")]
    Answer {
        /// Its name.
        tier: String,
        /// What it was asked for.
        expected: String,
        /// What it answered.
        found: String,
    },
    /// A weight that a cache's dtype cannot hold.
    #[error(
        "block {id} has {value} at position {position}, expected a magnitude of at most {limit} for {dtype}"
    )]
    Encode {
        /// The block.
        id: ClusterId,
        /// Position of the first such value.
        position: usize,
        /// The value.
        value: f32,
        /// The dtype.
        dtype: BlockDtype,
        /// The largest magnitude that it holds.
        limit: f32,
    },
    /// The error of a fetch that others waited for too.
    #[error("{source}")]
    Shared {
        /// What it was.
        source: Arc<Error>,
    },
}

/// Text from a file as a message shows it: nobody writes lines into a log, or fills it, through a file.
pub(crate) fn one_line(text: &str) -> String {
    let mut line: String = match text.contains(char::is_control) {
        true => text.chars().take(MAX_SHOWN).flat_map(char::escape_debug).collect(),
        false => text.to_owned(),
    };
    if let Some((end, _)) = line.char_indices().nth(MAX_SHOWN) {
        line.truncate(end);
        line.push('…');
    }
    line
}

/// The steps that may be pushed, for a message.
fn steps(applied: Step, last: Step) -> String {
    let first = applied.0 + 1;
    if last.0 == first { first.to_string() } else { format!("{first} to {last}") }
}
