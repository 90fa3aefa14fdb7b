//! `anchorage train`: a run folder made or gone on with.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use anchor::Anchor;
use anyhow::{Context, Result, bail};
use candle_core::DType;
use cluster_tree::ClusterTree;
use corpus::{Corpus, Fingerprint, Tokenizer};
use memory_bank::{BankOptions, BlockSpec, Blocking, LocalBank, Step};
use memory_service::Identity;
use train::{Checkpoints, Parts, StepMetrics, Trainer, Workers};

use crate::config::Config;
use crate::prepare::Prepared;
use crate::progress::Progress;
use crate::run::{device, hashes, write_whole};
use crate::shards::{self, Bank};

/// Files that a run copies from its prepared corpus, so that it routes and generates on its own.
const COPIED: [&str; 4] = ["tokenizer.json", "tree.safetensors", "fingerprint.json", EMBEDDER];

/// Only the hashed embedder is a file of the prepared corpus.
const EMBEDDER: &str = "embedder.safetensors";

/// Trains the run of `config` on its prepared corpus, from its newest checkpoint if it has one.
pub(crate) fn train(config: &Config, prepared: &Prepared) -> Result<()> {
    let dir = &config.run.dir;
    fs::create_dir_all(dir).with_context(|| format!("{}", dir.display()))?;
    let Some(_held) = atomic_file::lock(dir).with_context(|| format!("{}", dir.display()))? else {
        bail!("{}: another process is training this run", dir.display());
    };
    let checkpoints = Checkpoints::of(dir);
    let resumed = checkpoints.latest()?;
    begin(config, prepared, resumed)?;
    let tokenizer = Tokenizer::load(&dir.join("tokenizer.json"))?;
    let tree = ClusterTree::load(&dir.join("tree.safetensors"))?;
    let corpus = Arc::new(Corpus::open(&prepared.dir)?);
    corpus.check_tokenizer(&tokenizer)?;
    let (anchor, tokens_before) = match resumed {
        Some(step) => (load_anchor(config, &tokenizer, &checkpoints.dir(step))?, 0),
        None => initial_anchor(config, &tokenizer)?,
    };
    let n_parameters = anchor.config().n_parameters();
    let spec = block_spec(config, &tree);
    let memory = match config.train.phase.has_memory() {
        true => {
            let hashes = hashes(&tree, &tokenizer);
            Some(match (config.memory.shards.is_empty(), resumed) {
                (false, step) => {
                    let identity = Identity::new(&config.memory.bank, &spec, hashes);
                    shards::train_on_shards(config, (spec.clone(), identity), Step(step.unwrap_or(0)))?
                }
                (true, step) => {
                    let options = BankOptions {
                        seed: config.memory.seed,
                        adamw: config.train.memory_adamw(),
                        world_size: 1,
                        checkpoint_root: checkpoints.root().into(),
                        hashes,
                    };
                    let bank = match step {
                        Some(step) => {
                            LocalBank::resume(&checkpoints.dir(step).join("memory"), spec.clone(), options)?
                        }
                        None => LocalBank::create(spec.clone(), options)?,
                    };
                    Blocking::new(Arc::new(Bank::Local(bank)))?
                }
            })
        }
        false => None,
    };
    let parts = Parts {
        run_dir: dir.clone(),
        config: config.train.clone(),
        corpus,
        anchor,
        memory,
        workers: Workers::alone(),
    };
    let trainer = match resumed {
        Some(step) => Trainer::resume(parts, step)?,
        None => Trainer::new(parts, tokens_before)?,
    };
    let memory = match config.train.phase.has_memory() {
        true => format!(" + {} fetched of a bank of {}", spec.fetch_len(), spec.bank_len()),
        false => String::new(),
    };
    run(config, trainer, &format!("{n_parameters} parameters{memory}"))
}

/// Trains to the last step under a progress bar; `sizes` is told with the last line.
fn run(config: &Config, mut trainer: Trainer<Bank>, sizes: &str) -> Result<()> {
    let name = config.run.dir.file_name().map_or("train".into(), |name| name.to_string_lossy().into_owned());
    let begin = trainer.state();
    if begin.step >= config.train.steps {
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
    let rate = (last.tokens_seen - begin.tokens_seen) as f64 / last.seconds.max(1e-9);
    progress.finish(format!(
        "{sizes}, {} tokens, loss {:.4}{}, {rate:.0} tokens/s",
        last.tokens_seen,
        last.loss,
        last.validation_loss.map_or(String::new(), |loss| format!(", held out {loss:.4}")),
    ));
    Ok(())
}

/// Makes the run folder, or checks that its checkpoints are of the same configuration and corpus; only then
/// is anything written.
fn begin(config: &Config, prepared: &Prepared, resumed: Option<u64>) -> Result<()> {
    let dir = &config.run.dir;
    let path = dir.join("config.toml");
    if resumed.is_some() {
        check_same(&path, &Config::load(&path, &[])?, config)?;
        Fingerprint::load(dir)?
            .compare(&Fingerprint::load(&prepared.dir)?)
            .with_context(|| format!("{} goes on only with the corpus it began with", dir.display()))?;
    } else {
        for name in COPIED {
            let (from, to) = (prepared.dir.join(name), dir.join(name));
            match fs::read(&from) {
                Ok(bytes) => write_whole(&to, &bytes)?,
                Err(e) if name == EMBEDDER && e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(e).with_context(|| format!("{}", from.display())),
            }
        }
    }
    let mut resolved = config.clone();
    resolved.run.version = Some(env!("CARGO_PKG_VERSION").into());
    write_whole(&path, resolved.to_toml()?.as_bytes())
}

/// A run goes on only with the configuration it began with; what is only reported may change.
fn check_same(path: &Path, before: &Config, now: &Config) -> Result<()> {
    let decisive = |config: &Config| -> Result<BTreeMap<String, String>> {
        let table: toml::Table = toml::from_str(&config.to_toml()?)?;
        let mut keys = BTreeMap::new();
        for section in ["corpus", "embed", "tree", "anchor", "memory", "train"] {
            for (key, value) in table.get(section).and_then(toml::Value::as_table).into_iter().flatten() {
                let reported = ["log_every", "save_every", "keep", "validate_every", "validate_sequences"];
                let reported = section == "train" && reported.contains(&key.as_str());
                // How a store or the shards are reached decides nothing: the fingerprint and the bank's
                // identity hold what comes from there.
                let reached = match section {
                    "corpus" => key == "store",
                    "memory" => ["shards", "bulk", "tls", "token_file", "placement"].contains(&key.as_str()),
                    _ => false,
                };
                if !reported && !reached {
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

/// The anchor of `anchor.init` or a new one, and the tokens it was trained on.
fn initial_anchor(config: &Config, tokenizer: &Tokenizer) -> Result<(Anchor, u64)> {
    let Some(init) = &config.anchor.init else {
        let sizes = config.anchor.config(tokenizer.vocab_size());
        return Ok((Anchor::new(sizes, config.train.seed, (&device()?, DType::F32))?, 0));
    };
    let checkpoints = Checkpoints::of(init);
    let step = checkpoints.require_latest()?;
    let anchor = load_anchor(config, tokenizer, &checkpoints.dir(step))?;
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

fn load_anchor(config: &Config, tokenizer: &Tokenizer, checkpoint: &Path) -> Result<Anchor> {
    let expected = config.anchor.config(tokenizer.vocab_size());
    let path = checkpoint.join("anchor.safetensors");
    let anchor = Anchor::load(&path, (&device()?, DType::F32))?;
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
