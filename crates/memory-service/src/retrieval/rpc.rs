//! The calls of proto/retrieval.proto.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster_tree::{ClusterId, ClusterPath};
use futures::{Stream, StreamExt, stream};
use memory_bank::BlockDtype;
use tokio::sync::OwnedSemaphorePermit;
use tonic::{Request, Response, Status};

use super::limits::RetrievalLimits;
use super::pieces::{convert, dtype, head, pieces};
use super::source::{Ask, Refusal, RetrievalSource, Retrieved, What};
use crate::proto::retrieval::retrieval_service_server::RetrievalService;
use crate::proto::retrieval::retrieve_request;
use crate::proto::retrieval::{
    BlockIds, ExplainRequest, ExplainResponse, InfoRequest, InfoResponse, RetrieveRequest, RetrieveResponse,
    RouteRequest, RouteResponse, Routes,
};
use crate::security::{Caller, Permission, ReloadingTokens, authorize};
use crate::server::Bound;

/// The service over gRPC.
pub(super) struct Rpc<S> {
    source: S,
    limits: RetrievalLimits,
    tokens: Option<Arc<ReloadingTokens>>,
    requests: Bound,
    send_mib: Bound,
}

type Answers = Pin<Box<dyn Stream<Item = Result<RetrieveResponse, Status>> + Send>>;

impl<S: RetrievalSource> Rpc<S> {
    pub(super) fn new(source: S, limits: RetrievalLimits, tokens: Option<Arc<ReloadingTokens>>) -> Self {
        let requests = Bound::new("requests", limits.requests);
        let send_mib = Bound::new("MiB of blocks to send", limits.send_mib);
        Self { source, limits, tokens, requests, send_mib }
    }

    /// Fails on one who may not read.
    fn check_caller<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let tokens = self.tokens.as_ref().map(|tokens| tokens.current(Instant::now()));
        let caller = Caller::of_request(request, tokens.as_deref())
            .ok_or_else(|| Status::internal("the connection has no peer"))?;
        authorize(&caller, Permission::Read).map_err(|denied| {
            tracing::warn!(%caller, %denied, "refused");
            Status::from(denied)
        })
    }

    /// A request that may begin, until it is dropped.
    fn begin<T>(&self, request: &Request<T>) -> Result<OwnedSemaphorePermit, Status> {
        self.check_caller(request)?;
        self.requests.take(1)
    }

    /// What becomes of work that may take so long.
    async fn in_time<T>(&self, work: impl Future<Output = Result<T, Refusal>>) -> Result<T, Status> {
        let limit = Duration::from_secs(self.limits.request_s);
        match tokio::time::timeout(limit, work).await {
            Ok(done) => Ok(done?),
            Err(_) => {
                Err(Status::deadline_exceeded(format!("expected an answer within {limit:?}, found none")))
            }
        }
    }

    fn check_text(&self, text: &str, place: usize) -> Result<(), Status> {
        let (expected, found) = (self.limits.text_bytes, text.len());
        if found <= expected {
            return Ok(());
        }
        let message = format!("text {place} of {found} bytes, expected at most {expected}");
        Err(Status::invalid_argument(message))
    }

    /// What a request asks for, within the limits.
    fn ask(&self, request: RetrieveRequest) -> Result<Ask, Status> {
        let what = match request.what {
            Some(retrieve_request::What::Text(text)) => {
                self.check_text(&text, 0)?;
                What::Text(text)
            }
            Some(retrieve_request::What::Path(path)) => What::Path(path_of(path.indices)?),
            Some(retrieve_request::What::Blocks(blocks)) => What::Blocks(self.block_ids(blocks)?),
            None => {
                return Err(Status::invalid_argument(
                    "expected a text, a path or blocks, found none of them",
                ));
            }
        };
        let wants_part = !request.levels.is_empty() || !request.blocked.is_empty();
        if wants_part && matches!(what, What::Blocks(_)) {
            return Err(Status::invalid_argument(
                "levels and blocked: expected none beside blocks, found some",
            ));
        }
        Ok(Ask {
            bank: (!request.bank.is_empty()).then_some(request.bank),
            what,
            levels: request.levels.into_iter().map(|level| level as usize).collect(),
            blocked: request.blocked,
        })
    }

    fn block_ids(&self, blocks: BlockIds) -> Result<Vec<ClusterId>, Status> {
        let (expected, found) = (self.limits.blocks_per_request, blocks.ids.len());
        if !(1..=expected).contains(&found) {
            let message = format!("{found} blocks in one request, expected 1 to {expected}");
            return Err(Status::invalid_argument(message));
        }
        let id = |id: crate::proto::retrieval::BlockId| {
            let wrong =
                |_| Status::invalid_argument(format!("level {} of a block, expected 0 to 255", id.level));
            Ok(ClusterId { level: id.level.try_into().map_err(wrong)?, index: id.index })
        };
        blocks.ids.into_iter().map(id).collect()
    }

    /// The room that the blocks take until they are sent.
    fn room(&self, retrieved: &Retrieved, dtype: BlockDtype) -> Result<OwnedSemaphorePermit, Status> {
        let bytes = |id: &ClusterId| dtype.block_bytes(&retrieved.spec, usize::from(id.level));
        let mib = retrieved.ids.iter().map(bytes).sum::<u64>().div_ceil(1 << 20) as usize;
        let expected = self.limits.request_mib;
        if mib > expected {
            let message = format!("{mib} MiB of blocks in one request, expected at most {expected}");
            return Err(Status::invalid_argument(message));
        }
        self.send_mib.take(mib)
    }
}

#[tonic::async_trait]
impl<S: RetrievalSource> RetrievalService for Rpc<S> {
    type RetrieveStream = Answers;

    async fn route(&self, request: Request<RouteRequest>) -> Result<Response<RouteResponse>, Status> {
        let _permit = self.begin(&request)?;
        let RouteRequest { texts, embeddings, n } = request.into_inner();
        let (expected, found) = (self.limits.inputs_per_request, texts.len() + embeddings.len());
        if !(1..=expected).contains(&found) {
            let message = format!("{found} inputs in one request, expected 1 to {expected}");
            return Err(Status::invalid_argument(message));
        }
        let found = (texts.len(), embeddings.len());
        let mut routes = match found {
            (_, 0) => {
                texts.iter().enumerate().try_for_each(|(place, text)| self.check_text(text, place))?;
                self.in_time(self.source.route_texts(texts)).await?
            }
            (0, _) => {
                let rows = embeddings.into_iter().map(|embedding| embedding.values).collect();
                self.in_time(self.source.route_embeddings(rows)).await?
            }
            (texts, embeddings) => {
                let message =
                    format!("expected texts or embeddings, found {texts} texts and {embeddings} embeddings");
                return Err(Status::invalid_argument(message));
            }
        };
        if n > 0 {
            routes.iter_mut().for_each(|routes| routes.truncate(n as usize));
        }
        let inputs = routes.into_iter().map(|routes| Routes { routes }).collect();
        Ok(Response::new(RouteResponse { inputs }))
    }

    async fn retrieve(&self, request: Request<RetrieveRequest>) -> Result<Response<Answers>, Status> {
        let permit = self.begin(&request)?;
        let wanted = dtype(request.get_ref().dtype)?;
        let ask = self.ask(request.into_inner())?;
        let mut retrieved = self.in_time(self.source.retrieve(ask)).await?;
        let held = retrieved.blocks.first().map(|block| block.dtype());
        let dtype = wanted.or(held).unwrap_or_default();
        let room = self.room(&retrieved, dtype)?;
        let failed = |error| Status::internal(format!("blocks as {dtype}: {error}"));
        let converted =
            tokio::task::spawn_blocking(move || convert(&mut retrieved, dtype).map(|()| retrieved));
        let retrieved = converted.await.map_err(|error| failed(error.to_string()))?;
        let retrieved = retrieved.map_err(|error| failed(error.to_string()))?;
        let head = head(&retrieved, dtype);
        let pieces = pieces(retrieved.blocks, (permit, room, retrieved.held));
        Ok(Response::new(Box::pin(stream::iter([Ok(head)]).chain(pieces))))
    }

    async fn explain(&self, request: Request<ExplainRequest>) -> Result<Response<ExplainResponse>, Status> {
        let _permit = self.begin(&request)?;
        Ok(Response::new(self.source.explain(&request.get_ref().prefix)?))
    }

    async fn info(&self, request: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        // Also while all others are busy: it does no work.
        self.check_caller(&request)?;
        Ok(Response::new(self.source.info()))
    }
}

fn path_of(indices: Vec<u32>) -> Result<ClusterPath, Status> {
    ClusterPath::new(indices).map_err(|error| Status::invalid_argument(error.to_string()))
}
