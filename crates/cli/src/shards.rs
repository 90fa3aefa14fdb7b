//! Memory banks in shards: `anchorage shard`, `anchorage certs`, and how a run reaches its bank.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use cluster_tree::{ClusterId, ClusterTree};
use corpus::Tokenizer;
use memory_bank::{
    Access, BankOptions, BankStore, BankVersion, Block, BlockSpec, BlockStore, Blocking, Checkpoint,
    LevelStats, LocalBank, MergeOptions, Offload, OnConflict, Placement, Replicated, Shard, ShardOptions,
    Step, Tiered, Traffic,
};
use memory_service::security::certs::{Issue, issue, make_ca};
use memory_service::security::{Role, Tls, TlsFiles};
use memory_service::{Dtype, Identity, RemoteBank, RemoteOptions, Retry};
use serve::memory::{BankSource, Reach, open_tiers};
use shard_host::{BankSection, ShardArgs, ShardConfig};
use train::Attempt;

use crate::config::{Config, environment};
use crate::prepare::Prepared;
use crate::run::hashes;
use crate::training::block_spec;

/// Certificates for development.
#[derive(Subcommand)]
pub(crate) enum CertsCommand {
    /// Make an authority: ca.pem and ca.key.
    Ca {
        /// Folder to write to.
        dir: PathBuf,
    },
    /// Make a certificate and its key, NAME.pem and NAME.key.
    Issue {
        /// Folder of the authority, and of what is written.
        dir: PathBuf,
        /// What its holder may do: worker, shard, reader or admin.
        #[arg(long)]
        role: Role,
        /// Its holder.
        #[arg(long)]
        name: String,
        /// DNS names and IP addresses that a shard is reached by; may be given several times.
        #[arg(long = "host")]
        hosts: Vec<String>,
        /// Days until it expires.
        #[arg(long, default_value_t = 90)]
        days: u32,
    },
}

pub(crate) fn certs(command: CertsCommand) -> Result<()> {
    match command {
        CertsCommand::Ca { dir } => {
            make_ca(&dir)?;
            println!("{}", dir.join("ca.pem").display());
        }
        CertsCommand::Issue { dir, role, name, hosts, days } => {
            let files = issue(&dir, &Issue { role, name, hosts, days })?;
            println!("{} {}", files.cert.display(), files.key.display());
        }
    }
    Ok(())
}

/// Serves one shard of a run's bank, once its corpus is prepared.
pub(crate) fn serve(config: &Config, args: ShardArgs) -> Result<()> {
    if config.train.phase.has_memory() {
        wait_for_corpus(config)?;
    }
    Ok(args.serve(describe(config)?, &environment())?)
}

/// Shards may be started before the first worker, who prepares the corpus unless that is done.
fn wait_for_corpus(config: &Config) -> Result<()> {
    let (dir, join_s) = (&config.corpus.prepared, config.collective.join_s);
    let (begin, mut is_told) = (Instant::now(), false);
    while !corpus::stage_is_finished(dir, "pack")? {
        if begin.elapsed().as_secs() >= join_s {
            let dir = dir.display();
            bail!("{dir}: waited {join_s} s (collective.join_s) for the corpus to be prepared");
        }
        if !std::mem::replace(&mut is_told, true) {
            eprintln!("waiting for the corpus to be prepared in {}", dir.display());
        }
        std::thread::park_timeout(Duration::from_secs(1));
    }
    Ok(())
}

/// What the shards of a run's bank are told; its corpus is prepared, since the bank belongs to its tree.
pub(crate) fn describe(config: &Config) -> Result<ShardConfig> {
    if !config.train.phase.has_memory() {
        bail!("train.phase: expected a phase with memory, found \"anchor\", which has no bank");
    }
    let prepared = Prepared::of(config);
    let tree = ClusterTree::load(&prepared.tree()).context("the run's corpus is not prepared")?;
    let tokenizer = Tokenizer::load(&prepared.dir.join("tokenizer.json"))?;
    let bank = BankSection {
        name: config.memory.bank.clone(),
        seed: config.memory.seed,
        world_size: 1,
        staleness: config.train.staleness,
        spec: block_spec(config, &tree),
        adamw: config.train.memory_adamw(),
        hashes: hashes(&tree, &tokenizer),
    };
    let shard = config.shard.clone();
    Ok(ShardConfig { bank, serve: shard.serve, store: shard.store, offload: shard.offload })
}

/// A run's bank, wherever its blocks are.
pub(crate) enum Bank {
    /// In this process.
    Local(LocalBank),
    /// In shards.
    Remote(RemoteBank),
    /// In shards, and in part here too.
    Replicated(Replicated<RemoteBank>),
    /// Read through tiers.
    Tiered(Tiered),
}

impl Bank {
    /// The shards, if there are any.
    pub(crate) fn remote(&self) -> Option<&RemoteBank> {
        match self {
            Self::Remote(bank) => Some(bank),
            Self::Replicated(bank) => Some(bank.shards()),
            Self::Local(_) | Self::Tiered(_) => None,
        }
    }

    /// What tiers have answered so far, a line for each level; none of a bank that is read without them.
    pub(crate) fn told(&self) -> Vec<String> {
        let Self::Tiered(bank) = self else { return vec![] };
        let of_level = |level: LevelStats| {
            let cached = level.hit_rate().unwrap_or_default() * 100.0;
            let error = match level.max_abs_error {
                0.0 => String::new(),
                error => format!(", numbers off by {error:.1e} at most"),
            };
            format!(
                "memory of level {}: {} blocks asked for, {cached:.1} % in RAM or on disk{error}",
                level.level, level.n_asked
            )
        };
        bank.stats().levels.into_iter().map(of_level).collect()
    }
}

impl BlockStore for Bank {
    fn spec(&self) -> &BlockSpec {
        match self {
            Self::Local(bank) => bank.spec(),
            Self::Remote(bank) => bank.spec(),
            Self::Replicated(bank) => bank.spec(),
            Self::Tiered(bank) => bank.spec(),
        }
    }

    async fn fetch(&self, after: Step, ids: &[ClusterId]) -> memory_bank::Result<Vec<Block>> {
        match self {
            Self::Local(bank) => bank.fetch(after, ids).await,
            Self::Remote(bank) => bank.fetch(after, ids).await,
            Self::Replicated(bank) => bank.fetch(after, ids).await,
            Self::Tiered(bank) => bank.fetch(after, ids).await,
        }
    }

    async fn read(&self, after: Step, ids: &[ClusterId]) -> memory_bank::Result<Vec<Block>> {
        match self {
            Self::Local(bank) => bank.read(after, ids).await,
            Self::Remote(bank) => bank.read(after, ids).await,
            Self::Replicated(bank) => bank.read(after, ids).await,
            Self::Tiered(bank) => bank.read(after, ids).await,
        }
    }

    fn traffic(&self) -> Option<Traffic> {
        match self {
            Self::Local(bank) => bank.traffic(),
            Self::Remote(bank) => bank.traffic(),
            Self::Replicated(bank) => bank.traffic(),
            Self::Tiered(bank) => bank.traffic(),
        }
    }

    async fn push(&self, step: Step, rank: usize, grads: Vec<Block>) -> memory_bank::Result<()> {
        match self {
            Self::Local(bank) => bank.push(step, rank, grads).await,
            Self::Remote(bank) => bank.push(step, rank, grads).await,
            Self::Replicated(bank) => bank.push(step, rank, grads).await,
            Self::Tiered(bank) => bank.push(step, rank, grads).await,
        }
    }

    async fn save(&self, step: Step) -> memory_bank::Result<()> {
        match self {
            Self::Local(bank) => bank.save(step).await,
            Self::Remote(bank) => bank.save(step).await,
            Self::Replicated(bank) => bank.save(step).await,
            Self::Tiered(bank) => bank.save(step).await,
        }
    }
}

/// The shards of a run as its worker of a rank trains on them from `step` on, where they are.
pub(crate) fn train_on_shards(
    config: &Config,
    identity: (BlockSpec, Identity),
    (rank, world_size): (usize, usize),
    (attempt, step): (&Attempt, Step),
) -> Result<Blocking<Bank>> {
    let (spec, hashes) = (identity.0.clone(), identity.1.hashes.clone());
    let options = worker_options(config, identity, (world_size, attempt))?;
    Blocking::open(async {
        let remote = RemoteBank::connect(options).await?;
        let rounds = config.memory.push_dtype == Dtype::Bf16;
        if config.memory.replicated.is_empty() {
            return Ok(Bank::Remote(remote));
        }
        let levels: Vec<bool> =
            (0..spec.n_levels()).map(|level| config.memory.replicated.contains(&level)).collect();
        let copy =
            copy_of(config, memory_bank::Identity { spec, seed: config.memory.seed, hashes }, &levels, step);
        Ok(Bank::Replicated(Replicated::new(remote, copy.await?, (levels, rounds), (rank, world_size))?))
    })
}

/// The blocks of some levels as a worker keeps them beside the shards, from their checkpoint.
async fn copy_of(
    config: &Config,
    identity: memory_bank::Identity,
    levels: &[bool],
    step: Step,
) -> Result<Shard> {
    let options = whole(config, identity.seed);
    if step == Step(0) {
        return Ok(Shard::new(identity.spec, options)?);
    }
    let store = open_store(config, Access::Read, "for the levels of memory.replicated").await?;
    Ok(store.checkpoint(step).await?.load_levels(&identity, options, |level| levels[level]).await?)
}

/// Of a worker, who pushes.
fn worker_options(
    config: &Config,
    identity: (BlockSpec, Identity),
    (world_size, attempt): (usize, &Attempt),
) -> Result<RemoteOptions> {
    let options = remote_options(config, config.memory.shards.clone(), identity)?;
    // A job that goes back waits for the shard that is started again.
    let retry = Retry { most_ms: 250, ..options.retry };
    let cache_bytes = config.memory.cache_mib.saturating_mul(1 << 20);
    Ok(RemoteOptions {
        world_size: Some(world_size),
        attempt: attempt.number(),
        retry,
        cache_bytes,
        ..options
    })
}

/// Where the shards save.
async fn open_store(config: &Config, access: Access, what_for: &str) -> Result<BankStore> {
    let Some(store) = &config.shard.store else {
        bail!("shard.store.url: expected where the shards save, {what_for}, found nothing");
    };
    Ok(shard_host::open_store(store, &config.memory.bank, &environment(), access).await?)
}

/// The bank that the shards have saved at `step`, for a run that goes on without them.
pub(crate) fn take_over(
    config: &Config,
    (spec, options): (BlockSpec, BankOptions),
    step: Step,
) -> Result<LocalBank> {
    tokio::runtime::Runtime::new()?.block_on(async {
        let store = open_store(config, Access::Read, "for a run that goes on without them").await?;
        Ok(LocalBank::resume_from(&store.checkpoint(step).await?, spec, options).await?)
    })
}

/// Puts the bank that a run without shards has saved in `memory` where shards find it, unless it is there: the
/// run goes on with them. All of it is in memory meanwhile, or as much as shard.offload lets it.
pub(crate) fn hand_over(
    config: &Config,
    (spec, identity): (BlockSpec, Identity),
    memory: &Path,
    step: Step,
) -> Result<()> {
    let (seed, hashes) = (config.memory.seed, identity.hashes);
    let identity = memory_bank::Identity { spec, seed, hashes };
    tokio::runtime::Runtime::new()?.block_on(async {
        let saved = Checkpoint::open_folder(memory).await?;
        saved.check_same(&identity)?;
        let store = open_store(config, Access::Write, "for a run that goes on with them").await?;
        if store.steps().await?.contains(&step) {
            if store.checkpoint(step).await?.is_same(&saved) {
                return Ok(());
            }
            // Of a line of checkpoints that the run has left.
            store.discard_after(Step(step.0 - 1)).await?;
        }
        let offload = config.shard.offload.as_ref().map(Offload::open).transpose()?;
        let shard = saved.load_onto(&identity, whole(config, seed), vec![], offload.as_ref()).await?;
        let record = store.write(&identity, shard.snapshot(Step(0)), None).await?;
        store.commit(step, &[record]).await?;
        Ok(())
    })
}

/// Joins banks of jobs with different blocks where the shards of a run find theirs; returns how many blocks.
pub(crate) fn merge(config: &Config, banks: &[PathBuf]) -> Result<u64> {
    tokio::runtime::Runtime::new()?.block_on(async {
        let store = open_store(config, Access::Write, "for the blocks of all jobs").await?;
        let mut checkpoints = vec![];
        for bank in banks {
            checkpoints.push(Checkpoint::open_folder(bank).await?);
        }
        let options = MergeOptions { n_shards: 1, on_conflict: OnConflict::Refuse };
        Ok(memory_bank::merge(&checkpoints, &store, options).await?.1.n_blocks)
    })
}

/// A shard that owns all blocks.
fn whole(config: &Config, seed: u64) -> ShardOptions {
    ShardOptions {
        seed,
        adamw: config.train.memory_adamw(),
        world_size: 1,
        staleness: config.train.staleness,
        placement: Placement::WHOLE,
    }
}

/// The shards, which may have to read their blocks before they serve.
async fn connect_to_all(options: RemoteOptions, join_s: u64) -> Result<RemoteBank> {
    let begin = Instant::now();
    loop {
        match RemoteBank::connect(options.clone()).await {
            Err(error @ memory_bank::Error::Remote { is_transient: true, .. }) => {
                if begin.elapsed().as_secs() > join_s {
                    // What is no error of a shard is final.
                    bail!("memory.shards: waited {join_s} s (collective.join_s): {error}");
                }
                eprintln!("waiting for the shards: {error}");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            connected => return Ok(connected?),
        }
    }
}

async fn until(stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Brings the shards to `step`, as one of a job's workers does before the others ask for anything: they go
/// back to their checkpoint of it, and take nothing of earlier attempts any more. Shards of a run that begins are
/// there already, or not its own.
pub(crate) fn bring_to(
    config: &Config,
    identity: (BlockSpec, Identity),
    job: (usize, &Attempt),
    (step, begins): (Step, bool),
    stop: &AtomicBool,
) -> Result<()> {
    let options = worker_options(config, identity, job)?;
    tokio::runtime::Runtime::new()?.block_on(async {
        let remote = tokio::select! {
            connected = connect_to_all(options, config.collective.join_s) => connected?,
            () = until(stop) => bail!("told to stop"),
        };
        let is_there = remote.is_after(step).await?;
        if begins && !is_there {
            let applied = remote.applied().await?;
            let other = applied.into_iter().enumerate().find(|&(_, found)| found != step);
            let (shard, found) = other.unwrap_or((0, step));
            bail!(
                "shard {shard} of memory.shards: expected step {step} and nothing pushed, for a run that begins, \
                 found step {found}"
            );
        }
        if !is_there {
            remote.restore(Some(step)).await?;
        } else if step == Step(0) {
            // What the run goes back to when a shard is lost before the first checkpoint.
            remote.save(step).await?;
        }
        Ok(())
    })
}

/// The bank of a run that is read, through the tiers of memory.placement: behind its caches the run's own
/// folder if it holds the bank, then shards, then a store.
pub(crate) fn read(
    config: &Config,
    memory: &Path,
    version: BankVersion,
    spec: BlockSpec,
) -> Result<Blocking<Bank>> {
    let tiers = config.memory.placement.clone();
    let folder = memory.join("manifest.json").exists().then(|| memory.to_owned());
    if let Some(folder) = &folder {
        let local = LocalBank::open_read_only(folder)?;
        if local.hashes() != &version.hashes {
            bail!(
                "{}: bank of another tree or tokenizer: expected {:?}, found {:?}",
                memory.display(),
                version.hashes,
                local.hashes()
            );
        }
        if tiers == memory_bank::TierOptions::default() {
            return Ok(Blocking::new(Arc::new(Bank::Local(local)))?);
        }
    } else if tiers.shards.is_empty() && tiers.store.is_none() {
        bail!(
            "{}: found no bank (one that was trained on shards is read with memory.placement.shards or .store)",
            memory.display()
        );
    }
    let (reach, source) = (reach(config)?, BankSource { folder, step: Some(version.step), tiers });
    Blocking::open(async { Ok(Bank::Tiered(open_tiers(&source, &reach, (version, &spec)).await?)) })
}

/// How the shards and the store of a run's bank are reached, wherever they are.
pub(crate) fn reach(config: &Config) -> Result<Reach> {
    let memory = &config.memory;
    let tls = match &memory.tls {
        None => None,
        Some(files) => {
            let shard_host::TlsSection { cert, key, ca } = files.clone();
            Some(Arc::new(Tls::reloading(TlsFiles { cert, key, ca })?))
        }
    };
    let token = match &memory.token_file {
        None => None,
        Some(path) => {
            let text = fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
            Some(text.trim().to_owned())
        }
    };
    Ok(Reach { bank: memory.bank.clone(), tls, token, bulk: memory.bulk, store: environment() })
}

/// Of shards that are trained on.
fn remote_options(
    config: &Config,
    shards: Vec<String>,
    (spec, identity): (BlockSpec, Identity),
) -> Result<RemoteOptions> {
    let push_dtype = config.memory.push_dtype;
    Ok(RemoteOptions { push_dtype, ..reach(config)?.shards(&shards, &spec, &identity.hashes) })
}
