//! Steps of training against a shard in another process, whose memory is looked at afterwards.

use std::time::Instant;

use memory_bank::{Block, BlockStore, Step};
use memory_service::Retry;
use serde_json::json;

use crate::bank::{START, Sizes};
use crate::closed_loop::Result;

#[derive(clap::Args)]
pub(crate) struct Args {
    address: String,
    #[command(flatten)]
    sizes: Sizes,
    #[arg(long, default_value_t = 40)]
    steps: u64,
    /// Blocks of a step.
    #[arg(long, default_value_t = 16)]
    blocks: usize,
    /// Clients that fetch all the while.
    #[arg(long, default_value_t = 2)]
    readers: usize,
}

/// Blocks of all levels are in each batch, and all blocks in some: it shares no factor with the banks' numbers.
const STRIDE: usize = 37;

/// Steps go over the bulk stream and over gRPC in turn, and through all blocks. Readers hold blocks while they are
/// updated, so some are copied.
pub(crate) async fn run(args: Args) -> Result<()> {
    let connect = |bulk| args.sizes.connect_by(&args.address, bulk, 1, Retry::default());
    let banks = [connect(true).await?, connect(false).await?];
    let ids = args.sizes.ids();
    let readers: Vec<_> = (0..args.readers)
        .map(|reader| {
            let (bank, ids) = (banks[reader % 2].clone(), ids.clone());
            tokio::spawn(async move {
                for place in (reader * 5..).step_by(7) {
                    bank.fetch(Step(0), &ids[place % ids.len()..][..1]).await?;
                }
                Ok::<_, memory_bank::Error>(())
            })
        })
        .collect();
    let (start, mut place) = (Instant::now(), 0);
    for step in START.0 + 1..=START.0 + args.steps {
        let bank = &banks[step as usize % 2];
        let batch: Vec<_> =
            (0..args.blocks.min(ids.len())).map(|i| ids[(place + i) * STRIDE % ids.len()]).collect();
        place += batch.len();
        let mut blocks = bank.fetch(Step(step - 1), &batch).await?;
        blocks.iter_mut().for_each(|Block { values, .. }| values.fill(0.01));
        bank.push(Step(step), 0, blocks).await?;
    }
    let seconds = start.elapsed().as_secs_f64();
    for reader in readers {
        if reader.is_finished() {
            reader.await??;
        } else {
            reader.abort();
        }
    }
    let (blocks, of) = (place.min(ids.len()), ids.len());
    println!("{}", json!({"steps": args.steps, "seconds": seconds, "updated_blocks": blocks, "blocks": of}));
    Ok(())
}
