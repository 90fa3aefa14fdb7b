//! A shard as a server.

mod accept;
mod bulk;
mod checkpoints;
mod direct;
mod host;
mod http;
mod limits;
mod metrics;
mod rpc;
mod tickets;

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt, stream};
use memory_bank::{BankStore, ShardRecord};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::codec::CompressionEncoding;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic_health::ServingStatus;

pub use host::Source;
pub(crate) use limits::Bound;
pub use limits::Limits;

use crate::codec::MAX_MESSAGE_BYTES;
use crate::identity::Identity;
use crate::proto;
use crate::proto::memory_service_server::MemoryServiceServer;
use crate::security::{Acceptor, Caller, Protocol, ReloadingTls, ReloadingTokens};
pub(crate) use accept::accept;
use checkpoints::Checkpoints;
use direct::Direct;
use host::Host;
use rpc::Rpc;
use tickets::Tickets;

/// Name under which the standard health service tells whether requests are taken; the empty name tells
/// whether the process lives.
pub const READY: &str = "memory.v1.MemoryService";

/// How messages of gRPC are compressed. Parameters hardly compress, so nothing is unless told.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// By gzip.
    Gzip,
    /// By zstd.
    Zstd,
}

impl Compression {
    pub(crate) fn encoding(self) -> Option<CompressionEncoding> {
        match self {
            Self::None => None,
            Self::Gzip => Some(CompressionEncoding::Gzip),
            Self::Zstd => Some(CompressionEncoding::Zstd),
        }
    }
}

/// What is around a shard that is served.
pub struct ServeOptions {
    /// What the bank is.
    pub identity: Identity,
    /// Bounds on what is done at once.
    pub limits: Limits,
    /// Of gRPC messages.
    pub compression: Compression,
    /// Certificates, and who may do what by theirs; without them connections are not encrypted.
    pub tls: Option<Arc<ReloadingTls>>,
    /// What callers may do by a token.
    pub tokens: Option<Arc<ReloadingTokens>>,
    /// Where checkpoints go.
    pub store: Option<StoreOfBank>,
    /// The second port, of the bulk stream.
    pub bulk: Option<TcpListener>,
    /// Another port, for `/metrics`, `/live` and `/ready` over HTTP.
    pub http: Option<TcpListener>,
}

/// Where a bank's checkpoints go.
pub struct StoreOfBank {
    /// The bank in its store.
    pub store: BankStore,
    /// What two checkpoints of it share.
    pub identity: memory_bank::Identity,
    /// Checkpoints kept; 0 keeps all.
    pub keep: usize,
    /// Of the checkpoint that the shard was loaded from.
    pub base: Option<ShardRecord>,
}

/// What goes wrong while serving.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A listener is not usable.
    #[error("cannot listen: {0}")]
    Listen(#[from] io::Error),
    /// The gRPC server failed.
    #[error("the gRPC server failed: {0}")]
    Grpc(#[from] tonic::transport::Error),
    /// Others reach the port, and there is no TLS.
    #[error(transparent)]
    Security(#[from] crate::security::Error),
    /// Reflection could not be set up.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Serves a shard until `shutdown`; then requests that are under way are finished.
pub async fn serve(
    source: Source,
    listener: TcpListener,
    options: ServeOptions,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let acceptor = Acceptor {
        tls: options.tls.clone(),
        protocol: Protocol::Grpc,
        silence: Duration::from_secs(options.limits.idle_s),
    };
    let connections = accept(listener, acceptor, options.limits.connections);
    let incoming = stream::unfold(connections, async |mut connections| {
        let connection = connections.recv().await?;
        Some((Ok::<_, io::Error>(connection), connections))
    });
    serve_connections(source, incoming, options, shutdown).await
}

/// As [`serve`], over connections that came by other means, such as a simulated network.
pub async fn serve_connections<C>(
    source: Source,
    incoming: impl Stream<Item = io::Result<C>> + Send,
    options: ServeOptions,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError>
where
    C: AsyncRead + AsyncWrite + Connected<ConnectInfo = Caller> + Unpin + Send + 'static,
{
    let ServeOptions { identity, limits, compression, tls, tokens, store, bulk, http } = options;
    let host = Arc::new(Host::new(source, identity, limits));
    // Dropped when this function ends, and with it what runs beside.
    let (stop, stopped) = watch::channel(false);
    let bulk = match bulk {
        None => None,
        Some(listener) => {
            let (port, tickets) = (listener.local_addr()?.port(), Arc::new(Tickets::default()));
            let silence = Duration::from_secs(limits.idle_s);
            let acceptor = Acceptor { tls, protocol: Protocol::Bulk, silence };
            let connections = accept(listener, acceptor, limits.connections);
            tokio::spawn(serve_bulk(Arc::clone(&host), Arc::clone(&tickets), connections, stopped.clone()));
            Some((port, tickets))
        }
    };
    let readiness = host.readiness();
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("", ServingStatus::Serving).await;
    reporter.set_service_status(READY, ServingStatus::Serving).await;
    if let Some(listener) = http {
        tokio::spawn(http::serve(Arc::clone(&host), listener, stopped.clone()));
    }
    let checkpoints = store.map(|StoreOfBank { store, identity, keep, base }| {
        Arc::new(Checkpoints::new(store, identity, keep, base))
    });
    tokio::spawn(report_ready(readiness, reporter, stopped.clone()));
    let rpc = Rpc { host: Arc::clone(&host), checkpoints, tokens, bulk };
    let mut service = MemoryServiceServer::new(rpc.clone())
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    if let Some(encoding) = compression.encoding() {
        service = service.send_compressed(encoding);
    }
    for encoding in [CompressionEncoding::Gzip, CompressionEncoding::Zstd] {
        service = service.accept_compressed(encoding);
    }
    let service = Direct::new(service, rpc, compression != Compression::None);
    let descriptors = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let ending = Arc::clone(&host);
    Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .http2_keepalive_interval(Some(Duration::from_secs(limits.idle_s)))
        .http2_keepalive_timeout(Some(Duration::from_secs(limits.idle_s)))
        .add_service(service)
        .add_service(health)
        .add_service(descriptors().build_v1()?)
        .add_service(descriptors().build_v1alpha()?)
        .serve_with_incoming_shutdown(incoming.boxed(), async move {
            shutdown.await;
            ending.set_ready(false);
            // The receivers may be gone already.
            let _ = stop.send(true);
        })
        .await?;
    Ok(())
}

/// Bytes on their way to one side before it must say that it took some.
pub(crate) const WINDOW_BYTES: u32 = 16 << 20;
/// Largest frame of HTTP/2.
pub(crate) const FRAME_BYTES: u32 = 1 << 20;

async fn serve_bulk(
    host: Arc<Host>,
    tickets: Arc<Tickets>,
    mut connections: tokio::sync::mpsc::Receiver<accept::Held<crate::security::Stream>>,
    mut stopped: watch::Receiver<bool>,
) {
    loop {
        let connection = tokio::select! {
            connection = connections.recv() => connection,
            _ = stopped.changed() => return,
        };
        let Some(connection) = connection else { return };
        let (host, tickets, mut stopped) = (Arc::clone(&host), Arc::clone(&tickets), stopped.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = bulk::serve(host, tickets, connection) => {}
                _ = stopped.changed() => {}
            }
        });
    }
}

/// Tells the health service when the shard stops or starts to take requests; it takes them at first.
async fn report_ready(
    mut readiness: watch::Receiver<bool>,
    reporter: tonic_health::server::HealthReporter,
    mut stopped: watch::Receiver<bool>,
) {
    loop {
        tokio::select! {
            changed = readiness.changed() => if changed.is_err() { return },
            _ = stopped.changed() => {
                reporter.set_service_status(READY, ServingStatus::NotServing).await;
                return;
            }
        }
        let status =
            if *readiness.borrow_and_update() { ServingStatus::Serving } else { ServingStatus::NotServing };
        reporter.set_service_status(READY, status).await;
    }
}
