//! `anchorage train`: a run folder made or gone on with.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anchor::Anchor;
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use cluster_tree::ClusterTree;
use collective::{Call, Mesh, TcpOptions};
use corpus::{Corpus, Fingerprint, Tokenizer};
use launch::Ranks;
use memory_bank::{BankOptions, BlockSpec, BlockStore, Blocking, LocalBank, Step};
use memory_service::{Identity, RemoteStats};
use serde::{Deserialize, Serialize};
use signal_hook::SigId;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use train::{Checkpoints, Ended, Parts, StepMetrics, TrainConfig, Trainer, Workers};

use crate::config::{CollectiveSection, Config};
use crate::prepare::{Prepared, prepare};
use crate::progress::Progress;
use crate::run::{device_of, hashes, write_whole};
use crate::shards::{self, Bank};
use crate::status::{Observer, Rates};

/// Files that a run copies from its prepared corpus, so that it routes and generates on its own.
const COPIED: [&str; 4] = ["tokenizer.json", "tree.safetensors", "fingerprint.json", EMBEDDER];

/// Only the hashed embedder is a file of the prepared corpus.
const EMBEDDER: &str = "embedder.safetensors";

/// Trains the run of `config`, as one of its workers, from its newest checkpoint if it has one. When another
/// worker or a shard fails it goes back to that, as all others do, and waits for who takes the place.
pub(crate) fn train(config: &Config, ranks: &Ranks) -> Result<Ended> {
    let stop = Stop::when_told()?;
    let observer = Observer::start(config, ranks)?;
    let mut worker = Worker { config, ranks, observer: &observer, held: None };
    let ended = worker.train(&stop);
    observer.tell(match &ended {
        Ok(Ended::Done) => "done".to_owned(),
        Ok(Ended::Stopped) => "saved and stopped".to_owned(),
        Err(error) => format!("failed: {error:#}"),
    });
    ended
}

/// One worker of a run.
struct Worker<'a> {
    config: &'a Config,
    ranks: &'a Ranks,
    observer: &'a Observer,
    /// The run's folder, which the first worker holds once the corpus is prepared.
    held: Option<fs::File>,
}

impl Worker<'_> {
    fn train(&mut self, stop: &Stop) -> Result<Ended> {
        let config = self.config;
        let (mut failures, mut newest) = (0, None);
        loop {
            let error = match self.attempt(&stop.flag) {
                // What was saved before is what the next start goes on from.
                Err(_) if stop.is_set() => return Ok(Ended::Stopped),
                Err(error) if is_transient(&error) => error,
                ended => return ended,
            };
            let checkpoint = Checkpoints::of(&config.run.dir).latest()?;
            if std::mem::replace(&mut newest, checkpoint) != checkpoint {
                failures = 0;
            }
            failures += 1;
            if failures > config.collective.retries {
                return Err(
                    error.context(format!("failed {failures} times since step {}", newest.unwrap_or(0)))
                );
            }
            eprintln!("back to step {}: {error:#}", newest.unwrap_or(0));
            self.observer.back(&format!("{error:#}"));
        }
    }

    /// Trains with all others until the end, or until something fails.
    fn attempt(&mut self, stop: &Arc<AtomicBool>) -> Result<Ended> {
        let Self { config, ranks, .. } = *self;
        let Ranks { rank, world_size, ref master, ref job, .. } = *ranks;
        let CollectiveSection { join_s, patience_s, .. } = config.collective;
        self.observer.tell("waiting for all workers");
        let mut mesh = collective::join(&TcpOptions {
            rank,
            world_size,
            master: master.clone(),
            job: format!("{job} {}", config.run.dir.display()),
            join: Duration::from_secs(join_s),
            stop: Arc::clone(stop),
            patience: Duration::from_secs(patience_s),
        })?;
        let (parts, sizes) = match self.assemble(&mut mesh, stop) {
            Ok(assembled) => assembled,
            Err(error) => {
                // Who was told to stop goes on later, and the others with it.
                let is_final = !is_transient(&error) && !stop.load(Ordering::Relaxed);
                mesh.give_up(&format!("{error:#}"), is_final);
                return Err(error);
            }
        };
        let Assembled { resumed, tokens_before, corpus, anchor, memory, replicated } = parts;
        let rank_at_bank = if config.memory.shards.is_empty() { 0 } else { rank };
        let workers = Workers { mesh, replicated, rank_at_bank, stop: Arc::clone(stop) };
        let (run_dir, config_of_train) = (config.run.dir.clone(), config.train.clone());
        let parts = Parts { run_dir, config: config_of_train, corpus, anchor, memory, workers };
        let trainer = match resumed {
            Some(step) => Trainer::resume(parts, step)?,
            None => Trainer::new(parts, tokens_before)?,
        };
        run(self, trainer, &sizes)
    }

    /// Opens all that a worker trains with; returns a line about its sizes too. The others wait for the first.
    fn assemble(&mut self, mesh: &mut Mesh, stop: &AtomicBool) -> Result<(Assembled, String)> {
        let Self { config, ranks, .. } = *self;
        let checkpoints = Checkpoints::of(&config.run.dir);
        let has_memory = config.train.phase.has_memory();
        let on_shards = has_memory && !config.memory.shards.is_empty();
        let led = match ranks.rank {
            0 => mesh.at_work(|| self.make_ready(on_shards, stop))?,
            _ => None,
        };
        let mut keys = decisive(config)?;
        // They share the validation, too.
        let TrainConfig { validate_every, validate_sequences, .. } = config.train;
        keys.insert("train.validate_every".into(), validate_every.to_string());
        keys.insert("train.validate_sequences".into(), validate_sequences.to_string());
        let mine = Begin { resumed: led, version: env!("CARGO_PKG_VERSION").into(), keys };
        let told = mesh.all_gather(&Call::new("begin", 0), serde_json::to_vec(&mine)?.into())?;
        let first: Begin = serde_json::from_slice(&told[0]).context("what rank 0 says of the run")?;
        if (&first.version, &first.keys) != (&mine.version, &mine.keys) {
            let key = first.keys.iter().find(|(key, value)| mine.keys.get(*key) != Some(value));
            let (key, value) = key.map_or(("version", first.version.as_str()), |(key, value)| (key, value));
            let found = mine.keys.get(key).map_or(mine.version.as_str(), String::as_str);
            bail!(
                "{key} is {found} for rank {} and {value} for rank 0: expected one configuration",
                ranks.rank
            );
        }
        let resumed = first.resumed;
        self.observer.write_from_now();
        self.observer.tell("reading its part");
        let (tree, tokenizer) = belongings(config)?;
        let corpus = Arc::new(Corpus::open(&Prepared::of(config).dir)?);
        corpus.check_tokenizer(&tokenizer)?;
        let place = device_of(ranks.local_rank)?;
        let (anchor, tokens_before) = match resumed {
            Some(step) => (load_anchor(config, &tokenizer, (&checkpoints.dir(step), &place))?, 0),
            None => initial_anchor(config, &tokenizer, &place)?,
        };
        let spec = block_spec(config, &tree);
        let memory = match (has_memory, on_shards) {
            (false, _) => None,
            (true, true) => {
                let (place, step) = ((ranks.rank, ranks.world_size), Step(resumed.unwrap_or(0)));
                let identity = bank_identity(config, &tree, &tokenizer);
                Some(shards::train_on_shards(config, identity, place, step)?)
            }
            (true, false) => Some(own_bank(config, (&tree, &tokenizer), resumed)?),
        };
        let memory_sizes = match has_memory {
            true => format!(" + {} fetched of a bank of {}", spec.fetch_len(), spec.bank_len()),
            false => String::new(),
        };
        let sizes = format!("{} parameters{memory_sizes}", anchor.config().n_parameters());
        let is_replicated = |level| !on_shards || config.memory.replicated.contains(&level);
        let replicated = (0..spec.n_levels()).map(is_replicated).collect();
        Ok((Assembled { resumed, tokens_before, corpus, anchor, memory, replicated }, sizes))
    }

    /// What the first worker does for all: prepares the corpus, makes the run's folder and brings the shards to
    /// where the run goes on, which is returned.
    fn make_ready(&mut self, on_shards: bool, stop: &AtomicBool) -> Result<Option<u64>> {
        let Self { config, ranks, .. } = *self;
        let dir = &config.run.dir;
        if self.held.is_none() {
            self.observer.tell("preparing the corpus");
            prepare(config)?;
            fs::create_dir_all(dir).with_context(|| format!("{}", dir.display()))?;
            self.held = atomic_file::lock(dir).with_context(|| format!("{}", dir.display()))?;
            if self.held.is_none() {
                bail!("{}: another process is training this run", dir.display());
            }
        }
        let resumed = Checkpoints::of(dir).latest()?;
        begin(config, &Prepared::of(config), resumed)?;
        if on_shards {
            let begins = !dir.join("config.toml").exists();
            let goal = (Step(resumed.unwrap_or(0)), begins);
            let (tree, tokenizer) = belongings(config)?;
            let memory = Checkpoints::of(dir).dir(goal.0.0).join("memory");
            if memory.join("manifest.json").exists() {
                shards::hand_over(config, bank_identity(config, &tree, &tokenizer), &memory, goal.0)?;
            }
            self.observer.tell(format!("bringing the shards to step {}", goal.0.0));
            shards::bring_to(config, bank_identity(config, &tree, &tokenizer), ranks.world_size, goal, stop)?;
        }
        write_config(config)?;
        Ok(resumed)
    }
}

/// Set when the process is told to save and stop; told twice to interrupt, it ends at once. Dropped, signals do
/// again what they did before.
pub(crate) struct Stop {
    pub(crate) flag: Arc<AtomicBool>,
    handlers: Vec<SigId>,
}

impl Stop {
    pub(crate) fn when_told() -> Result<Self> {
        let flag = Arc::<AtomicBool>::default();
        // In this order: the first interruption does not meet the flag yet.
        let mut handlers =
            vec![signal_hook::flag::register_conditional_shutdown(SIGINT, 130, Arc::clone(&flag))?];
        for signal in [SIGINT, SIGTERM, SIGUSR1] {
            handlers.push(signal_hook::flag::register(signal, Arc::clone(&flag))?);
        }
        Ok(Self { flag, handlers })
    }

    pub(crate) fn is_set(&self) -> bool {
        self.flag.load(Ordering::Relaxed)
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        for handler in self.handlers.drain(..) {
            signal_hook::low_level::unregister(handler);
        }
    }
}

/// Whether the same may succeed from the last checkpoint, once another process is there again.
fn is_transient(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<train::Error>().is_some_and(train::Error::is_transient)
            || cause.downcast_ref::<collective::Error>().is_some_and(collective::Error::is_transient)
            || matches!(cause.downcast_ref(), Some(memory_bank::Error::Remote { is_transient: true, .. }))
    })
}

/// What workers tell each other first.
#[derive(Serialize, Deserialize)]
struct Begin {
    /// The checkpoint that all go on from, as the first one says.
    resumed: Option<u64>,
    version: String,
    /// All that decides what is trained.
    keys: BTreeMap<String, String>,
}

/// What a worker trains with.
struct Assembled {
    /// The checkpoint that all go on from.
    resumed: Option<u64>,
    tokens_before: u64,
    corpus: Arc<Corpus>,
    anchor: Anchor,
    memory: Option<Blocking<Bank>>,
    replicated: Vec<bool>,
}

/// The tree and the tokenizer that a run's folder holds.
fn belongings(config: &Config) -> Result<(ClusterTree, Tokenizer)> {
    let dir = &config.run.dir;
    Ok((ClusterTree::load(&dir.join("tree.safetensors"))?, Tokenizer::load(&dir.join("tokenizer.json"))?))
}

/// What the shards of a run must be.
fn bank_identity(config: &Config, tree: &ClusterTree, tokenizer: &Tokenizer) -> (BlockSpec, Identity) {
    let spec = block_spec(config, tree);
    let identity = Identity::new(&config.memory.bank, &spec, hashes(tree, tokenizer));
    (spec, identity)
}

/// The bank of a run that keeps it in its own process.
fn own_bank(
    config: &Config,
    (tree, tokenizer): (&ClusterTree, &Tokenizer),
    resumed: Option<u64>,
) -> Result<Blocking<Bank>> {
    let checkpoints = Checkpoints::of(&config.run.dir);
    let spec = block_spec(config, tree);
    let options = BankOptions {
        seed: config.memory.seed,
        adamw: config.train.memory_adamw(),
        world_size: 1,
        staleness: config.train.staleness,
        checkpoint_root: checkpoints.root().into(),
        hashes: hashes(tree, tokenizer),
    };
    let bank = match resumed {
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

/// Trains to the last step, the first worker under a progress bar; `sizes` is told with the last line.
fn run(worker: &Worker, mut trainer: Trainer<Bank>, sizes: &str) -> Result<Ended> {
    let Worker { config, ranks, observer, .. } = *worker;
    let remote = trainer.memory().and_then(|bank| bank.store().remote()).cloned();
    let memory_width = trainer.memory().map_or(0, |bank| bank.store().spec().width.iter().sum());
    let len = config.corpus.seq_len as usize;
    let flops_per_token = config.train.phase.flops_per_token(trainer.anchor().config(), len, memory_width);
    let peak_flops = config.observe.peak_tflops.map(|peak| peak * 1e12 * ranks.world_size as f64);
    observer.train(trainer.state(), Rates { flops_per_token, peak_flops }, remote.clone());
    let ended = match ranks.rank {
        0 => lead(config, &mut trainer, (sizes, ranks.world_size == 1), observer),
        _ => trainer.run(&mut |metrics| observer.step(metrics)).map_err(Into::into),
    };
    observer.let_go();
    let ended = ended?;
    if let Some(remote) = remote {
        let RemoteStats { received_bytes, sent_bytes, retries, .. } = remote.stats();
        let rank = ranks.rank;
        eprintln!(
            "worker {rank}: {received_bytes} bytes of blocks fetched, {sent_bytes} bytes pushed, {retries} requests tried again"
        );
    }
    Ok(ended)
}

/// Trains as the first worker.
fn lead(
    config: &Config,
    trainer: &mut Trainer<Bank>,
    (sizes, is_alone): (&str, bool),
    observer: &Observer,
) -> Result<Ended> {
    let name = config.run.dir.file_name().map_or("train".into(), |name| name.to_string_lossy().into_owned());
    let begin = trainer.state();
    if begin.step >= config.train.steps {
        eprintln!("{name:>18}: trained already ({} steps)", config.train.steps);
        // The other workers wait for this one at the end.
        return match is_alone {
            true => Ok(Ended::Done),
            false => Ok(trainer.run(&mut |_| ())?),
        };
    }
    let mut progress = Progress::new(&name, config.train.steps);
    let mut last = StepMetrics::default();
    let ended = trainer.run(&mut |metrics| {
        observer.step(metrics);
        if metrics.tokens_per_s > 0.0 {
            last = metrics.clone();
        }
        progress.set(metrics.step, config.train.steps, || {
            format!("loss {:.3} {:.0} tokens/s", metrics.loss, last.tokens_per_s)
        });
    })?;
    if ended == Ended::Stopped {
        progress.finish(format!("saved and stopped after step {}", trainer.state().step));
        return Ok(ended);
    }
    let rate = (last.tokens_seen - begin.tokens_seen) as f64 / last.seconds.max(1e-9);
    progress.finish(format!(
        "{sizes}, {} tokens, loss {:.4}{}, {rate:.0} tokens/s",
        last.tokens_seen,
        last.loss,
        last.validation_loss.map_or(String::new(), |loss| format!(", held out {loss:.4}")),
    ));
    Ok(ended)
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
    Ok(())
}

/// Writes the configuration that a run is of: from then on it is one.
fn write_config(config: &Config) -> Result<()> {
    let mut resolved = config.clone();
    resolved.run.version = Some(env!("CARGO_PKG_VERSION").into());
    write_whole(&config.run.dir.join("config.toml"), resolved.to_toml()?.as_bytes())
}

/// A run goes on only with the configuration it began with; what is only reported may change.
fn check_same(path: &Path, before: &Config, now: &Config) -> Result<()> {
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

/// The keys that decide what is trained, with their values.
fn decisive(config: &Config) -> Result<BTreeMap<String, String>> {
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
                "memory" => {
                    ["shards", "replicated", "bulk", "tls", "token_file", "placement"].contains(&key.as_str())
                }
                _ => false,
            };
            if !reported && !reached {
                keys.insert(format!("{section}.{key}"), value.to_string());
            }
        }
    }
    Ok(keys)
}

/// The anchor of `anchor.init` or a new one, and the tokens it was trained on.
fn initial_anchor(config: &Config, tokenizer: &Tokenizer, device: &Device) -> Result<(Anchor, u64)> {
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
    BlockSpec {
        kind: config.memory.kind,
        n_layers: config.anchor.n_layers,
        d_model: config.anchor.d_model,
        width: config.memory.width.clone(),
        branching: (0..tree.n_levels()).map(|level| tree.branching(level)).collect(),
    }
}
