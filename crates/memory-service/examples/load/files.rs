//! Banks on the disk: how fast one is saved, and how soon one that is there answers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use cluster_tree::ClusterId;
use memory_bank::{BankStore, BlockStore, Gradients, Identity, Live, Step, StoreOptions};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::bank::{Moments, NAME, SEED, START, Sizes};
use crate::closed_loop::{Result, answer_lines, check_first};

#[derive(clap::Args)]
pub(crate) struct Save {
    folder: PathBuf,
    #[command(flatten)]
    sizes: Sizes,
}

#[derive(clap::Args)]
pub(crate) struct Make {
    folder: PathBuf,
    #[command(flatten)]
    sizes: Sizes,
}

#[derive(clap::Args)]
pub(crate) struct First {
    #[command(flatten)]
    sizes: Sizes,
    #[arg(long)]
    bulk: bool,
}

/// Each line saves the whole bank, as of another step, and commits it; what was saved before is removed afterwards.
pub(crate) fn save(args: Save, runtime: &Runtime) -> Result<()> {
    let live = Live::new(args.sizes.shard(Moments::Own)?);
    let store = runtime.block_on(open(&args.folder))?;
    let mut step = START;
    answer_lines(|_| {
        step = Step(step.0 + 1);
        live.push(step, 0, Gradients::default())?;
        runtime.block_on(async {
            let (stall, seconds) = write(&store, &args.sizes, &live, step).await?;
            // What was there before is gone once this returns.
            store.keep(1).await?;
            Ok(json!({"seconds": seconds, "stall": stall, "bytes": bytes_below(&args.folder)?}))
        })
    })
}

pub(crate) async fn make(args: Make) -> Result<()> {
    let live = Live::new(args.sizes.shard(Moments::Own)?);
    let (_, seconds) = write(&open(&args.folder).await?, &args.sizes, &live, START).await?;
    println!("{}", json!({"seconds": seconds, "weight_bytes": args.sizes.weight_bytes()}));
    Ok(())
}

/// Each line is the address of a shard that has just begun.
pub(crate) fn first(args: First, runtime: &Runtime) -> Result<()> {
    answer_lines(|words| {
        let [address] = words else { return Err("expected ADDRESS".into()) };
        let start = Instant::now();
        runtime.block_on(async {
            let bank = args.sizes.connect(address, args.bulk).await?;
            let blocks = bank.fetch(Step(0), &[ClusterId { level: 0, index: 3 }]).await?;
            check_first(3, blocks[0].values[0])?;
            Ok::<Value, _>(json!({"seconds": start.elapsed().as_secs_f64()}))
        })
    })
}

async fn open(folder: &Path) -> Result<BankStore> {
    let url = folder.to_str().ok_or("the folder's name is not UTF-8")?;
    Ok(BankStore::open_url(url, &[], NAME, StoreOptions::default()).await?)
}

/// Both phases of a save of all blocks; returns the seconds for which it kept a push waiting, and those that it took.
async fn write(store: &BankStore, sizes: &Sizes, live: &Live, step: Step) -> Result<(f64, f64)> {
    let identity = Identity { spec: sizes.spec(), seed: SEED, hashes: BTreeMap::new() };
    let start = Instant::now();
    let snapshot = live.snapshot(step, Step(0))?;
    let stall = start.elapsed().as_secs_f64();
    let record = store.write(&identity, snapshot, None).await?;
    store.commit(step, &[record]).await?;
    Ok((stall, start.elapsed().as_secs_f64()))
}

fn bytes_below(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        bytes +=
            if entry.file_type()?.is_dir() { bytes_below(&entry.path())? } else { entry.metadata()?.len() };
    }
    Ok(bytes)
}
