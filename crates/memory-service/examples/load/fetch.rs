//! Blocks fetched over loopback, into arrays that are used again.

use cluster_tree::ClusterId;
use memory_bank::{Block, Step};
use memory_service::RemoteBank;
use tokio::runtime::Runtime;

use crate::bank::Sizes;
use crate::closed_loop::{Client, Result, answer_lines, check_first, run as measure};

#[derive(clap::Args)]
pub(crate) struct Args {
    address: String,
    #[command(flatten)]
    sizes: Sizes,
    /// Over bulk streams, else over gRPC.
    #[arg(long)]
    bulk: bool,
    #[arg(long)]
    server_pid: u32,
}

/// A bank with one connection, and the block that it fetches into.
pub(crate) struct Fetcher {
    bank: RemoteBank,
    block: [Block; 1],
}

impl Fetcher {
    pub(crate) fn new(bank: RemoteBank, level: u8) -> Self {
        Self { bank, block: [Block { id: ClusterId { level, index: 0 }, values: vec![] }] }
    }
}

impl Client for Fetcher {
    async fn fetch(&mut self, index: u32) -> Result<usize> {
        self.block[0].id.index = index;
        self.bank.fetch_into(Step(0), &mut self.block).await?;
        let values = &self.block[0].values;
        check_first(index, values[0])?;
        Ok(values.len() * size_of::<f32>())
    }
}

pub(crate) async fn fetchers(
    sizes: &Sizes,
    address: &str,
    bulk: bool,
    level: u8,
    clients: usize,
) -> Result<Vec<Fetcher>> {
    let mut made = vec![];
    for _ in 0..clients {
        made.push(Fetcher::new(sizes.connect(address, bulk).await?, level));
    }
    Ok(made)
}

pub(crate) fn run(args: Args, runtime: &Runtime) -> Result<()> {
    answer_lines(|words| {
        let [level, clients, seconds] = words else { return Err("expected LEVEL CLIENTS SECONDS".into()) };
        let (level, clients, seconds) = (level.parse()?, clients.parse()?, seconds.parse()?);
        runtime.block_on(async {
            let clients = fetchers(&args.sizes, &args.address, args.bulk, level, clients).await?;
            measure(clients, seconds, args.server_pid).await
        })
    })
}
