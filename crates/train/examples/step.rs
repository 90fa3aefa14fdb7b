//! Our side of bench/train: times whole optimizer steps of one anchor, without a corpus behind them.
//!
//! `step FOLDER [--make SIZE] [--steps N] [--threads N] [--memory different|shared] [--compute bf16,checkpoint]`:
//! with `--make` it writes what both sides read (weights, tokens, settings) and ends; else it trains on that and prints one line of JSON.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anchor::{Anchor, AnchorConfig, Precision};
use candle_core::{DType, Device};
use cluster_tree::ClusterPath;
use corpus::{Batch, Corpus, PackOptions, Sequence, SourceOptions, TokenStore, TokeniseOptions, Tokenizer};
use memory_bank::{BankOptions, BlockSpec, Blocking, LocalBank, MemoryKind};
use serde::{Deserialize, Serialize};
use train::{Parts, Phase, TrainConfig, Trainer};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const CPU: (&Device, DType) = (&Device::Cpu, DType::F32);

/// Batches that the steps go round.
const N_BATCHES: usize = 4;

/// What both sides are told.
#[derive(Serialize, Deserialize)]
struct Bench {
    anchor: AnchorConfig,
    train: TrainConfig,
    batch: usize,
    len: usize,
}

impl Bench {
    fn of(size: &str) -> Result<Self> {
        let (d_model, n_layers, n_heads, ffn_width) = match size {
            "small" => (256, 6, 4, 704),
            "medium" => (512, 8, 8, 1408),
            _ => return Err(format!("size {size}: expected small or medium").into()),
        };
        let (batch, len) = (8, 256);
        let anchor = AnchorConfig {
            vocab_size: 8192,
            d_model,
            n_layers,
            n_heads,
            head_width: 64,
            ffn_width,
            tied_embeddings: true,
            max_seq_len: len,
            rope_base: 10_000.0,
            norm_eps: 1e-5,
        };
        let train = TrainConfig {
            phase: Phase::Anchor,
            // The rate stays at its peak, as on the other side.
            learning_rate: 1e-3,
            final_share: 1.0,
            warmup_steps: 0,
            batch_size: batch,
            micro_batch: batch,
            ..TrainConfig::default()
        };
        Ok(Self { anchor, train, batch, len })
    }

    fn load(folder: &Path) -> Result<Self> {
        Ok(serde_json::from_slice(&fs::read(folder.join("bench.json"))?)?)
    }

    fn tokens(&self) -> Vec<u32> {
        let mut state = 1u64;
        let next = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // Skewed, as words are: the product of two uniform numbers.
            let [a, b] = [state >> 48, (state >> 32) & 0xffff].map(|x| x as f64 / 65536.0);
            (a * b * self.anchor.vocab_size as f64) as u32
        };
        (0..N_BATCHES * self.batch * (self.len + 1)).map(next).collect()
    }
}

#[derive(Serialize)]
struct Line {
    step_s: f64,
    parameters: u64,
    peak_mb: u64,
    losses: Vec<f64>,
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let folder = PathBuf::from(args.next().ok_or("expected a folder")?);
    let (mut steps, mut threads, mut memory, mut compute) = (8, 2, None, vec![]);
    while let Some(key) = args.next() {
        let value = args.next().ok_or_else(|| format!("{key}: expected a value"))?;
        match key.as_str() {
            "--make" => return make(&folder, &Bench::of(&value)?),
            "--steps" => steps = value.parse()?,
            "--threads" => threads = value.parse()?,
            "--memory" => memory = Some(value),
            "--compute" => compute = value.split(',').map(String::from).collect(),
            _ => {
                return Err(
                    format!("{key}: expected --make, --steps, --threads, --memory or --compute").into()
                );
            }
        }
    }
    ops::init_process(threads);
    println!("{}", serde_json::to_string(&run(&folder, steps, memory.as_deref(), &compute)?)?);
    Ok(())
}

fn make(folder: &Path, bench: &Bench) -> Result<()> {
    fs::create_dir_all(folder)?;
    Anchor::new(bench.anchor.clone(), 1, CPU)?.save(&folder.join("anchor.safetensors"))?;
    let bytes: Vec<u8> = bench.tokens().into_iter().flat_map(u32::to_le_bytes).collect();
    fs::write(folder.join("tokens.bin"), bytes)?;
    fs::write(folder.join("bench.json"), serde_json::to_vec_pretty(bench)?)?;
    Ok(())
}

fn run(folder: &Path, steps: usize, memory: Option<&str>, compute: &[String]) -> Result<Line> {
    let Bench { anchor, mut train, batch, len } = Bench::load(folder)?;
    let n_parameters = anchor.n_parameters();
    let bank = memory.map(|kind| bank(&anchor, kind)).transpose()?;
    train.steps = steps as u64;
    for word in compute {
        match word.as_str() {
            "bf16" => train.precision = Precision::Bf16,
            "checkpoint" => train.checkpoint_activations = true,
            _ => return Err(format!("--compute {word}: expected bf16 or checkpoint").into()),
        }
    }
    if bank.is_some() {
        train.phase = Phase::Joint;
    }
    let tokens: Vec<u32> = fs::read(folder.join("tokens.bin"))?
        .as_chunks::<4>()
        .0
        .iter()
        .map(|&bytes| u32::from_le_bytes(bytes))
        .collect();
    let scratch = tempfile::tempdir()?;
    let parts = Parts {
        run_dir: scratch.path().into(),
        config: train,
        corpus: Arc::new(corpus(scratch.path())?),
        anchor: Anchor::load(&folder.join("anchor.safetensors"), CPU)?,
        memory: bank,
    };
    let mut trainer = Trainer::new(parts, 0)?;
    let batches = tokens.chunks_exact(batch * (len + 1)).map(|tokens| {
        let sequence = |(i, tokens): (usize, &[u32])| {
            Ok(Sequence {
                path: path(memory.unwrap_or_default(), i as u32)?,
                tokens: tokens.to_vec(),
                doc_starts: vec![0],
                documents: vec![0],
            })
        };
        let sequences = tokens.chunks_exact(len + 1).enumerate().map(sequence).collect::<Result<_>>()?;
        Ok(Batch::new(sequences, u32::MAX))
    });
    let batches = batches.collect::<Result<Vec<_>>>()?;
    let (mut times, mut losses) = (vec![], vec![]);
    for step in 0..steps {
        let began = Instant::now();
        let metrics = trainer.step(&batches[step % batches.len()])?;
        times.push(began.elapsed().as_secs_f64());
        losses.push(metrics.loss);
    }
    let warm = 3.min(steps - 1);
    times.drain(..warm);
    times.sort_by(f64::total_cmp);
    let step_s = times[times.len() / 2];
    Ok(Line { step_s, parameters: n_parameters, peak_mb: peak_mb(), losses })
}

/// Paths of the sequences of a batch in a tree of 16 children at each of 4 levels: all blocks different, or
/// those of levels 1 and 2 shared by all.
fn path(memory: &str, sequence: u32) -> Result<ClusterPath> {
    let leaf = match memory {
        "shared" => sequence << 4,
        _ => sequence << 12,
    };
    Ok(ClusterPath::new((0..4).map(|level| leaf >> (4 * (3 - level))).collect())?)
}

/// Widths 64, 16 and 4 on levels 1 to 3, none on the last.
fn bank(anchor: &AnchorConfig, kind: &str) -> Result<Blocking<LocalBank>> {
    if !["different", "shared"].contains(&kind) {
        return Err(format!("--memory {kind}: expected different or shared").into());
    }
    let spec = BlockSpec {
        kind: MemoryKind::Ffn,
        n_layers: anchor.n_layers,
        d_model: anchor.d_model,
        width: vec![64, 16, 4, 0],
        branching: vec![16; 4],
    };
    let options = BankOptions {
        seed: 1,
        adamw: TrainConfig { warmup_steps: 0, ..TrainConfig::default() }.memory_adamw(),
        world_size: 1,
        checkpoint_root: PathBuf::from("never-saved"),
        hashes: [].into(),
    };
    Ok(Blocking::new(Arc::new(LocalBank::create(spec, options)?))?)
}

/// A trainer has a corpus; this one is never read.
fn corpus(dir: &Path) -> Result<Corpus> {
    let (file, prepared) = (dir.join("corpus.txt"), dir.join("prepared"));
    let text = "one two three four five six seven eight nine ten ".repeat(20);
    fs::write(&file, &text)?;
    let tokenizer = Tokenizer::train([Ok(text)].into_iter(), 270, 1 << 20)?;
    let source = SourceOptions { files: vec![file.display().to_string()], ..SourceOptions::default() };
    let options = TokeniseOptions { window: 64, validation_permille: 0 };
    corpus::tokenise(&source, &tokenizer, &prepared, &options, &mut |_| ())?;
    let n_windows = TokenStore::open(&prepared)?.n_windows();
    let options = PackOptions { seq_len: 64, seed: 1, embedder: String::new(), tree: String::new() };
    corpus::pack(&prepared, &vec![0; n_windows], &[2], &options)?;
    Ok(Corpus::open(&prepared)?)
}

/// Most memory the process ever held, MiB.
fn peak_mb() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) / 1024
}
