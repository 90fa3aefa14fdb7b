//! A prepared corpus of 40 short documents in 4 leaves, and runs on it.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use anchor::{Anchor, AnchorConfig};
use candle_core::{DType, Device};
use corpus::{Corpus, PackOptions, SourceOptions, TokenStore, TokeniseOptions, Tokenizer};
use memory_bank::{BankOptions, BlockSpec, BlockStore, Blocking, LocalBank};
use tempfile::TempDir;
use train::{Attempt, Checkpoints, Parts, Phase, StepMetrics, StepTime, TrainConfig, Trainer, Workers};

pub(crate) use crate::files::files;

pub(crate) const CPU: (&Device, DType) = (&Device::Cpu, DType::F32);

/// A prepared corpus in a temporary folder, in which the runs live too.
pub(crate) struct World {
    pub(crate) dir: TempDir,
    pub(crate) corpus: Arc<Corpus>,
}

impl World {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let prepared = dir.path().join("prepared");
        let (train, held_out) = (dir.path().join("train.jsonl"), dir.path().join("held_out.jsonl"));
        fs::write(&train, documents(0..32)).unwrap();
        fs::write(&held_out, documents(32..40)).unwrap();
        let texts = (0..32).map(|i| Ok(text(i)));
        let tokenizer = Tokenizer::train(texts, 280, 1 << 20).unwrap();
        let source = SourceOptions {
            files: vec![train.display().to_string()],
            validation_files: vec![held_out.display().to_string()],
            ..SourceOptions::default()
        };
        let options = TokeniseOptions { window: 64, validation_permille: 0 };
        corpus::tokenise(&source, &tokenizer, &prepared, &options, &mut |_| ()).unwrap();
        let store = TokenStore::open(&prepared).unwrap();
        let leaves: Vec<u32> =
            (0..store.n_windows()).map(|i| store.window(i).unwrap().document % 4).collect();
        let options = PackOptions { seq_len: 16, seed: 1, embedder: "e".into(), tree: "t".into() };
        corpus::pack(&prepared, &leaves, &[2, 2], &options).unwrap();
        Self { corpus: Arc::new(Corpus::open(&prepared).unwrap()), dir }
    }

    pub(crate) fn run_dir(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn fresh_anchor(&self) -> Anchor {
        let config = AnchorConfig {
            vocab_size: self.corpus.vocab_size(),
            d_model: 16,
            n_layers: 2,
            n_heads: 2,
            head_width: 8,
            ffn_width: 24,
            tied_embeddings: true,
            max_seq_len: 16,
            rope_base: 10_000.0,
            norm_eps: 1e-5,
            form: anchor::Form::default(),
        };
        Anchor::new(config, 3, CPU).unwrap()
    }

    /// A run from its beginning, as one process would make it.
    pub(crate) fn begin(&self, name: &str, config: &TrainConfig) -> Trainer<LocalBank> {
        Trainer::new(self.parts(name, config), 700).unwrap()
    }

    pub(crate) fn parts(&self, name: &str, config: &TrainConfig) -> Parts<LocalBank> {
        let attempt = self.attempt(name);
        let bank = || LocalBank::create(spec(), bank_options(&attempt, config)).unwrap();
        let bank = config.phase.has_memory().then(bank);
        self.parts_with(attempt, config, (self.fresh_anchor(), bank))
    }

    /// A run from its newest checkpoint, as a second process would make it.
    pub(crate) fn resume(&self, name: &str, config: &TrainConfig) -> (u64, Trainer<LocalBank>) {
        let checkpoints = Checkpoints::of(&self.run_dir(name));
        let step = checkpoints.require_latest().unwrap();
        let dir = checkpoints.dir(step);
        let anchor = Anchor::load(&dir.join("anchor.safetensors"), CPU).unwrap();
        let attempt = self.attempt(name);
        let options = bank_options(&attempt, config);
        let bank = || LocalBank::resume(&dir.join("memory"), spec(), options).unwrap();
        let bank = config.phase.has_memory().then(bank);
        let parts = self.parts_with(attempt, config, (anchor, bank));
        (step, Trainer::resume(parts, step).unwrap())
    }

    /// The next attempt at a run.
    pub(crate) fn attempt(&self, name: &str) -> Attempt {
        Attempt::begin(&self.run_dir(name), None).unwrap()
    }

    pub(crate) fn parts_with(
        &self,
        attempt: Attempt,
        config: &TrainConfig,
        (anchor, bank): (Anchor, Option<LocalBank>),
    ) -> Parts<LocalBank> {
        let memory = bank.map(|bank| Blocking::new(Arc::new(bank)).unwrap());
        let (config, corpus) = (config.clone(), self.corpus.clone());
        Parts { attempt, config, corpus, anchor, memory, workers: Workers::alone() }
    }
}

pub(crate) fn bank_options(attempt: &Attempt, config: &TrainConfig) -> BankOptions {
    BankOptions {
        seed: 4,
        adamw: config.memory_adamw(),
        world_size: 1,
        staleness: 0,
        checkpoint_root: attempt.dir(),
        offload: None,
        hashes: BTreeMap::from([("tree".into(), "t".into())]),
    }
}

fn text(i: usize) -> String {
    let [place, thing, colour] = [
        ["harbour", "forest", "market", "desert"][i % 4],
        ["boat", "fox", "basket", "camel"][i % 4],
        ["red", "grey", "green", "white", "black"][i % 5],
    ];
    format!("In the {place} there is a {colour} {thing}. The {thing} of number {i} is {colour}.")
}

fn documents(range: std::ops::Range<usize>) -> String {
    range.fold(String::new(), |mut lines, i| {
        writeln!(lines, r#"{{"text": "{}"}}"#, text(i)).unwrap();
        lines
    })
}

pub(crate) fn spec() -> BlockSpec {
    BlockSpec::ffn(2, 16, vec![4, 2], vec![2, 2])
}

/// Twelve steps, saved every five.
pub(crate) fn config(phase: Phase) -> TrainConfig {
    TrainConfig {
        phase,
        generic_share: 0.2,
        steps: 12,
        batch_size: 8,
        micro_batch: 4,
        learning_rate: 1e-2,
        memory_learning_rate: 1e-2,
        warmup_steps: 2,
        log_every: 1,
        validate_every: 4,
        validate_sequences: 6,
        save_every: 5,
        keep: 10,
        z_loss: 1e-4,
        ..TrainConfig::default()
    }
}

/// Trains to the end and returns every step's metrics.
pub(crate) fn train<S: BlockStore>(mut trainer: Trainer<S>) -> Vec<StepMetrics> {
    let mut all = vec![];
    trainer.run(&mut |metrics| all.push(metrics.clone())).unwrap();
    all
}

/// Trains until the process is killed after `step`.
pub(crate) fn train_until_killed(mut trainer: Trainer<LocalBank>, step: u64) {
    let killed = catch_unwind(AssertUnwindSafe(|| {
        trainer.run(&mut |metrics| {
            if metrics.step == step {
                resume_unwind(Box::new("killed"));
            }
        })
    }));
    assert!(killed.is_err(), "the run ended before step {step}");
}

/// Metrics without the times.
pub(crate) fn timeless(metrics: Vec<StepMetrics>) -> Vec<StepMetrics> {
    metrics
        .into_iter()
        .map(|line| StepMetrics { time: StepTime::default(), tokens_per_s: 0.0, seconds: 0.0, ..line })
        .collect()
}

pub(crate) fn weights(anchor: &Anchor) -> Vec<Vec<u32>> {
    let bits = |parameter: &candle_core::Tensor| {
        let values: Vec<f32> = parameter.flatten_all().unwrap().to_vec1().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    anchor.parameters().values().map(bits).collect()
}
