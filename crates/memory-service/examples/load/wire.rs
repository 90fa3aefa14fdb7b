//! Bytes that a batch costs: those of its blocks as the client counts them, and those that arrive at a socket.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cluster_tree::ClusterId;
use memory_bank::{Block, BlockStore, Live, Step};
use memory_service::{Limits, Source};
use rand::{RngExt, SeedableRng};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::bank::{Moments, Sizes};
use crate::closed_loop::Result;
use crate::serve::{Addresses, start};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    sizes: Sizes,
    /// Sequences of a batch.
    #[arg(long, default_value_t = 256)]
    sequences: usize,
}

/// The clients connect to another address of this machine, where bytes are counted and passed on: the bulk stream is
/// opened at the port that the shard names, of the host that the client knows.
pub(crate) async fn run(args: Args) -> Result<()> {
    let shard = args.sizes.shard(Moments::Shared)?;
    let source = Source::Live(Arc::new(Live::new(shard)));
    let (addresses, serving) = start(&args.sizes, source, Limits::default(), std::future::pending()).await?;
    tokio::spawn(serving);
    let Addresses { grpc, bulk } = addresses;
    let arrived = Arc::new(AtomicU64::new(0));
    for to in [grpc, bulk] {
        let listener = TcpListener::bind(("127.0.0.2", to.port())).await?;
        tokio::spawn(count(listener, to, Arc::clone(&arrived)));
    }
    let spec = args.sizes.spec();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let mut batch = vec![];
    for _ in 0..args.sequences {
        // A path down the tree: each cluster is a child of the one before.
        let mut index = 0;
        for level in 0..spec.n_levels() {
            let k = spec.branching[level] as u32;
            index = index * k + rng.random_range(0..k);
            batch.push(ClusterId { level: level as u8, index });
        }
    }
    // What training asks for: each block once, whichever sequences share it.
    let unique: Vec<ClusterId> = batch.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
    let n_bytes = |ids: &[ClusterId]| -> usize {
        ids.iter().map(|id| spec.block_len(usize::from(id.level)) * size_of::<f32>()).sum()
    };
    let mut line = json!({"paths_bytes": n_bytes(&batch), "unique_bytes": n_bytes(&unique)});
    for (name, over_bulk) in [("bulk", true), ("grpc", false)] {
        let bank = args.sizes.connect(&format!("127.0.0.2:{}", grpc.port()), over_bulk).await?;
        // The connections are open before bytes count.
        bank.fetch(Step(0), &unique[..1]).await?;
        let (before, at_socket) = (bank.stats().received_bytes, arrived.load(Ordering::Relaxed));
        let blocks: Vec<Block> = bank.fetch(Step(0), &unique).await?;
        line[name] = json!({
            "blocks": blocks.len(),
            "received_bytes": bank.stats().received_bytes - before,
            "socket_bytes": arrived.load(Ordering::Relaxed) - at_socket,
        });
    }
    println!("{line}");
    Ok(())
}

/// Passes connections on, and counts what comes back.
async fn count(listener: TcpListener, to: SocketAddr, arrived: Arc<AtomicU64>) -> std::io::Result<()> {
    loop {
        let (client, _) = listener.accept().await?;
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = TcpStream::connect(to).await?.into_split();
        tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
        let arrived = Arc::clone(&arrived);
        tokio::spawn(async move {
            let mut buffer = vec![0; 1 << 18];
            loop {
                let n = from_server.read(&mut buffer).await?;
                if n == 0 {
                    return to_client.shutdown().await;
                }
                arrived.fetch_add(n as u64, Ordering::Relaxed);
                to_client.write_all(&buffer[..n]).await?;
            }
        });
    }
}
