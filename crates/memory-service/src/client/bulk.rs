//! The client's side of the bulk stream.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf, Bytes};
use cluster_tree::ClusterId;
use half::bf16;
use half::slice::HalfFloatSliceExt;
use memory_bank::{Block, Step};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::RETRY_METADATA;
use crate::bulk::{
    Head, Kind, REPLY_BYTES, Reply, VERSION_BYTES, decode_versions, encode_entry, encode_versions,
};
use crate::parts::Parts;
use crate::proto::OpenBulkResponse;
use crate::security::Stream;
use crate::wire::Dtype;

/// An open bulk stream.
pub(crate) struct Connection {
    stream: Stream,
    /// The life of the shard that it is for.
    pub(crate) life: u64,
    /// Whether a fetch may say what is held.
    pub(crate) has_versions: bool,
    /// Where bf16 numbers arrive.
    rounded: Vec<bf16>,
    /// In the middle of an answer it can be used no more.
    is_broken: bool,
}

/// After how long a shard whose bulk stream could not be opened is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(60);

/// The bulk streams to one shard, a bounded number of them.
pub(crate) struct Pool {
    free: Arc<Semaphore>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Connections that no request uses.
    idle: Vec<Connection>,
    /// Whether the shard offers none.
    is_closed: bool,
    /// When one could not be opened.
    failed: Option<Instant>,
}

/// The right to use one connection, and the connection if there is one already.
pub(crate) struct Turn {
    pub(crate) connection: Option<Connection>,
    _permit: OwnedSemaphorePermit,
}

impl Pool {
    /// At most `streams` connections at once; none at all unless `is_open`.
    pub(crate) fn new(streams: usize, is_open: bool) -> Self {
        let state = State { is_closed: !is_open, ..State::default() };
        Self { free: Arc::new(Semaphore::new(streams)), state: Mutex::new(state) }
    }

    /// Waits for a turn; `None` when requests do without bulk streams.
    pub(crate) async fn turn(&self) -> Option<Turn> {
        let is_usable = |state: &State| {
            !state.is_closed && state.failed.is_none_or(|failed| failed.elapsed() > TRY_AGAIN)
        };
        if !is_usable(&self.state()) {
            return None;
        }
        let permit = Arc::clone(&self.free).acquire_owned().await.ok()?;
        let mut state = self.state();
        is_usable(&state).then(|| Turn { connection: state.idle.pop(), _permit: permit })
    }

    /// Keeps a connection for the next request. When it broke, the others most likely did too.
    pub(crate) fn give_back(&self, connection: Connection) {
        let mut state = self.state();
        match connection.is_broken {
            true => state.idle.clear(),
            false => state.idle.push(connection),
        }
    }

    /// The shard offers no bulk streams.
    pub(crate) fn close(&self) {
        self.state().is_closed = true;
    }

    /// A bulk stream could not be opened.
    pub(crate) fn fail(&self) {
        self.state().failed = Some(Instant::now());
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    /// Presents the ticket.
    pub(crate) async fn open(mut stream: Stream, life: u64, offer: &OpenBulkResponse) -> io::Result<Self> {
        stream.write_all(&offer.ticket).await?;
        Ok(Self { stream, life, has_versions: offer.versions, rounded: Vec::new(), is_broken: false })
    }

    /// Fills the values of blocks, once step `after` has been applied; they have their length already. Of a
    /// block that is held nothing is done; returns the versions, if `held` has one for each block.
    pub(crate) async fn fetch(
        &mut self,
        after: Step,
        dtype: Dtype,
        (blocks, held): (&mut [Block], &[u64]),
    ) -> Result<Vec<u64>, Status> {
        // Until the answer is whole; a caller that gives up leaves it so.
        self.is_broken = true;
        let kind = if held.is_empty() { Kind::Fetch } else { Kind::FetchChanged };
        let head = Head { kind, dtype, n_blocks: blocks.len() as u32, step: after.0, rank: 0 };
        let sizes = blocks.iter().map(|block| (block.id, block.values.len() * dtype.size()));
        self.request(head, sizes, held).await?;
        self.reply().await?;
        let mut versions = vec![0; held.len() * VERSION_BYTES];
        self.stream.read_exact(&mut versions).await.map_err(broken)?;
        let versions = decode_versions(&versions);
        for (place, block) in blocks.iter_mut().enumerate() {
            if is_held(held, place, versions.get(place)) {
                continue;
            }
            match dtype {
                Dtype::F32 => {
                    let to: &mut [u8] = bytemuck::cast_slice_mut(&mut block.values);
                    self.stream.read_exact(to).await.map_err(broken)?;
                }
                Dtype::Bf16 => {
                    self.rounded.resize(block.values.len(), bf16::ZERO);
                    let to: &mut [u8] = bytemuck::cast_slice_mut(&mut self.rounded);
                    self.stream.read_exact(to).await.map_err(broken)?;
                    self.rounded.convert_to_f32_slice(&mut block.values);
                }
            }
        }
        self.is_broken = false;
        Ok(versions)
    }

    /// Hands over gradients as they go over the wire; returns the last step applied.
    pub(crate) async fn push(
        &mut self,
        (step, rank): (Step, usize),
        dtype: Dtype,
        gradients: &[(ClusterId, Bytes)],
    ) -> Result<Step, Status> {
        self.is_broken = true;
        let n_blocks = gradients.len() as u32;
        let head = Head { kind: Kind::Push, dtype, n_blocks, step: step.0, rank: rank as u32 };
        self.request(head, gradients.iter().map(|(id, values)| (*id, values.len())), &[]).await?;
        self.reply().await?;
        let mut parts = Parts::new(gradients.iter().map(|(_, values)| values.clone()));
        while parts.has_remaining() {
            if self.stream.write_buf(&mut parts).await.map_err(broken)? == 0 {
                return Err(broken(io::ErrorKind::WriteZero.into()));
            }
        }
        self.stream.flush().await.map_err(broken)?;
        let applied = self.reply().await?;
        self.is_broken = false;
        Ok(applied)
    }

    async fn request(
        &mut self,
        head: Head,
        sizes: impl Iterator<Item = (ClusterId, usize)>,
        held: &[u64],
    ) -> Result<(), Status> {
        let mut bytes = head.encode().to_vec();
        sizes.for_each(|(id, n_bytes)| encode_entry(id, n_bytes, &mut bytes));
        encode_versions(held.iter().copied(), &mut bytes);
        self.stream.write_all(&bytes).await.map_err(broken)?;
        self.stream.flush().await.map_err(broken)
    }

    async fn reply(&mut self) -> Result<Step, Status> {
        let mut bytes = [0; REPLY_BYTES];
        self.stream.read_exact(&mut bytes).await.map_err(broken)?;
        let reply = Reply::decode(&bytes).map_err(Status::internal)?;
        if reply.code == Code::Ok {
            return Ok(Step(reply.applied));
        }
        let mut text = vec![0; reply.n_text as usize];
        self.stream.read_exact(&mut text).await.map_err(broken)?;
        let mut status = Status::new(reply.code, String::from_utf8_lossy(&text));
        if reply.retry_ms > 0 {
            status.metadata_mut().insert(RETRY_METADATA, u64::from(reply.retry_ms).into());
        }
        // A refusal is a whole answer; but the stream of a life that has ended is of no more use.
        self.is_broken = status.code() == Code::Aborted;
        Err(status)
    }
}

/// Whether the block at a place is held in the version that the shard tells of it.
pub(crate) fn is_held(held: &[u64], place: usize, version: Option<&u64>) -> bool {
    held.get(place).is_some_and(|&held| held != 0 && version == Some(&held))
}

fn broken(error: io::Error) -> Status {
    Status::unavailable(format!("the bulk stream broke: {error}"))
}
