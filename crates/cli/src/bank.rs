//! `anchorage bank`: checkpoints of memory banks, in run folders and stores.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use memory_bank::{
    Access, BankStore, Checkpoint, MemoryKind, MemoryLayers, MergeOptions, OnConflict, Precision, Step,
    StoreOptions,
};
use train::Checkpoints;

use crate::ConfigArgs;
use crate::config::{Config, environment};
use crate::posthoc;
use crate::run::Run;
use crate::shards::describe;

/// A checkpoint is the folder of a run (its newest), a folder `memory`, or a bank in a store, such as
/// s3://bucket/banks/main (its newest) or s3://bucket/banks/main/00001000.
#[derive(Subcommand)]
pub(crate) enum BankCommand {
    /// Blocks, touched blocks, parameters and norms by level.
    Inspect {
        /// The checkpoint.
        bank: String,
    },
    /// Read all of a checkpoint and check every hash.
    Verify {
        /// The checkpoint.
        bank: String,
    },
    /// Compare two checkpoints, by level.
    Diff {
        /// The first.
        first: String,
        /// The second.
        second: String,
    },
    /// Join the banks of jobs on different subtrees into one.
    Merge {
        /// The checkpoints; of one bank and with different blocks updated.
        #[arg(required = true)]
        banks: Vec<String>,
        #[command(flatten)]
        to: To,
        /// Take a block that differs from the first that has it, instead of failing.
        #[arg(long)]
        prefer_first: bool,
    },
    /// Write a checkpoint as another number of shards would. It is restored to any number without; this
    /// leaves one file per shard.
    Reshard {
        /// The checkpoint.
        bank: String,
        #[command(flatten)]
        to: To,
    },
    /// Write a checkpoint's weights as one safetensors file: a tensor a level, `[blocks + 1, layers, 3, r, d]`.
    Export {
        /// The checkpoint.
        bank: String,
        /// The file to write.
        out: PathBuf,
        /// Round the weights to bf16.
        #[arg(long)]
        bf16: bool,
        /// Write a folder to hand over, of a run: the bank with its sizes and its tree, and a model card if the run is
        /// one of `anchorage posthoc`.
        #[arg(long)]
        hand_over: bool,
    },
    /// Print the shard configuration of a run: what `anchorage-shard` reads.
    Describe(ConfigArgs),
}

/// Where a bank is written.
#[derive(clap::Args)]
pub(crate) struct To {
    /// A bank in a store, such as s3://bucket/banks/joined, or a folder.
    #[arg(long)]
    to: String,
    /// Shards that it is written as.
    #[arg(long = "shards", default_value_t = 1)]
    n_shards: usize,
}

pub(crate) fn run(command: BankCommand) -> Result<()> {
    if let BankCommand::Describe(args) = command {
        print!("{}", toml::to_string(&describe(&Config::load(&args.config, &args.set)?)?)?);
        return Ok(());
    }
    if let BankCommand::Export { bank, out, bf16, hand_over: true } = &command {
        return posthoc::hand_over(&Run::open(Path::new(bank))?, out, *bf16);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        match command {
            BankCommand::Inspect { bank } => {
                let checkpoint = open(&bank).await?;
                println!("{bank}");
                inspect(&checkpoint).await?;
            }
            BankCommand::Verify { bank } => {
                let checkpoint = open(&bank).await?;
                let found = memory_bank::verify_checkpoint(&checkpoint).await?;
                println!(
                    "{bank}: whole at step {}: {} blocks in {} files of {} bytes",
                    checkpoint.manifest().step,
                    found.n_blocks,
                    found.n_files,
                    found.bytes
                );
            }
            BankCommand::Diff { first, second } => diff(&open(&first).await?, &open(&second).await?).await?,
            BankCommand::Merge { banks, to, prefer_first } => {
                let mut checkpoints = vec![];
                for bank in &banks {
                    checkpoints.push(open(bank).await?);
                }
                let on_conflict = if prefer_first { OnConflict::PreferFirst } else { OnConflict::Refuse };
                let options = MergeOptions { n_shards: to.n_shards, on_conflict };
                let (_, merged) = memory_bank::merge(&checkpoints, &to.open().await?, options).await?;
                println!(
                    "{}: step {}, {} blocks ({} were the same in several banks, {} differed)",
                    to.to, merged.step, merged.n_blocks, merged.n_same, merged.n_conflicts
                );
            }
            BankCommand::Reshard { bank, to } => {
                let written =
                    memory_bank::reshard(&open(&bank).await?, &to.open().await?, to.n_shards).await?;
                println!("{}: step {} in {} shards", to.to, written.manifest().step, to.n_shards);
            }
            BankCommand::Export { bank, out, bf16, .. } => {
                let precision = if bf16 { Precision::Bf16 } else { Precision::F32 };
                let written = memory_bank::export(&open(&bank).await?, &out, precision).await?;
                println!("{}: {} bytes, sha256 {}", out.display(), written.bytes, written.sha256);
            }
            BankCommand::Describe(_) => {}
        }
        Ok(())
    })
}

/// Opens a checkpoint, wherever it is.
pub(crate) async fn open(bank: &str) -> Result<Checkpoint> {
    let path = Path::new(bank);
    if path.join("config.toml").exists() {
        let checkpoints = Checkpoints::of(path);
        let memory = checkpoints.dir(checkpoints.require_latest()?).join("memory");
        if !memory.is_dir() {
            bail!(
                "{}: expected a memory bank, found none (a run of train.phase = \"anchor\" has no bank)",
                memory.display()
            );
        }
        return Ok(Checkpoint::open_folder(&memory).await?);
    }
    let (root, name) = split(bank)?;
    let step = name.parse().ok().filter(|_| name.len() >= 8).map(Step);
    // The manifest of a step in a store names files of the bank's other steps too.
    if step.is_none() && path.join("manifest.json").exists() {
        return Ok(Checkpoint::open_folder(path).await?);
    }
    let (root, name) = if step.is_some() { split(root)? } else { (root, name) };
    let options = StoreOptions { access: Access::Read, ..StoreOptions::default() };
    let store = BankStore::open_url(root, &environment(), name, options).await?;
    match step {
        Some(step) => Ok(store.checkpoint(step).await?),
        None => store.latest().await?.with_context(|| {
            format!(
                "{bank}: expected a run folder, a folder memory or a bank in a store, found no checkpoint"
            )
        }),
    }
}

impl To {
    async fn open(&self) -> Result<BankStore> {
        let (root, name) = split(&self.to)?;
        Ok(BankStore::open_url(root, &environment(), name, StoreOptions::default()).await?)
    }
}

/// The folder that holds a bank, and the bank's name.
fn split(bank: &str) -> Result<(&str, &str)> {
    let bank = bank.trim_end_matches('/');
    match bank.rsplit_once('/') {
        Some((root, name)) if !root.is_empty() && !root.ends_with('/') => Ok((root, name)),
        None if !bank.is_empty() => Ok((".", bank)),
        _ => bail!("{bank:?}: expected a folder or URL that ends in the bank's name"),
    }
}

async fn diff(first: &Checkpoint, second: &Checkpoint) -> Result<()> {
    println!("step {} against step {}", first.manifest().step, second.manifest().step);
    println!(
        "{:>5} {:>11} {:>11} {:>8} {:>8} {:>10} {:>10}",
        "level", "first alone", "second alone", "equal", "changed", "largest", "rms"
    );
    for level in memory_bank::diff(first, second).await? {
        println!(
            "{:>5} {:>11} {:>11} {:>8} {:>8} {:>10.3e} {:>10.3e}",
            level.level + 1,
            level.only_first,
            level.only_second,
            level.equal,
            level.changed,
            level.max_abs,
            level.rms
        );
    }
    Ok(())
}

async fn inspect(checkpoint: &Checkpoint) -> Result<()> {
    let bank = memory_bank::inspect_checkpoint(checkpoint).await?;
    let spec = &bank.manifest.spec;
    println!("step {}, {} parameters fetched of {}", bank.manifest.step.0, spec.fetch_len(), spec.bank_len());
    // What FFN memory of every layer has always shown stays as it was.
    if spec.kind != MemoryKind::Ffn || spec.layers != MemoryLayers::Uniform {
        println!("kind {}, layers {}", spec.kind, spec.layers);
    }
    for (name, hash) in &bank.manifest.hashes {
        println!("{name} {hash}");
    }
    let added_by = match spec.kind {
        MemoryKind::Ffn => "|M3|",
        MemoryKind::Lora { .. } => "|B|",
        MemoryKind::Kv => "|V|",
    };
    println!(
        "{:>5} {:>6} {:>8} {:>8} {:>14} {:>10} {:>10} {:>10}",
        "level", "width", "blocks", "touched", "parameters", "updates", "most", added_by
    );
    for level in &bank.levels {
        println!(
            "{:>5} {:>6} {:>8} {:>8} {:>14} {:>10.1} {:>10} {:>10.3}",
            level.level + 1,
            spec.width[level.level],
            level.n_blocks,
            level.n_touched,
            level.n_parameters,
            level.mean_updates,
            level.max_updates,
            level.m3_norm
        );
    }
    Ok(())
}
