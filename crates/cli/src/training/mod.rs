//! `anchorage train`: a run folder made or gone on with.

mod folder;
mod merge;
mod parts;
mod stop;

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use candle_core::Device;
use collective::{Call, Engine, Mesh, TcpOptions};
use launch::Ranks;
use memory_bank::{BlockStore, Step};
use memory_service::RemoteStats;
use serde::{Deserialize, Serialize};
use train::{Attempt, Checkpoints, Ended, Parts, StepMetrics, TrainConfig, Trainer, Workers};

use crate::config::{CollectiveSection, Config, EngineKind};
use crate::prepare::{Prepared, prepare};
use crate::progress::Progress;
use crate::shards::{self, Bank};
use crate::status::{Observer, Rates};

use folder::{begin, belongings, decisive, write_config};
pub(crate) use merge::{MergeArgs, merge};
pub(crate) use parts::block_spec;
use parts::{Assembled, Start, bank_identity};
pub(crate) use stop::Stop;

/// Trains the run of `config`, as one of its workers, from its newest checkpoint if it has one. When another
/// worker or a shard fails it goes back to that, as all others do, and waits for who takes the place.
pub(crate) fn train(config: &Config, ranks: &Ranks) -> Result<Ended> {
    let stop = Stop::when_told()?;
    let observer = Observer::start(config, ranks)?;
    let mut worker = Worker { config, ranks, observer: &observer, held: None, attempt: None };
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
    /// The last one, of the first worker, who begins them.
    attempt: Option<Attempt>,
}

impl Worker<'_> {
    fn train(&mut self, stop: &Stop) -> Result<Ended> {
        let config = self.config;
        // By who was the cause: one that comes and goes does not use up what another is allowed.
        let (mut failures, mut newest) = (BTreeMap::<String, usize>::new(), None);
        loop {
            let error = match self.attempt(&stop.flag) {
                // What was saved before is what the next start goes on from.
                Err(_) if stop.is_set() => return Ok(Ended::Stopped),
                Err(error) => error,
                ended => return ended,
            };
            // Who was cut off sees the others gone: what it has to say is that they go on without it.
            self.attempt.as_ref().map_or(Ok(()), Attempt::check)?;
            let Some(cause) = cause(&error) else { return Err(error) };
            let checkpoint = Checkpoints::of(&config.run.dir).latest()?;
            if std::mem::replace(&mut newest, checkpoint) != checkpoint {
                failures.clear();
            }
            let since = newest.unwrap_or(0);
            let n_failures = failures.entry(cause.clone()).or_default();
            *n_failures += 1;
            if *n_failures > config.collective.retries {
                let told = format!(
                    "{cause} failed {n_failures} times since step {since}, more than collective.retries allows"
                );
                return Err(error.context(told));
            }
            eprintln!("back to step {since}: {error:#}");
            self.observer.back(&format!("{error:#}"));
        }
    }

    /// Trains with all others until the end, or until something fails.
    fn attempt(&mut self, stop: &Arc<AtomicBool>) -> Result<Ended> {
        let Self { config, ranks, .. } = *self;
        let Ranks { rank, world_size, ref master, ref job, .. } = *ranks;
        let CollectiveSection { join_s, patience_s, .. } = config.collective;
        let tls = match world_size {
            1 => None,
            _ => config.collective.tls(master)?,
        };
        self.observer.tell("waiting for all workers");
        let mut mesh = collective::join(&TcpOptions {
            rank,
            world_size,
            master: master.clone(),
            job: format!("{job} {}", config.run.dir.display()),
            tls,
            join: Duration::from_secs(join_s),
            stop: Arc::clone(stop),
            patience: Duration::from_secs(patience_s),
        })?;
        let parts = match self.assemble(&mut mesh, stop) {
            Ok(assembled) => assembled,
            Err(error) => {
                // Who was told to stop goes on later, and the others with it.
                let is_told = stop.load(Ordering::Relaxed);
                let cause = if is_told { Some(format!("rank {rank}")) } else { cause(&error) };
                mesh.give_up(&format!("{error:#}"), cause);
                return Err(error);
            }
        };
        let Assembled {
            start: Start { attempt, resumed },
            tokens_before,
            corpus,
            anchor,
            memory,
            replicated,
            sizes,
        } = parts;
        let rank_at_bank = if config.memory.shards.is_empty() { 0 } else { rank };
        let engine = match config.collective.engine {
            _ if world_size == 1 => Engine::Tcp,
            EngineKind::Tcp => Engine::Tcp,
            EngineKind::Nccl => on_gpus(&mut mesh, anchor.device())?,
        };
        let workers = Workers { mesh, engine, replicated, rank_at_bank, stop: Arc::clone(stop) };
        let parts = Parts { attempt, config: config.train.clone(), corpus, anchor, memory, workers };
        let trainer = match resumed {
            Some(step) => Trainer::resume(parts, step)?,
            None => Trainer::new(parts, tokens_before)?,
        };
        run(self, trainer, &sizes)
    }

    /// Opens all that a worker trains with, once all agree on the run; the others wait for the first.
    fn assemble(&mut self, mesh: &mut Mesh, stop: &AtomicBool) -> Result<Assembled> {
        let Self { config, ranks, .. } = *self;
        let led = match ranks.rank {
            0 => Some(mesh.at_work(|| self.make_ready(stop))?),
            _ => None,
        };
        let (attempt, resumed) = Begin { led, ..Begin::of(config)? }.agree(mesh)?;
        let attempt = Attempt::of(&config.run.dir, attempt);
        self.observer.write_from_now();
        self.observer.tell("reading its part");
        mesh.at_work(|| Assembled::open(config, ranks, Start { attempt, resumed }))
    }

    /// What the first worker does for all: prepares the corpus, makes the run's folder and brings the shards to
    /// where the run goes on, which is returned with the number of the attempt.
    fn make_ready(&mut self, stop: &AtomicBool) -> Result<Led> {
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
        let attempt = Attempt::begin(dir, self.attempt.as_ref())?;
        self.attempt = Some(attempt.clone());
        let resumed = Checkpoints::of(dir).latest()?;
        begin(config, &Prepared::of(config), resumed)?;
        if parts::on_shards(config) {
            let begins = !dir.join("config.toml").exists();
            let goal = (Step(resumed.unwrap_or(0)), begins);
            let (tree, tokenizer) = belongings(config)?;
            let memory = Checkpoints::of(dir).dir(goal.0.0).join("memory");
            if memory.join("manifest.json").exists() {
                self.observer.tell("handing its bank over to the shards");
                shards::hand_over(config, bank_identity(config, &tree, &tokenizer), &memory, goal.0)?;
            }
            self.observer.tell(format!("bringing the shards to step {}", goal.0.0));
            let job = (ranks.world_size, &attempt);
            shards::bring_to(config, bank_identity(config, &tree, &tokenizer), job, goal, stop)?;
        }
        write_config(config)?;
        Ok((attempt.number(), resumed))
    }
}

/// Sums on the GPUs of all workers.
#[cfg(feature = "nccl")]
fn on_gpus(mesh: &mut Mesh, device: &Device) -> Result<Engine> {
    Ok(Engine::Nccl(collective::Nccl::join(mesh, device.as_cuda_device()?.cuda_stream())?))
}

/// Refused when the configuration was read.
#[cfg(not(feature = "nccl"))]
fn on_gpus(_: &mut Mesh, _: &Device) -> Result<Engine> {
    bail!("collective.engine: this program was built without nccl")
}

/// Who is the cause, if the same may succeed from the last checkpoint once another process is there again.
fn cause(error: &anyhow::Error) -> Option<String> {
    error.chain().find_map(|error| match error.downcast_ref::<collective::Error>() {
        Some(error) => error.cause(),
        None => match error.downcast_ref() {
            Some(memory_bank::Error::Remote { is_transient: true, address, .. }) => {
                Some(format!("shard {address}"))
            }
            _ => error.downcast_ref().and_then(train::Error::cause),
        },
    })
}

/// What the first worker says: the number of the attempt, and the checkpoint that all go on from.
type Led = (u64, Option<u64>);

/// What workers tell each other first.
#[derive(Serialize, Deserialize)]
struct Begin {
    led: Option<Led>,
    version: String,
    /// All that decides what is trained.
    keys: BTreeMap<String, String>,
}

impl Begin {
    fn of(config: &Config) -> Result<Self> {
        let mut keys = decisive(config)?;
        // They share the validation, too.
        let TrainConfig { validate_every, validate_sequences, .. } = config.train;
        keys.insert("train.validate_every".into(), validate_every.to_string());
        keys.insert("train.validate_sequences".into(), validate_sequences.to_string());
        keys.insert("collective.engine".into(), format!("{:?}", config.collective.engine));
        Ok(Self { led: None, version: env!("CARGO_PKG_VERSION").into(), keys })
    }

    /// What the first worker says, when all are of one configuration.
    fn agree(&self, mesh: &mut Mesh) -> Result<Led> {
        let told = mesh.all_gather(&Call::new("begin", 0), serde_json::to_vec(self)?.into())?;
        let first: Self = serde_json::from_slice(&told[0]).context("what rank 0 says of the run")?;
        if (&first.version, &first.keys) != (&self.version, &self.keys) {
            let key = first.keys.iter().find(|(key, value)| self.keys.get(*key) != Some(value));
            let (key, value) = key.map_or(("version", first.version.as_str()), |(key, value)| (key, value));
            let found = self.keys.get(key).map_or(self.version.as_str(), String::as_str);
            let rank = mesh.rank();
            bail!("{key} is {found} for rank {rank} and {value} for rank 0: expected one configuration");
        }
        first.led.context("what rank 0 says of the run: expected an attempt, found none")
    }
}

/// Trains to the last step, the first worker under a progress bar; `sizes` is told with the last line.
fn run(worker: &Worker, mut trainer: Trainer<Bank>, sizes: &str) -> Result<Ended> {
    let Worker { config, ranks, observer, .. } = *worker;
    let remote = trainer.memory().and_then(|bank| bank.store().remote()).cloned();
    let fetch_len = trainer.memory().map_or(0, |bank| bank.store().spec().fetch_len());
    let len = config.corpus.seq_len as usize;
    let flops_per_token = config.train.phase.flops_per_token(trainer.anchor().config(), len, fetch_len);
    let peak_flops = config.observe.peak_tflops.map(|peak| peak * 1e12 * ranks.world_size as f64);
    observer.train(trainer.state(), Rates { flops_per_token, peak_flops }, remote.clone());
    let ended = match ranks.rank {
        0 => lead(config, &mut trainer, (sizes, ranks.world_size == 1), observer),
        _ => trainer.run(&mut |metrics| observer.step(metrics)).map_err(Into::into),
    };
    observer.let_go();
    let ended = ended?;
    if let Some(remote) = remote {
        let RemoteStats { received_bytes, unchanged_bytes, sent_bytes, retries, .. } = remote.stats();
        let rank = ranks.rank;
        eprintln!(
            "worker {rank}: {received_bytes} bytes of blocks fetched, {sent_bytes} bytes pushed, {retries} requests \
             tried again; {unchanged_bytes} bytes of blocks had not changed"
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
