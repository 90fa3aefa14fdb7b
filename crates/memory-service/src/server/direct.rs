//! Fetches without a copy. tonic's encoders write a message into one buffer; here the body of an answer is
//! made of the heads of its messages and, between them, the bank's own memory. What goes over the wire is
//! the same.

use std::convert::Infallible;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use futures::{StreamExt, stream};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue};
use http_body_util::StreamBody;
use hyper::body::Frame;
use tonic::body::Body;
use tonic::metadata::MetadataMap;
use tonic::server::NamedService;
use tonic::{Request, Status, Streaming};
use tower::Service;

use super::rpc::Rpc;
use crate::codec::{FETCH_PATH, FetchPiece, MAX_MESSAGE_BYTES, Payload, Wire};
use crate::proto::FetchRequest;
use crate::proto::memory_service_server::MemoryServiceServer;

/// The service, with its own way for fetches.
#[derive(Clone)]
pub(crate) struct Direct {
    service: MemoryServiceServer<Rpc>,
    rpc: Rpc,
    /// When answers are compressed, tonic makes them.
    is_compressed: bool,
}

impl Direct {
    pub(crate) fn new(service: MemoryServiceServer<Rpc>, rpc: Rpc, is_compressed: bool) -> Self {
        Self { service, rpc, is_compressed }
    }
}

impl NamedService for Direct {
    const NAME: &'static str = <MemoryServiceServer<Rpc> as NamedService>::NAME;
}

impl Service<http::Request<Body>> for Direct {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<http::Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // As the service that tonic generates.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let is_plain = request.headers().get("grpc-encoding").is_none_or(|encoding| encoding == "identity");
        if request.uri().path() != FETCH_PATH || self.is_compressed || !is_plain {
            return self.service.call(request);
        }
        let rpc = self.rpc.clone();
        Box::pin(async move { Ok(fetch(&rpc, request).await.unwrap_or_else(Status::into_http)) })
    }
}

async fn fetch(rpc: &Rpc, request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
    let (parts, body) = request.into_parts();
    let decoder = Wire::<FetchRequest>::default();
    let mut messages = Streaming::new_request(decoder, body, None, Some(MAX_MESSAGE_BYTES));
    let message =
        messages.message().await?.ok_or_else(|| Status::invalid_argument("a fetch without a request"))?;
    let request = Request::from_parts(MetadataMap::from_headers(parts.headers), parts.extensions, message);
    let pieces = rpc.pieces(request).await?;
    let frames = pieces.flat_map(|piece| stream::iter(frames(&piece)));
    let end = stream::once(async {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        Frame::trailers(trailers)
    });
    let body = Body::new(StreamBody::new(frames.chain(end).map(Ok::<_, Status>)));
    let mut response = http::Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    Ok(response)
}

/// A message: its prefix and all of its fields but the payload, which is the last, and the payload.
fn frames(piece: &FetchPiece) -> [Frame<Bytes>; 2] {
    let payload = piece.payload.to_bytes();
    let mut head = BytesMut::with_capacity(64);
    piece.put_head(payload.len(), &mut head);
    [Frame::data(head.freeze()), Frame::data(payload)]
}

impl Payload {
    /// As it goes over the wire; not copied when that is how it is in memory.
    fn to_bytes(&self) -> Bytes {
        match self {
            Self::Bytes(bytes) => bytes.clone(),
            Self::Rounded(_) => {
                let mut bytes = BytesMut::with_capacity(self.len());
                self.put(&mut bytes);
                bytes.freeze()
            }
        }
    }
}
