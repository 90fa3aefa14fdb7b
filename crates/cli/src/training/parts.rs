//! What a worker trains with: corpus, anchor and bank, as the configuration and the checkpoint say.

use std::path::Path;
use std::sync::Arc;

use anchor::Anchor;
use anyhow::{Result, bail};
use candle_core::{DType, Device};
use cluster_tree::ClusterTree;
use corpus::{Corpus, Tokenizer};
use launch::Ranks;
use memory_bank::{BankOptions, BlockSpec, Blocking, LocalBank, Step};
use memory_service::Identity;
use train::{Attempt, Checkpoints};

use super::folder::belongings;
use crate::checkpoint;
use crate::config::Config;
use crate::prepare::Prepared;
use crate::run::{device_of, hashes};
use crate::shards::{self, Bank};

/// What all workers of an attempt begin with.
#[derive(Clone)]
pub(super) struct Start {
    pub(super) attempt: Attempt,
    /// The checkpoint that all go on from.
    pub(super) resumed: Option<u64>,
}

/// What a worker trains with.
pub(super) struct Assembled {
    pub(super) start: Start,
    pub(super) tokens_before: u64,
    pub(super) corpus: Arc<Corpus>,
    pub(super) anchor: Anchor,
    pub(super) memory: Option<Blocking<Bank>>,
    /// Levels of which every worker has a copy.
    pub(super) replicated: Vec<bool>,
    /// A line about the parameters.
    pub(super) sizes: String,
}

/// Whether the bank of a run is with shards while it is trained.
pub(super) fn on_shards(config: &Config) -> bool {
    config.train.phase.has_memory() && !config.memory.shards.is_empty()
}

impl Assembled {
    /// Opens all that the worker of `ranks` trains with, from a checkpoint or from the beginning.
    pub(super) fn open(config: &Config, ranks: &Ranks, start: Start) -> Result<Self> {
        let resumed = start.resumed;
        let (tree, tokenizer) = belongings(config)?;
        let corpus = Arc::new(Corpus::open(&Prepared::of(config).dir)?);
        corpus.check_tokenizer(&tokenizer)?;
        config.check_vocabulary(&tokenizer)?;
        let device = device_of(ranks.local_rank)?;
        let (anchor, tokens_before) = match resumed {
            Some(step) => {
                let checkpoint = Checkpoints::of(&config.run.dir).dir(step);
                (load_anchor(config, &tokenizer, (&checkpoint, &device))?, 0)
            }
            None => initial_anchor(config, &tokenizer, &device)?,
        };
        let spec = block_spec(config, &tree);
        let memory = match (config.train.phase.has_memory(), on_shards(config)) {
            (false, _) => None,
            (true, true) => {
                let (place, step) = ((ranks.rank, ranks.world_size), Step(resumed.unwrap_or(0)));
                let identity = bank_identity(config, &tree, &tokenizer);
                Some(shards::train_on_shards(config, identity, place, (&start.attempt, step))?)
            }
            (true, false) => Some(own_bank(config, (&tree, &tokenizer), &start)?),
        };
        let sizes_of_memory = match memory {
            Some(_) => format!(" + {} fetched of a bank of {}", spec.fetch_len(), spec.bank_len()),
            None => String::new(),
        };
        let sizes = format!("{} parameters{sizes_of_memory}", anchor.config().n_parameters());
        let is_replicated = |level| !on_shards(config) || config.memory.replicated.contains(&level);
        let replicated = (0..spec.n_levels()).map(is_replicated).collect();
        Ok(Self { start, tokens_before, corpus, anchor, memory, replicated, sizes })
    }
}

/// What the shards of a run must be.
pub(super) fn bank_identity(
    config: &Config,
    tree: &ClusterTree,
    tokenizer: &Tokenizer,
) -> (BlockSpec, Identity) {
    let spec = block_spec(config, tree);
    let identity = Identity::new(&config.memory.bank, &spec, hashes(tree, tokenizer));
    (spec, identity)
}

/// The bank of a run that keeps it in its own process.
pub(super) fn own_bank(
    config: &Config,
    (tree, tokenizer): (&ClusterTree, &Tokenizer),
    start: &Start,
) -> Result<Blocking<Bank>> {
    let checkpoints = Checkpoints::of(&config.run.dir);
    let spec = block_spec(config, tree);
    let options = BankOptions {
        seed: config.memory.seed,
        adamw: config.train.memory_adamw(),
        world_size: 1,
        staleness: config.train.staleness,
        checkpoint_root: start.attempt.dir(),
        offload: config.shard.offload.clone(),
        hashes: hashes(tree, tokenizer),
    };
    let bank = match start.resumed {
        Some(step) => {
            let memory = checkpoints.dir(step).join("memory");
            // One that was saved by shards is with them.
            match memory.exists() || config.shard.store.is_none() {
                true => LocalBank::resume(&memory, spec, options)?,
                false => shards::take_over(config, (spec, options), Step(step))?,
            }
        }
        None => LocalBank::create(spec, options)?,
    };
    Ok(Blocking::new(Arc::new(Bank::Local(bank)))?)
}

/// The anchor of `anchor.checkpoint`, of `anchor.init` or a new one, and the tokens it was trained on.
fn initial_anchor(config: &Config, tokenizer: &Tokenizer, device: &Device) -> Result<(Anchor, u64)> {
    if let Some(checkpoint) = &config.anchor.checkpoint {
        let (anchor, tokens) = checkpoint::open(checkpoint, device)?;
        let sizes = config.anchor.config(tokenizer.vocab_size());
        if *anchor.config() != sizes {
            bail!(
                "anchor.checkpoint: {}: expected {sizes:?}, found {:?}",
                checkpoint.display(),
                anchor.config()
            );
        }
        eprintln!("{:>18}: {}", "anchor.checkpoint", checkpoint.display());
        return Ok((anchor, tokens));
    }
    let Some(init) = &config.anchor.init else {
        let sizes = config.anchor.config(tokenizer.vocab_size());
        return Ok((Anchor::new(sizes, config.train.seed, (device, DType::F32))?, 0));
    };
    let checkpoints = Checkpoints::of(init);
    let step = checkpoints.require_latest()?;
    let anchor = load_anchor(config, tokenizer, (&checkpoints.dir(step), device))?;
    let path = init.join("tokenizer.json");
    let (expected, found) = (tokenizer.hash(), Tokenizer::load(&path)?);
    if found.hash() != expected {
        bail!(
            "{}: tokenizer of another corpus: expected the hash {expected}, found {}",
            path.display(),
            found.hash()
        );
    }
    let state = checkpoints.state(step)?;
    let tokens = state.tokens_before + state.tokens_seen;
    eprintln!("{:>18}: {} at step {step}, {tokens} tokens", "anchor.init", init.display());
    Ok((anchor, tokens))
}

fn load_anchor(
    config: &Config,
    tokenizer: &Tokenizer,
    (checkpoint, device): (&Path, &Device),
) -> Result<Anchor> {
    let expected = config.anchor.config(tokenizer.vocab_size());
    let path = checkpoint.join("anchor.safetensors");
    let anchor = Anchor::load(&path, (device, DType::F32))?;
    if *anchor.config() != expected {
        bail!(
            "{}: anchor of another shape: expected {expected:?}, found {:?}",
            path.display(),
            anchor.config()
        );
    }
    Ok(anchor)
}

pub(crate) fn block_spec(config: &Config, tree: &ClusterTree) -> BlockSpec {
    config.block_spec((0..tree.n_levels()).map(|level| tree.branching(level)).collect())
}
