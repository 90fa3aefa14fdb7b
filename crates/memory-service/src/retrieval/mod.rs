//! Memory by text as a server: `retrieval.v1`.
//!
//! The same shape as the server of a shard: certificates and tokens by roles, bounds with a hint when to come back,
//! health and reflection. What it serves is a [`RetrievalSource`].

mod limits;
mod pieces;
mod rpc;
mod source;

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::transport::Server;
use tonic_health::ServingStatus;

pub use limits::RetrievalLimits;
pub use source::{Ask, Refusal, RetrievalSource, Retrieved, What};

use crate::proto::retrieval::DESCRIPTORS;
use crate::proto::retrieval::retrieval_service_server::RetrievalServiceServer;
use crate::security::{Acceptor, Protocol, ReloadingTls, ReloadingTokens, check_bind};
use crate::server::{FRAME_BYTES, ServeError, WINDOW_BYTES, accept};
use rpc::Rpc;

/// Name under which the standard health service tells whether requests are taken; the empty name tells whether the
/// process lives.
pub const RETRIEVAL_READY: &str = "retrieval.v1.RetrievalService";

/// What is around a source that is served.
#[derive(Default)]
pub struct RetrievalOptions {
    /// Bounds on what is done at once.
    pub limits: RetrievalLimits,
    /// Certificates, and who may do what by theirs; without them connections are not encrypted.
    pub tls: Option<Arc<ReloadingTls>>,
    /// What callers may do by a token.
    pub tokens: Option<Arc<ReloadingTokens>>,
    /// Whether others may reach the port without TLS.
    pub insecure: bool,
}

/// Serves memory by text until `shutdown`; then requests that are under way are finished.
///
/// # Errors
/// On a listener that others reach, without TLS and unless told to be insecure.
pub async fn serve_retrieval(
    source: impl RetrievalSource,
    listener: TcpListener,
    options: RetrievalOptions,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let RetrievalOptions { limits, tls, tokens, insecure } = options;
    check_bind(listener.local_addr()?, tls.is_some(), insecure)?;
    let silence = Duration::from_secs(limits.idle_s);
    let connections =
        accept(listener, Acceptor { tls, protocol: Protocol::Grpc, silence }, limits.connections);
    let incoming = stream::unfold(connections, async |mut connections| {
        let connection = connections.recv().await?;
        Some((Ok::<_, io::Error>(connection), connections))
    });
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("", ServingStatus::Serving).await;
    reporter.set_service_status(RETRIEVAL_READY, ServingStatus::Serving).await;
    let service = RetrievalServiceServer::new(Rpc::new(source, limits, tokens))
        .max_decoding_message_size(limits.message_bytes())
        .max_encoding_message_size(limits.message_bytes());
    let descriptors = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // Dropped when this function ends, and with it the watch.
    let (stop, mut stopped) = watch::channel(false);
    tokio::spawn(async move {
        // An error is the end of the server too.
        let _ = stopped.changed().await;
        reporter.set_service_status(RETRIEVAL_READY, ServingStatus::NotServing).await;
    });
    Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .http2_keepalive_interval(Some(silence))
        .http2_keepalive_timeout(Some(silence))
        .add_service(service)
        .add_service(health)
        .add_service(descriptors().build_v1()?)
        .add_service(descriptors().build_v1alpha()?)
        .serve_with_incoming_shutdown(incoming.boxed(), async move {
            shutdown.await;
            // The receiver may be gone already.
            let _ = stop.send(true);
        })
        .await?;
    Ok(())
}
