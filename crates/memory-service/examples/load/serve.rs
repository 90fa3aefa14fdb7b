//! A shard in a process of its own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use memory_bank::{Live, MappedBank};
use memory_service::{Compression, Limits, ServeOptions, Source, serve};
use serde_json::json;
use tokio::net::TcpListener;

use crate::bank::{Moments, NAME, START, Sizes};
use crate::closed_loop::{Result, input_ended};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    sizes: Sizes,
    /// Every block has moments of its own, and can be updated.
    #[arg(long)]
    trained: bool,
    /// Fetches at once.
    #[arg(long, default_value_t = Limits::default().fetches)]
    fetches: usize,
    /// Read-only, of the files that `make` wrote here.
    #[arg(long)]
    mapped: Option<PathBuf>,
}

/// Where a shard is.
pub(crate) struct Addresses {
    pub(crate) grpc: SocketAddr,
    pub(crate) bulk: SocketAddr,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    // As the shard's own program does.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    let source = match &args.mapped {
        Some(folder) => Source::ReadOnly(Arc::new(MappedBank::open_step(&folder.join(NAME), START)?)),
        None => {
            let moments = if args.trained { Moments::Own } else { Moments::Shared };
            Source::Live(Arc::new(Live::new(args.sizes.shard(moments)?)))
        }
    };
    let limits = Limits { fetches: args.fetches, ..Limits::default() };
    let (addresses, serving) = start(&args.sizes, source, limits, input_ended()).await?;
    println!("{}", json!({"address": addresses.grpc.to_string(), "weight_bytes": args.sizes.weight_bytes()}));
    serving.await
}

/// Listens, and returns what serves until `shutdown`.
pub(crate) async fn start<F: Future<Output = ()> + Send + 'static>(
    sizes: &Sizes,
    source: Source,
    limits: Limits,
    shutdown: F,
) -> Result<(Addresses, impl Future<Output = Result<()>> + use<F>)> {
    let (listener, bulk) = (TcpListener::bind("127.0.0.1:0").await?, TcpListener::bind("127.0.0.1:0").await?);
    let addresses = Addresses { grpc: listener.local_addr()?, bulk: bulk.local_addr()? };
    let options = ServeOptions {
        identity: sizes.identity(),
        limits,
        compression: Compression::None,
        tls: None,
        tokens: None,
        store: None,
        bulk: Some(bulk),
        http: None,
    };
    Ok((addresses, async move { Ok(serve(source, listener, options, shutdown).await?) }))
}
