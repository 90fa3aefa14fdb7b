use std::sync::Arc;
use std::time::Duration;

use memory_bank::{BlockSpec, Result};
use rand::RngExt;
use tonic::transport::Endpoint;

use super::{Retry, setting};
use crate::identity::Identity;
use crate::security::ReloadingTls;
use crate::server::{Compression, FRAME_BYTES, WINDOW_BYTES};
use crate::wire::Dtype;

/// Where the shards of a bank are, and how they are reached.
#[derive(Clone)]
pub struct RemoteOptions {
    /// `host:port` of every shard, in order.
    pub shards: Vec<String>,
    /// The sizes of the blocks.
    pub spec: BlockSpec,
    /// What the bank must be.
    pub identity: Identity,
    /// Ranks whose pushes make a step, as this client takes it; `None` when it only reads.
    pub world_size: Option<usize>,
    /// The attempt at a run that this client is of; shards refuse it once they have been told of a later one.
    /// 0 is of none.
    pub attempt: u64,
    /// Of fetched weights on the wire.
    pub fetch_dtype: Dtype,
    /// Of pushed gradients on the wire.
    pub push_dtype: Dtype,
    /// Whether blocks may come over bulk streams, where the shards offer them.
    pub bulk: bool,
    /// Bytes of blocks that are read (not trained on) kept, to be fetched again only when they have changed.
    pub cache_bytes: u64,
    /// Connections to each shard at once.
    pub streams: usize,
    /// Of gRPC messages.
    pub compression: Compression,
    /// Certificates; without them connections are not encrypted.
    pub tls: Option<Arc<ReloadingTls>>,
    /// A bearer token.
    pub token: Option<String>,
    /// Seconds to wait for a connection.
    pub connect_s: u64,
    /// Seconds after which a shard whose system no longer answers is taken for gone.
    pub silent_s: u64,
    /// Seconds that one try of a request may take, waiting for its step included. A shard's own limit
    /// should be reached before.
    pub request_s: u64,
    /// How long to try again.
    pub retry: Retry,
    /// Of the pauses between tries, which no two clients should share.
    pub seed: u64,
}

impl RemoteOptions {
    /// A bank at these shards, with the usual settings.
    pub fn new(shards: Vec<String>, spec: BlockSpec, identity: Identity) -> Self {
        Self {
            shards,
            spec,
            identity,
            world_size: None,
            attempt: 0,
            fetch_dtype: Dtype::F32,
            push_dtype: Dtype::F32,
            bulk: true,
            cache_bytes: 0,
            streams: 2,
            compression: Compression::None,
            tls: None,
            token: None,
            connect_s: 10,
            silent_s: 30,
            request_s: 660,
            retry: Retry::default(),
            seed: rand::rng().random(),
        }
    }
}

/// A shard as these options reach it; fails on what is no address.
pub(super) fn endpoint(address: &str, options: &RemoteOptions) -> Result<Endpoint> {
    let wrong = || setting("shards", "addresses like host:7070", address);
    let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
    if host.is_empty() || port.parse::<u16>().is_err() {
        return Err(wrong());
    }
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|_| wrong())?;
    Ok(endpoint
        .connect_timeout(Duration::from_secs(options.connect_s))
        .max_frame_size(FRAME_BYTES)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .http2_keep_alive_interval(Duration::from_secs(options.silent_s).div_f64(2.0))
        .keep_alive_timeout(Duration::from_secs(options.silent_s).div_f64(2.0))
        .tcp_nodelay(true))
}
