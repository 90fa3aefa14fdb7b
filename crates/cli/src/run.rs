//! A run on disk: its folder, and the parts that a command needs of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anchor::Anchor;
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use cluster_tree::ClusterTree;
use corpus::{Corpus, Tokenizer};
use generate::Model;
use memory_bank::{BankOptions, BlockSpec, Blocking, LocalBank, Step};
use retrieve::Router;
use train::{Assign, Checkpoints, Parts, Phase, StepMetrics, Trainer};

use crate::config::Config;
use crate::prepare::{Prepared, load_embedder};
use crate::progress::Progress;

/// Files that a run copies from its prepared corpus, so that it routes and generates on its own.
const COPIED: [&str; 3] = ["tokenizer.json", "tree.safetensors", "embedder.safetensors"];

const PLACE: (&Device, DType) = (&Device::Cpu, DType::F32);

/// A trained (or partly trained) run, opened to be used.
pub(crate) struct Run {
    pub(crate) dir: PathBuf,
    pub(crate) config: Config,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) tree: ClusterTree,
    pub(crate) anchor: Anchor,
    pub(crate) bank: Option<Blocking<LocalBank>>,
    pub(crate) step: u64,
}

impl Run {
    /// Opens the newest whole checkpoint of the run in `dir`.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("config.toml");
        if !path.exists() {
            bail!("{}: expected a run folder, found no config.toml", dir.display());
        }
        let config = Config::load(&path, &[])?;
        let checkpoints = Checkpoints::of(dir);
        let step = checkpoints.require_latest()?;
        let checkpoint = checkpoints.dir(step);
        let tree = ClusterTree::load(&dir.join("tree.safetensors"))?;
        let tokenizer = Tokenizer::load(&dir.join("tokenizer.json"))?;
        let bank = match config.train.phase.has_memory() {
            true => Some(open_bank(&checkpoint.join("memory"), &hashes(&tree, &tokenizer))?),
            false => None,
        };
        let anchor = Anchor::load(&checkpoint.join("anchor.safetensors"), PLACE)?.freeze();
        let expected = config.anchor.config(tokenizer.vocab_size());
        if *anchor.config() != expected {
            bail!(
                "{}: anchor of another run: expected {expected:?}, found {:?}",
                checkpoint.display(),
                anchor.config()
            );
        }
        Ok(Self { dir: dir.into(), config, tokenizer, tree, anchor, bank, step })
    }

    pub(crate) fn model(&self) -> Model<'_, LocalBank> {
        Model { anchor: &self.anchor, bank: self.bank.as_ref(), step: Step(self.step) }
    }

    /// The router of this run's tree.
    pub(crate) fn router(&self) -> Result<Router> {
        let embedder = load_embedder(&self.config, &self.dir.join("embedder.safetensors"))?;
        Ok(Router::new(embedder, self.tree.clone(), self.config.tree.beam)?)
    }

    /// The prepared corpus that this run was trained on.
    pub(crate) fn corpus(&self) -> Result<Corpus> {
        let corpus = Corpus::open(&self.config.corpus.prepared)?;
        corpus.check_tokenizer(&self.tokenizer)?;
        Ok(corpus)
    }

    /// Whether its memory is the control that is trained on every token.
    pub(crate) fn is_always_on(&self) -> bool {
        self.config.train.phase.has_memory() && self.config.train.assign == Assign::AlwaysOn
    }
}

fn open_bank(dir: &Path, expected: &BTreeMap<String, String>) -> Result<Blocking<LocalBank>> {
    let bank = LocalBank::open_read_only(dir)?;
    if bank.hashes() != expected {
        bail!(
            "{}: bank of another tree or tokenizer: expected {expected:?}, found {:?}",
            dir.display(),
            bank.hashes()
        );
    }
    Ok(Blocking::new(Arc::new(bank))?)
}

/// What a bank belongs to.
fn hashes(tree: &ClusterTree, tokenizer: &Tokenizer) -> BTreeMap<String, String> {
    BTreeMap::from([("tree".into(), tree.hash()), ("tokenizer".into(), tokenizer.hash().into())])
}

/// Trains the run of `config` on its prepared corpus, from its newest checkpoint if it has one.
pub(crate) fn train(config: &Config, prepared: &Prepared) -> Result<()> {
    let dir = &config.run.dir;
    begin(config, prepared)?;
    let tokenizer = Tokenizer::load(&dir.join("tokenizer.json"))?;
    let tree = ClusterTree::load(&dir.join("tree.safetensors"))?;
    let corpus = Arc::new(Corpus::open(&prepared.dir)?);
    corpus.check_tokenizer(&tokenizer)?;
    let checkpoints = Checkpoints::of(dir);
    let resumed = checkpoints.latest()?;
    let anchor = initial_anchor(config, &tokenizer, resumed.map(|step| checkpoints.dir(step)))?;
    let n_parameters = anchor.config().n_parameters();
    let spec = block_spec(config, &tree);
    let memory = match config.train.phase.has_memory() {
        true => {
            let memory = resumed.map(|step| checkpoints.dir(step).join("memory"));
            let options = BankOptions {
                seed: config.memory.seed,
                adamw: config.train.memory_adamw(),
                world_size: 1,
                checkpoint_root: checkpoints.root().into(),
                hashes: hashes(&tree, &tokenizer),
            };
            let bank = match memory {
                Some(memory) => LocalBank::resume(&memory, spec.clone(), options)?,
                None => LocalBank::create(spec.clone(), options)?,
            };
            Some(Blocking::new(Arc::new(bank))?)
        }
        false => None,
    };
    let parts = Parts { run_dir: dir.clone(), config: config.train.clone(), corpus, anchor, memory };
    let mut trainer = match resumed {
        Some(step) => Trainer::resume(parts, step)?,
        None => Trainer::new(parts)?,
    };
    let name = dir.file_name().map_or("train".into(), |name| name.to_string_lossy().into_owned());
    if trainer.state().step >= config.train.steps {
        eprintln!("{name:>18}: trained already ({} steps)", config.train.steps);
        return Ok(());
    }
    let mut progress = Progress::new(&name, config.train.steps);
    let mut last = StepMetrics::default();
    trainer.run(&mut |metrics| {
        if metrics.tokens_per_s > 0.0 {
            last = metrics.clone();
        }
        progress.set(metrics.step, config.train.steps, || {
            format!("loss {:.3} {:.0} tokens/s", metrics.loss, last.tokens_per_s)
        });
    })?;
    let memory = match config.train.phase.has_memory() {
        true => format!(" + {} fetched of a bank of {}", spec.fetch_len(), spec.bank_len()),
        false => String::new(),
    };
    let rate = last.tokens_seen as f64 / last.seconds.max(1e-9);
    progress.finish(format!(
        "{n_parameters} parameters{memory}, {} tokens, loss {:.4}{}, {rate:.0} tokens/s",
        last.tokens_seen,
        last.loss,
        last.validation_loss.map_or(String::new(), |loss| format!(", held out {loss:.4}")),
    ));
    Ok(())
}

/// Makes the run folder, or checks that it was made with the same configuration.
fn begin(config: &Config, prepared: &Prepared) -> Result<()> {
    let dir = &config.run.dir;
    fs::create_dir_all(dir).with_context(|| format!("{}", dir.display()))?;
    let path = dir.join("config.toml");
    let mut resolved = config.clone();
    resolved.run.version = Some(env!("CARGO_PKG_VERSION").into());
    if path.exists() {
        let before = Config::load(&path, &[])?;
        check_same(&path, &before, config)?;
    } else {
        write_whole(&path, resolved.to_toml()?.as_bytes())?;
    }
    for name in COPIED {
        let (from, to) = (prepared.dir.join(name), dir.join(name));
        match fs::read(&from) {
            Ok(bytes) => write_whole(&to, &bytes)?,
            // Only the hashed embedder is a file of its own; the others a run cannot do without.
            Err(_) if name == "embedder.safetensors" => {}
            Err(e) => return Err(e).with_context(|| format!("{}", from.display())),
        }
    }
    Ok(())
}

/// A run goes on only with the configuration it began with; what is only reported may change.
fn check_same(path: &Path, before: &Config, now: &Config) -> Result<()> {
    let decisive = |config: &Config| -> Result<BTreeMap<String, String>> {
        let table: toml::Table = toml::from_str(&config.to_toml()?)?;
        let mut keys = BTreeMap::new();
        for section in ["corpus", "embed", "tree", "anchor", "memory", "train"] {
            for (key, value) in table.get(section).and_then(toml::Value::as_table).into_iter().flatten() {
                let reported = ["log_every", "save_every", "keep", "validate_every", "validate_sequences"];
                if !(section == "train" && reported.contains(&key.as_str())) {
                    keys.insert(format!("{section}.{key}"), value.to_string());
                }
            }
        }
        Ok(keys)
    };
    let (before, now) = (decisive(before)?, decisive(now)?);
    for key in before.keys().chain(now.keys()) {
        if before.get(key) != now.get(key) {
            let show = |value: Option<&String>| value.map_or("nothing".to_string(), Clone::clone);
            bail!(
                "{}: {key} was {} when the run began and is {} now; use another run.dir, or remove this one",
                path.display(),
                show(before.get(key)),
                show(now.get(key))
            );
        }
    }
    Ok(())
}

pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    atomic_file::write(path, bytes).with_context(|| format!("{}", path.display()))
}

/// The anchor of the checkpoint to resume, of the run to begin with, or a new one.
fn initial_anchor(config: &Config, tokenizer: &Tokenizer, resumed: Option<PathBuf>) -> Result<Anchor> {
    let expected = config.anchor.config(tokenizer.vocab_size());
    let checkpoint = match (resumed, &config.anchor.init) {
        (Some(checkpoint), _) => checkpoint,
        (None, Some(init)) => {
            let checkpoints = Checkpoints::of(init);
            checkpoints.dir(checkpoints.require_latest()?)
        }
        (None, None) => {
            if matches!(config.train.phase, Phase::Frozen) {
                bail!("anchor.init: expected a trained run (train.phase = \"frozen\"), found nothing");
            }
            return Ok(Anchor::new(expected, config.train.seed, PLACE)?);
        }
    };
    let path = checkpoint.join("anchor.safetensors");
    let anchor = Anchor::load(&path, PLACE)?;
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
    BlockSpec {
        kind: config.memory.kind,
        n_layers: config.anchor.n_layers,
        d_model: config.anchor.d_model,
        width: config.memory.width.clone(),
        branching: (0..tree.n_levels()).map(|level| tree.branching(level)).collect(),
    }
}
