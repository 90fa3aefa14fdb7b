//! A run on disk: its folder, and the parts that a command needs of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anchor::Anchor;
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use cluster_tree::ClusterTree;
use corpus::{Corpus, Fingerprint, Tokenizer};
use embed::Embedder;
use generate::Model;
use memory_bank::{BankVersion, Blocking, Identity, Step};
use retrieve::Retriever;
use train::{Assign, Checkpoints, TrainState};

use crate::config::Config;
use crate::prepare::{load_embedder, tree_hash};
use crate::routing;
use crate::shards::{self, Bank};
use crate::training::block_spec;

/// Where models run: the first GPU of a build with the feature `cuda`, else the CPU.
pub(crate) fn device() -> Result<Device> {
    device_of(0)
}

/// Where a machine's worker of a rank runs: each has a GPU of its own.
pub(crate) fn device_of(local_rank: usize) -> Result<Device> {
    match cfg!(feature = "cuda") {
        // With a stream of its own: the default one is another for every thread.
        true => Device::new_cuda_with_stream(local_rank)
            .with_context(|| format!("GPU {local_rank}, which a build with the feature cuda runs on")),
        false => Ok(Device::Cpu),
    }
}

/// A trained (or partly trained) run, opened to be used.
pub(crate) struct Run {
    pub(crate) dir: PathBuf,
    pub(crate) config: Config,
    /// The corpus it was trained on.
    pub(crate) fingerprint: Fingerprint,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) tree: Arc<ClusterTree>,
    pub(crate) anchor: Anchor,
    pub(crate) bank: Option<Blocking<Bank>>,
    pub(crate) state: TrainState,
}

impl Run {
    /// Opens the newest whole checkpoint of the run in `dir`, with what [eval], [retrieve] and [memory] of
    /// `set` say.
    pub(crate) fn open_with(dir: &Path, set: &[String]) -> Result<Self> {
        let mut run = Self::open_without_bank(dir, set, &device()?)?;
        if run.config.train.phase.has_memory() {
            let identity = run.identity();
            let version =
                BankVersion { step: Step(run.state.step), seed: identity.seed, hashes: identity.hashes };
            run.bank = Some(shards::read(&run.config, &run.memory_folder(), version, identity.spec)?);
        }
        Ok(run)
    }

    /// As [`Run::open_with`], its anchor on a device and its bank left where it is.
    pub(crate) fn open_without_bank(dir: &Path, set: &[String], device: &Device) -> Result<Self> {
        let path = dir.join("config.toml");
        if !path.exists() {
            bail!("{}: expected a run folder, found no config.toml", dir.display());
        }
        let config = Config::load(&path, set)?;
        let checkpoints = Checkpoints::of(dir);
        let step = checkpoints.require_latest()?;
        let checkpoint = checkpoints.dir(step);
        let fingerprint = Fingerprint::load(dir)?;
        let tree = Arc::new(ClusterTree::load(&dir.join("tree.safetensors"))?);
        let tokenizer = Tokenizer::load(&dir.join("tokenizer.json"))?;
        for (file, expected, found) in [
            ("tree.safetensors", &fingerprint.tree, &tree_hash(&tree, config.tree.beam)),
            ("tokenizer.json", &fingerprint.tokenizer, &tokenizer.hash().to_string()),
        ] {
            if expected != found {
                bail!("{}: expected the hash {expected}, found {found}", dir.join(file).display());
            }
        }
        let anchor = Anchor::load(&checkpoint.join("anchor.safetensors"), (device, DType::F32))?.freeze();
        let expected = config.anchor.config(tokenizer.vocab_size());
        if *anchor.config() != expected {
            bail!(
                "{}: anchor of another run: expected {expected:?}, found {:?}",
                checkpoint.display(),
                anchor.config()
            );
        }
        config.check_vocabulary(&tokenizer)?;
        let state = checkpoints.state(step)?;
        Ok(Self { dir: dir.into(), config, fingerprint, tokenizer, tree, anchor, bank: None, state })
    }

    /// What its bank is.
    pub(crate) fn identity(&self) -> Identity {
        let (seed, hashes) = (self.config.memory.seed, hashes(&self.tree, &self.tokenizer));
        Identity { spec: block_spec(&self.config, &self.tree), seed, hashes }
    }

    /// Where the bank of its checkpoint is, unless it is on shards or in a store.
    pub(crate) fn memory_folder(&self) -> PathBuf {
        Checkpoints::of(&self.dir).dir(self.state.step).join("memory")
    }

    pub(crate) fn open(dir: &Path) -> Result<Self> {
        Self::open_with(dir, &[])
    }

    pub(crate) fn model(&self) -> Model<'_, Bank> {
        Model { anchor: &self.anchor, bank: self.bank.as_ref(), step: Step(self.state.step) }
    }

    /// Says how often the memory that was asked for was near, where it is read through tiers.
    pub(crate) fn tell_tiers(&self) {
        let told = self.bank.iter().flat_map(|bank| bank.store().told());
        told.for_each(|line| eprintln!("{line}"));
    }

    /// What takes a text to its memory, as [retrieve] says.
    pub(crate) fn retriever(&self) -> Result<Retriever> {
        let router = routing::router(self, self.config.retrieve.router)?;
        Ok(Retriever::new(self.embedder()?, router)?)
    }

    /// The embedder of this run's tree.
    pub(crate) fn embedder(&self) -> Result<Box<dyn Embedder>> {
        let embedder = load_embedder(&self.config, &self.dir.join("embedder.safetensors"))?;
        if embedder.fingerprint() != self.fingerprint.embedder {
            bail!(
                "{}: the embedder is not that of the tree: expected the hash {}, found {}",
                self.dir.display(),
                self.fingerprint.embedder,
                embedder.fingerprint()
            );
        }
        Ok(embedder)
    }

    /// The prepared corpus that this run was trained on.
    pub(crate) fn corpus(&self) -> Result<Corpus> {
        let prepared = &self.config.corpus.prepared;
        let corpus = Corpus::open(prepared)?;
        self.fingerprint.compare(corpus.fingerprint()).with_context(|| {
            format!("{} was trained on another {}", self.dir.display(), prepared.display())
        })?;
        Ok(corpus)
    }

    /// Whether its memory is the control that is trained on every token.
    pub(crate) fn is_always_on(&self) -> bool {
        self.config.train.phase.has_memory() && self.config.train.assign == Assign::AlwaysOn
    }
}

/// What a bank belongs to.
pub(crate) fn hashes(tree: &ClusterTree, tokenizer: &Tokenizer) -> BTreeMap<String, String> {
    BTreeMap::from([("tree".into(), tree.hash()), ("tokenizer".into(), tokenizer.hash().into())])
}

pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    atomic_file::write(path, bytes).with_context(|| format!("{}", path.display()))
}
