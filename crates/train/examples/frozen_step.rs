//! Our side of bench/posthoc: training steps of memory on the frozen model of a Hugging Face folder.
//!
//! `frozen_step FOLDER --batch N --length T [--threads N] [--kind ffn|lora_qk|lora_vo|lora_ffn|kv] [--widths R,R,..]
//! [--paths different|shared] [--compute bf16,checkpoint] [--warm-up N]`
//!
//! First answers a line that tells what is trained, and what the process takes before there is a model. Then each line
//! of its input is one step, answered by one line of JSON: its seconds until the bank is updated, the loss before it (in
//! nats), and the peak of the process since the first line, in MiB. At the end of the input it answers the medians. So
//! another program can take its steps in between.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anchor::{Anchor, Precision};
use candle_core::{DType, Device};
use cluster_tree::ClusterPath;
use corpus::{Batch, Corpus, PackOptions, Sequence, SourceOptions, TokenStore, TokeniseOptions, Tokenizer};
use memory_bank::{BankOptions, BlockStore, Blocking, LocalBank, MemoryKind, MemoryLayers, Step};
use serde_json::json;
use train::{Attempt, Parts, Phase, TrainConfig, Trainer, Workers};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Children of a node of the tree.
const BRANCHING: usize = 16;

/// What the command line asks for.
struct Options {
    folder: PathBuf,
    batch: usize,
    length: usize,
    threads: usize,
    kind: MemoryKind,
    /// By level, coarse to fine.
    widths: Vec<usize>,
    /// Whether all sequences have one path; otherwise they share no block.
    is_shared: bool,
    compute: Vec<String>,
    warm_up: usize,
}

impl Options {
    fn parsed() -> Result<Self> {
        let mut args = std::env::args().skip(1);
        let folder = PathBuf::from(args.next().ok_or("expected a folder")?);
        let mut options = Self {
            folder,
            batch: 8,
            length: 256,
            threads: 2,
            kind: MemoryKind::Ffn,
            widths: vec![192, 48, 12],
            is_shared: false,
            compute: vec![],
            warm_up: 1,
        };
        while let Some(key) = args.next() {
            let value = args.next().ok_or_else(|| format!("{key}: expected a value"))?;
            match (key.as_str(), value.as_str()) {
                ("--batch", _) => options.batch = value.parse()?,
                ("--length", _) => options.length = value.parse()?,
                ("--threads", _) => options.threads = value.parse()?,
                ("--kind", _) => options.kind = value.parse()?,
                ("--widths", _) => {
                    options.widths =
                        value.split(',').map(str::parse).collect::<std::result::Result<_, _>>()?;
                }
                ("--paths", "different") => options.is_shared = false,
                ("--paths", "shared") => options.is_shared = true,
                ("--compute", _) => options.compute = value.split(',').map(String::from).collect(),
                ("--warm-up", _) => options.warm_up = value.parse()?,
                _ => return Err(format!("{key} {value}: not an option").into()),
            }
        }
        Ok(options)
    }

    fn train(&self) -> Result<TrainConfig> {
        let mut train = TrainConfig {
            phase: Phase::Frozen,
            memory_learning_rate: 1e-4,
            // The rate stays at its peak, as on the other side.
            final_share: 1.0,
            warmup_steps: 0,
            batch_size: self.batch,
            micro_batch: self.batch,
            ..TrainConfig::default()
        };
        for word in &self.compute {
            match word.as_str() {
                "bf16" => train.precision = Precision::Bf16,
                "checkpoint" => train.checkpoint_activations = true,
                _ => return Err(format!("--compute {word}: expected bf16 or checkpoint").into()),
            }
        }
        Ok(train)
    }

    /// The path of a sequence of a batch.
    fn path(&self, sequence: usize) -> Result<ClusterPath> {
        let first = if self.is_shared { 0 } else { sequence as u32 };
        let index = |level: usize| first * (BRANCHING as u32).pow(level as u32);
        Ok(ClusterPath::new((0..self.widths.len()).map(index).collect())?)
    }

    /// The tokens of a step, the same as on the other side.
    fn tokens(&self, (step, vocab_size): (usize, usize)) -> Result<Batch> {
        let sequence = |i: usize| {
            let token = |t: usize| ((i * 7919 + t * 31 + 5 + 101 * step) % vocab_size) as u32;
            // What would follow belongs to another document: the last token predicts nothing.
            let doc_starts = vec![0, self.length as u32];
            let tokens = (0..=self.length).map(token).collect();
            Ok(Sequence { path: self.path(i)?, tokens, doc_starts, documents: vec![0, 1] })
        };
        let sequences = (0..self.batch).map(sequence).collect::<Result<_>>()?;
        Ok(Batch::new(sequences, u32::MAX))
    }
}

fn main() -> Result<()> {
    let options = Options::parsed()?;
    ops::init_process(options.threads);
    let libraries_mb = status_mb("VmRSS");
    let (anchor, _) = anchor::hf::read(&options.folder, (&Device::Cpu, DType::F32))?;
    let (vocab_size, frozen) = (anchor.config().vocab_size, anchor.config().n_parameters());
    let train = options.train()?;
    let bank = bank(&anchor, &options, &train)?;
    let spec = bank.store().spec();
    let n_paths = if options.is_shared { 1 } else { options.batch as u64 };
    let (fetched, trained) = (spec.fetch_len(), n_paths * spec.fetch_len());
    let scratch = tempfile::tempdir()?;
    let parts = Parts {
        attempt: Attempt::begin(scratch.path(), None)?,
        config: train,
        corpus: Arc::new(corpus(scratch.path(), options.length)?),
        anchor,
        memory: Some(bank),
        workers: Workers::alone(),
    };
    let mut trainer = Trainer::new(parts, 0)?;
    let mut n_steps = 0;
    let mut step = || -> Result<_> {
        let batch = options.tokens((n_steps, vocab_size))?;
        n_steps += 1;
        let began = Instant::now();
        let line = trainer.step(&batch)?;
        // The gradients are pushed behind the step: it ends once they are applied.
        if let Some(bank) = trainer.memory() {
            bank.fetch(Step(n_steps as u64), &[])?;
        }
        Ok((began.elapsed().as_secs_f64(), line))
    };
    let warm_up = (0..options.warm_up).map(|_| step()).collect::<Result<Vec<_>>>()?;
    let peak_since_start = fs::write("/proc/self/clear_refs", "5").is_err();
    let first_loss = warm_up.first().map(|(_, line)| line.loss);
    println!(
        "{}",
        json!({
            "trained": trained, "fetched": fetched, "frozen": frozen, "libraries_mb": libraries_mb,
            "peak_since_start": peak_since_start, "first_loss": first_loss,
        })
    );
    let mut seconds = vec![];
    for line in std::io::stdin().lines() {
        line?;
        let (taken, line) = step()?;
        seconds.push(taken);
        let peak_mb = status_mb("VmHWM");
        println!("{}", json!({ "step_s": taken, "loss": line.loss, "peak_mb": peak_mb, "time": line.time }));
    }
    seconds.sort_by(f64::total_cmp);
    if let Some(median_s) = seconds.get(seconds.len() / 2) {
        let (steps, peak_mb) = (seconds.len(), status_mb("VmHWM"));
        println!("{}", json!({ "median_s": median_s, "steps": steps, "peak_mb": peak_mb }));
    }
    Ok(())
}

/// A bank of those widths, of which only touched blocks take memory.
fn bank(anchor: &Anchor, options: &Options, train: &TrainConfig) -> Result<Blocking<LocalBank>> {
    let sizes = (options.widths.clone(), vec![BRANCHING; options.widths.len()]);
    let spec = anchor.config().block_spec(options.kind, MemoryLayers::Uniform, sizes);
    let bank = BankOptions {
        staleness: 0,
        seed: 1,
        adamw: train.memory_adamw(),
        world_size: 1,
        checkpoint_root: PathBuf::from("never-saved"),
        offload: None,
        hashes: [].into(),
    };
    Ok(Blocking::new(Arc::new(LocalBank::create(spec, bank)?))?)
}

/// A corpus of a few words, which a trainer must have: batches are made by hand.
fn corpus(dir: &Path, length: usize) -> Result<Corpus> {
    let (file, prepared) = (dir.join("corpus.jsonl"), dir.join("prepared"));
    let text: String = (0..400).map(|i| format!("w{} ", i * 7919 % 97)).collect();
    fs::write(&file, json!({ "text": text }).to_string())?;
    let tokenizer = Tokenizer::train([Ok(text)].into_iter(), 300, 1 << 16)?;
    let source = SourceOptions { files: vec![file.display().to_string()], ..SourceOptions::default() };
    let tokenise = TokeniseOptions { window: length as u32, validation_permille: 0 };
    corpus::tokenise(&source, &tokenizer, &prepared, &tokenise, &mut |_| ())?;
    let n_windows = TokenStore::open(&prepared)?.n_windows();
    let pack = PackOptions { seq_len: length as u32, seed: 1, embedder: String::new(), tree: String::new() };
    corpus::pack(&prepared, &vec![0; n_windows], &[2], &pack)?;
    Ok(Corpus::open(&prepared)?)
}

/// A size of this process, as Linux tells it, in MiB.
fn status_mb(name: &str) -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}
