//! Steps of training on the blocks of one random path each, against shards in other processes.

use std::collections::HashMap;
use std::io::Write;

use cluster_tree::ClusterId;
use memory_bank::{Block, BlockSpec, BlockStore, Step};
use memory_service::{RemoteBank, RemoteOptions};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use crate::bank::{SEED, Sizes};
use crate::closed_loop::Result;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Of all shards, in order; they are at step 0.
    #[arg(long, value_delimiter = ',', required = true)]
    shards: Vec<String>,
    #[command(flatten)]
    sizes: Sizes,
    #[arg(long, default_value_t = 1000)]
    steps: u64,
    /// Steps between two lines.
    #[arg(long, default_value_t = 100)]
    every: u64,
}

/// Every so many steps prints how many bytes of rows have been updated so far, and waits for a line of its input
/// while someone looks at the shards. What a step has made of a block is fetched after it; when the block is drawn
/// again it has to be that, wherever it was in between.
pub(crate) async fn run(args: Args) -> Result<()> {
    let (spec, identity) = (args.sizes.spec(), args.sizes.identity());
    let bank = RemoteBank::connect(RemoteOptions::new(args.shards, spec.clone(), identity)).await?;
    let (mut dice, mut known) = (ChaCha8Rng::seed_from_u64(SEED), HashMap::<ClusterId, u32>::new());
    let (mut row_bytes, mut n_again) = (0, 0);
    for step in 1..=args.steps {
        let ids = random_path(&spec, &mut dice);
        let mut blocks = bank.fetch(Step(step - 1), &ids).await?;
        for Block { id, values } in &blocks {
            match known.get(id) {
                None => row_bytes += 3 * size_of_val(values.as_slice()),
                Some(&expected) if expected == checksum(values) => n_again += 1,
                Some(_) => return Err(format!("block {id} at step {step} is not what was left of it").into()),
            }
        }
        // Where weights are 0 gradients are not.
        blocks.iter_mut().flat_map(|block| &mut block.values).for_each(|value| *value = *value * 0.5 + 0.01);
        bank.push(Step(step), 0, blocks).await?;
        for Block { id, values } in bank.fetch(Step(step), &ids).await? {
            known.insert(id, checksum(&values));
        }
        if step % args.every == 0 {
            println!("{}", json!({"step": step, "row_bytes": row_bytes, "seen_again": n_again}));
            std::io::stdout().flush()?;
            std::io::stdin().read_line(&mut String::new())?;
        }
    }
    Ok(())
}

/// The blocks of a leaf that is drawn.
fn random_path(spec: &BlockSpec, dice: &mut ChaCha8Rng) -> Vec<ClusterId> {
    let mut index = 0;
    let chosen: Vec<u32> = spec.branching.iter().map(|&k| dice.random_range(0..k as u32)).collect();
    let mut ids = vec![];
    for (level, (&k, chosen)) in spec.branching.iter().zip(chosen).enumerate() {
        index = index * k as u32 + chosen;
        if spec.width[level] > 0 {
            ids.push(ClusterId { level: level as u8, index });
        }
    }
    ids
}

fn checksum(values: &[f32]) -> u32 {
    crc32c::crc32c(bytemuck::cast_slice(values))
}
