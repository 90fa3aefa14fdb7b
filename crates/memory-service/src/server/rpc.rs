//! The calls of proto/memory.proto.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use cluster_tree::ClusterId;
use futures::{Stream, StreamExt, stream};
use memory_bank::Step;
use tonic::{Code, Request, Response, Status, Streaming};

use super::checkpoints::Checkpoints;
use super::host::{Host, Incoming, Outgoing};
use super::metrics::Call;
use super::tickets::Tickets;
use crate::codec::{FetchPiece, PIECE_BYTES, Payload, PushPiece, cluster_id};
use crate::proto::memory_service_server::MemoryService;
use crate::proto::{
    BlockId, CommitRequest, CommitResponse, FetchRequest, OpenBulkRequest, OpenBulkResponse, PushHead,
    PushResponse, RestoreRequest, RestoreResponse, SaveRequest, SaveResponse, StatRequest, StatResponse,
};
use crate::security::{Caller, Permission, ReloadingTokens, audit, authorize};
use crate::wire::Dtype;

/// A stream of answers.
type Answers<T> = Pin<Box<dyn Stream<Item = T> + Send>>;

/// The service over gRPC; a clone is another handle to the same.
#[derive(Clone)]
pub(crate) struct Rpc {
    pub(crate) host: Arc<Host>,
    pub(crate) checkpoints: Option<Arc<Checkpoints>>,
    pub(crate) tokens: Option<Arc<ReloadingTokens>>,
    /// Where the bulk stream listens, and who may open one.
    pub(crate) bulk: Option<(u16, Arc<Tickets>)>,
}

#[tonic::async_trait]
impl MemoryService for Rpc {
    type FetchStream = Answers<Result<FetchPiece, Status>>;
    type SaveStream = Answers<Result<SaveResponse, Status>>;

    async fn fetch(&self, request: Request<FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        Ok(Response::new(Box::pin(self.pieces(request).await?.map(Ok))))
    }

    async fn push(&self, request: Request<Streaming<PushPiece>>) -> Result<Response<PushResponse>, Status> {
        let watch = Watch::start(&self.host, "push");
        let pushed = async {
            self.caller(&request, Permission::Write)?;
            let mut pieces = request.into_inner();
            let push = receive(&self.host, &mut pieces).await?;
            let applied = self.host.push(push).await?;
            Ok(Response::new(PushResponse { applied: applied.0 }))
        };
        watch.see(pushed.await)
    }

    async fn stat(&self, request: Request<StatRequest>) -> Result<Response<StatResponse>, Status> {
        let attempt = request.get_ref().attempt;
        // Who only reads keeps nobody from pushing.
        self.caller(&request, if attempt == 0 { Permission::Read } else { Permission::Write })?;
        self.host.follow(attempt)?;
        self.host.stat().map(Response::new)
    }

    async fn save(&self, request: Request<SaveRequest>) -> Result<Response<Self::SaveStream>, Status> {
        let caller = self.caller(&request, Permission::Write)?;
        let request = request.into_inner();
        let held = async {
            let life = self.host.check(request.identity.as_ref())?;
            let checkpoints = self.checkpoints()?;
            let step = Step(request.step);
            self.host.reached(life, step).await?;
            let snapshot = checkpoints.snapshot(&self.host, life, step)?;
            Ok((checkpoints, (life, snapshot)))
        };
        let held = held.await;
        audit(&caller, "save", &self.host.identity.bank, outcome(&held));
        let (checkpoints, (life, snapshot)) = held?;
        let host = Arc::clone(&self.host);
        // A task of its own: a caller that goes away does not leave half a checkpoint.
        let writing = tokio::spawn(async move { checkpoints.write(&host, life, snapshot).await });
        let written = stream::once(async move {
            let record_json =
                writing.await.map_err(|error| Status::internal(format!("the save failed: {error}")))??;
            Ok(SaveResponse { record_json })
        });
        let held = stream::once(async { Ok(SaveResponse::default()) });
        Ok(Response::new(Box::pin(held.chain(written))))
    }

    async fn commit(&self, request: Request<CommitRequest>) -> Result<Response<CommitResponse>, Status> {
        let caller = self.caller(&request, Permission::Write)?;
        let request = request.into_inner();
        let committed = async {
            let (identity, records) = (request.identity.as_ref(), &request.record_json);
            self.host.check(identity)?;
            self.checkpoints()?.commit(&self.host, identity, (Step(request.step), records)).await
        };
        let committed = committed.await;
        audit(&caller, "commit", &self.host.identity.bank, outcome(&committed));
        committed.map(|()| Response::new(CommitResponse {}))
    }

    async fn restore(&self, request: Request<RestoreRequest>) -> Result<Response<RestoreResponse>, Status> {
        let caller = self.caller(&request, Permission::Write)?;
        let request = request.into_inner();
        let restored = async {
            let identity = request.identity.as_ref();
            self.host.check(identity)?;
            self.checkpoints()?.restore(&self.host, identity, request.step.map(Step)).await
        };
        let restored = restored.await;
        audit(&caller, "restore", &self.host.identity.bank, outcome(&restored));
        restored.map(|(step, life)| Response::new(RestoreResponse { step: step.0, life }))
    }

    async fn open_bulk(
        &self,
        request: Request<OpenBulkRequest>,
    ) -> Result<Response<OpenBulkResponse>, Status> {
        let caller = self.caller(&request, Permission::Read)?;
        let life = self.host.check(request.get_ref().identity.as_ref())?;
        Ok(Response::new(match &self.bulk {
            None => OpenBulkResponse::default(),
            Some((port, tickets)) => {
                let ticket = tickets.issue(caller, life)?.to_vec();
                OpenBulkResponse { port: u32::from(*port), ticket, versions: true }
            }
        }))
    }
}

impl Rpc {
    /// The blocks that a fetch asks for, in pieces.
    pub(crate) async fn pieces(&self, request: Request<FetchRequest>) -> Result<Answers<FetchPiece>, Status> {
        let watch = Watch::start(&self.host, "fetch");
        let outgoing = async {
            self.caller(&request, Permission::Read)?;
            let request = request.into_inner();
            let life = self.host.check(request.identity.as_ref())?;
            let dtype = dtype(request.dtype)?;
            let ids = cluster_ids(&request.blocks)?;
            let outgoing = self.host.fetch((life, Step(request.after)), (&ids, &request.held), dtype).await?;
            Ok((ids, dtype, outgoing))
        };
        let (ids, dtype, outgoing) = watch.see(outgoing.await)?;
        let pieces = pieces(ids, dtype, outgoing).map(move |piece| {
            // Lives as long as the stream.
            let _ = &watch;
            piece
        });
        Ok(Box::pin(pieces))
    }

    /// Who asks. Fails on one who may not.
    fn caller<T>(&self, request: &Request<T>, needs: Permission) -> Result<Caller, Status> {
        let tokens = self.tokens.as_ref().map(|tokens| tokens.current(Instant::now()));
        let caller = Caller::of_request(request, tokens.as_deref())
            .ok_or_else(|| Status::internal("the connection has no peer"))?;
        if let Err(denied) = authorize(&caller, needs) {
            tracing::warn!(%caller, %denied, "refused");
            return Err(denied.into());
        }
        Ok(caller)
    }

    fn checkpoints(&self) -> Result<Arc<Checkpoints>, Status> {
        let none = || Status::failed_precondition("the shard has no store for checkpoints");
        self.checkpoints.clone().ok_or_else(none)
    }
}

/// Times a call, and counts how it ended: by the error seen, or well when nothing was.
struct Watch {
    host: Arc<Host>,
    call: &'static str,
    start: Instant,
}

impl Watch {
    fn start(host: &Arc<Host>, call: &'static str) -> Self {
        Self { host: Arc::clone(host), call, start: Instant::now() }
    }

    fn see<T>(&self, result: Result<T, Status>) -> Result<T, Status> {
        self.host.metrics.ended(self.call, result.as_ref().err().map_or(Code::Ok, Status::code));
        result
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let seconds = self.start.elapsed().as_secs_f64();
        self.host.metrics.latency.get_or_create(&Call { call: self.call }).observe(seconds);
    }
}

fn outcome<T>(result: &Result<T, Status>) -> String {
    result.as_ref().map_or_else(|status| status.message().to_owned(), |_| "ok".to_owned())
}

/// Blocks cut into pieces, in order; one without payload of a block that the caller holds.
fn pieces(ids: Vec<ClusterId>, dtype: Dtype, mut outgoing: Outgoing) -> impl Stream<Item = FetchPiece> {
    let blocks = std::mem::take(&mut outgoing.blocks);
    let mut versions = std::mem::take(&mut outgoing.versions);
    versions.resize(blocks.len(), 0);
    // In the bank, of numbers in f32; on the wire, of numbers of `dtype`.
    let n_bytes = PIECE_BYTES / dtype.size() * size_of::<f32>();
    let wire = move |n_bytes: usize| (n_bytes / size_of::<f32>() * dtype.size()) as u64;
    let of_block = move |((id, block), version): ((ClusterId, Bytes), u64)| {
        (0..block.len().max(1)).step_by(n_bytes).map(move |start| {
            let piece = block.slice(start..(start + n_bytes).min(block.len()));
            let (total_bytes, offset) = (wire(block.len()), wire(start));
            FetchPiece { id, total_bytes, offset, version, payload: dtype.payload(piece) }
        })
    };
    stream::iter(ids.into_iter().zip(blocks).zip(versions).flat_map(of_block)).map(move |piece| {
        // The fetch counts until its last piece has left.
        let _ = &outgoing;
        piece
    })
}

/// Takes in a push: its head, then every block in pieces from beginning to end.
async fn receive(host: &Arc<Host>, pieces: &mut Streaming<PushPiece>) -> Result<Incoming, Status> {
    let head = match pieces.message().await? {
        Some(PushPiece { head: Some(head), .. }) => head,
        _ => return Err(Status::invalid_argument("a push begins with a head")),
    };
    let life = host.check(head.identity.as_ref())?;
    let PushHead { step, rank, blocks, .. } = &head;
    let (ids, dtype) = (cluster_ids(blocks)?, dtype(head.dtype)?);
    let mut push = host.begin_push(life, (Step(*step), *rank as usize), &ids, dtype)?;
    for (place, &id) in ids.iter().enumerate() {
        let mut values = host.room(&push, id);
        let (block, mut offset) = (values.as_bytes_mut(), 0);
        while offset < block.len() {
            let rest = &mut block[offset..];
            let Some(piece) = pieces.message().await? else {
                let message = format!("the push ends at byte {offset} of block {id}, place {place}");
                return Err(Status::invalid_argument(message));
            };
            let Payload::Bytes(payload) = piece.payload else {
                return Err(Status::internal("a piece was not decoded"));
            };
            let is_next =
                piece.head.is_none() && piece.block as usize == place && piece.offset == offset as u64;
            if !is_next || payload.is_empty() || payload.len() > rest.len() {
                return Err(Status::invalid_argument(format!(
                    "a piece of {} bytes at byte {} of place {}, expected at most {} at byte {offset} of place {place}",
                    payload.len(),
                    piece.offset,
                    piece.block,
                    rest.len()
                )));
            }
            rest[..payload.len()].copy_from_slice(&payload);
            host.metrics.received(payload.len());
            offset += payload.len();
        }
        host.arrived(&mut push, id, values);
    }
    match pieces.message().await? {
        None => Ok(push),
        Some(_) => Err(Status::invalid_argument("the push goes on after its last block")),
    }
}

fn cluster_ids(blocks: &[BlockId]) -> Result<Vec<ClusterId>, Status> {
    let id = |block: &BlockId| {
        let wrong =
            || Status::invalid_argument(format!("level {} of a block, expected 0 to 255", block.level));
        cluster_id(*block).ok_or_else(wrong)
    };
    blocks.iter().map(id).collect()
}

fn dtype(found: i32) -> Result<Dtype, Status> {
    let wrong = || Status::invalid_argument(format!("dtype {found}, expected 1 (f32) or 2 (bf16)"));
    Dtype::of_message(found).ok_or_else(wrong)
}
