//! Our side of bench/train: times whole optimizer steps of one anchor, without a corpus behind them.
//!
//! `step FOLDER [--make SIZE] [--steps N] [--threads N] [--memory different|shared] [--compute bf16,checkpoint]
//! [--data corpus] [--peak f32|bf16] [--only updates]`: with `--make` it writes what both sides read (weights,
//! tokens, memory, settings) and ends; with `--peak` it tells how fast matrix products are; with `--only updates` it
//! answers each line of its input by the seconds of one AdamW update, without and with clipping; else it trains on what was made and prints one
//! line of JSON.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anchor::{Anchor, AnchorConfig, Precision, unique_ids};
use candle_core::{DType, Device, Tensor};
use cluster_tree::ClusterPath;
use corpus::{Batch, Corpus, PackOptions, Sequence, SourceOptions, TokenStore, TokeniseOptions, Tokenizer};
use memory_bank::{BankOptions, BlockSpec, BlockStore, Blocking, LocalBank, Step};
use ops::{AdamW, Tape, Traced};
use serde::{Deserialize, Serialize};
use train::{Attempt, Parts, Phase, StepMetrics, StepTime, TrainConfig, Trainer, Workers};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const CPU: (&Device, DType) = (&Device::Cpu, DType::F32);

/// Batches that the steps go round: as many as the losses are compared over, none seen twice.
const N_BATCHES: usize = 200;

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
            form: anchor::Form::default(),
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

/// Widths of the memory levels at this d_model: 64, 16 and 4 at 256, and none on the last level.
fn widths(d_model: usize) -> Vec<usize> {
    vec![d_model / 4, d_model / 16, d_model / 64, 0]
}

#[derive(Serialize)]
struct Line {
    step_s: f64,
    /// Share of the time that steps waited for data; of handmade batches there is none.
    data_share: f64,
    /// Of the last step.
    time: StepTime,
    parameters: u64,
    /// Of the matrix products of a step.
    flops: u64,
    peak_mb: u64,
    losses: Vec<f64>,
}

/// What the command line asks for.
struct Options {
    folder: PathBuf,
    steps: usize,
    threads: usize,
    memory: Option<String>,
    compute: Vec<String>,
    /// Whether batches come from a corpus through the loader, not made by hand.
    corpus: bool,
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let folder = PathBuf::from(args.next().ok_or("expected a folder")?);
    let mut options = Options { folder, steps: 8, threads: 2, memory: None, compute: vec![], corpus: false };
    while let Some(key) = args.next() {
        let value = args.next().ok_or_else(|| format!("{key}: expected a value"))?;
        match key.as_str() {
            "--make" => return make(&options.folder, &Bench::of(&value)?),
            "--steps" => options.steps = value.parse()?,
            "--threads" => options.threads = value.parse()?,
            "--memory" => options.memory = Some(value),
            "--compute" => options.compute = value.split(',').map(String::from).collect(),
            "--data" if value == "corpus" => options.corpus = true,
            "--peak" => return peak(options.threads, &value),
            "--only" if value == "updates" => return updates(&options),
            _ => return Err(format!("{key} {value}: not an option").into()),
        }
    }
    ops::init_process(options.threads);
    println!("{}", serde_json::to_string(&run(&options)?)?);
    Ok(())
}

fn make(folder: &Path, bench: &Bench) -> Result<()> {
    fs::create_dir_all(folder)?;
    Anchor::new(bench.anchor.clone(), 1, CPU)?.save(&folder.join("anchor.safetensors"))?;
    let bytes: Vec<u8> = bench.tokens().into_iter().flat_map(u32::to_le_bytes).collect();
    fs::write(folder.join("tokens.bin"), bytes)?;
    for kind in ["different", "shared"] {
        let bank = bank(&bench.anchor, kind)?;
        let spec = bank.store().spec();
        let paths = (0..bench.batch as u32).map(|i| path(kind, i)).collect::<Result<Vec<_>>>()?;
        // Per level [blocks, layers, 3, R, D], blocks in the order of their first sequence.
        let mut levels: Vec<Vec<u8>> = vec![vec![]; spec.n_levels()];
        for block in bank.fetch(Step(0), &unique_ids(&paths, spec))? {
            let bytes = block.values.iter().flat_map(|x| x.to_le_bytes());
            levels[usize::from(block.id.level)].extend(bytes);
        }
        for level in spec.levels() {
            fs::write(folder.join(format!("memory-{kind}-{level}.bin")), &levels[level])?;
        }
    }
    fs::write(folder.join("bench.json"), serde_json::to_vec_pretty(bench)?)?;
    Ok(())
}

/// The most FLOP/s that a matrix product of ours reaches here, of operands that fit the caches.
fn peak(threads: usize, precision: &str) -> Result<()> {
    ops::init_process(threads);
    let precision = match precision {
        "f32" => Precision::F32,
        "bf16" => Precision::Bf16,
        _ => return Err(format!("--peak {precision}: expected f32 or bf16").into()),
    };
    let (m, n, k) = (1024, 1024, 1024);
    let ones = |shape: (usize, usize)| {
        Ok::<_, candle_core::Error>(Traced::constant(Tensor::ones(shape, DType::F32, &Device::Cpu)?))
    };
    let (x, w) = (ones((m, k))?, ones((n, k))?);
    let mut best = f64::INFINITY;
    for _ in 0..60 {
        let began = Instant::now();
        ops::linear(&mut Tape::off(precision), None, &x, &w)?;
        best = best.min(began.elapsed().as_secs_f64());
    }
    println!("{}", serde_json::json!({ "flops_per_s": (2 * m * n * k) as f64 / best }));
    Ok(())
}

/// Per line of input, the norm of all gradients and one update of all parameters: prints the seconds of the update
/// and those of both.
fn updates(options: &Options) -> Result<()> {
    ops::init_process(options.threads);
    let train = Bench::load(&options.folder)?.train;
    let anchor = Anchor::load(&options.folder.join("anchor.safetensors"), CPU)?;
    let like = |weights: &Tensor| -> Result<_> {
        Ok((weights.affine(1e-3, 1e-3)?, [weights.zeros_like()?, weights.zeros_like()?]))
    };
    let states = anchor.parameters().values().map(like).collect::<Result<Vec<_>>>()?;
    for (step, line) in (1..).zip(std::io::stdin().lines()) {
        line?;
        let adamw = AdamW {
            learning_rate: train.learning_rate,
            beta1: train.beta1,
            beta2: train.beta2,
            eps: train.eps,
            weight_decay: train.weight_decay,
            step,
            gradient_scale: 1.0,
        };
        let began = Instant::now();
        ops::on_pool(|| {
            let mut gradients = states.iter().map(|(gradient, _)| ops::sum_of_squares(gradient));
            gradients.try_fold(0.0, |sum, square| square.map(|square| sum + square))
        })?;
        let before_update = Instant::now();
        ops::on_pool(|| {
            let mut each = anchor.parameters().values().zip(&states);
            each.try_for_each(|(weights, (gradient, [m, v]))| {
                ops::adamw_step(weights, gradient, [m, v], adamw)
            })
        })?;
        println!("{} {}", before_update.elapsed().as_secs_f64(), began.elapsed().as_secs_f64());
    }
    Ok(())
}

fn run(options: &Options) -> Result<Line> {
    let folder = &options.folder;
    let Bench { anchor, mut train, batch, len } = Bench::load(folder)?;
    let n_parameters = anchor.n_parameters();
    let bank = options.memory.as_ref().map(|kind| bank(&anchor, kind)).transpose()?;
    train.steps = options.steps as u64;
    for word in &options.compute {
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
    let fetch_len = bank.as_ref().map_or(0, |bank| bank.store().spec().fetch_len());
    let flops = anchor.training_flops(len, fetch_len) * (batch * len) as u64;
    let scratch = tempfile::tempdir()?;
    let parts = Parts {
        attempt: Attempt::begin(scratch.path(), None)?,
        config: train,
        corpus: Arc::new(corpus(scratch.path(), len)?),
        anchor: Anchor::load(&folder.join("anchor.safetensors"), CPU)?,
        memory: bank,
        workers: Workers::alone(),
    };
    let mut trainer = Trainer::new(parts, 0)?;
    let (mut times, mut losses, mut seconds) = (vec![], vec![], vec![]);
    let mut began = Instant::now();
    let mut record = |line: &StepMetrics| {
        seconds.push(began.elapsed().as_secs_f64());
        times.push(line.time);
        losses.push(line.loss);
        began = Instant::now();
    };
    if options.corpus {
        trainer.run(&mut record)?;
    } else {
        let kind = options.memory.as_deref().unwrap_or_default();
        let sequence = |(i, tokens): (usize, &[u32])| {
            let (tokens, doc_starts) = (tokens.to_vec(), vec![0]);
            Ok(Sequence { path: path(kind, i as u32)?, tokens, doc_starts, documents: vec![0] })
        };
        let batches = tokens.chunks_exact(batch * (len + 1)).map(|tokens| {
            let sequences = tokens.chunks_exact(len + 1).enumerate().map(sequence).collect::<Result<_>>()?;
            Ok(Batch::new(sequences, u32::MAX))
        });
        let batches = batches.collect::<Result<Vec<_>>>()?;
        for step in 0..options.steps {
            record(&trainer.step(&batches[step % batches.len()])?);
        }
    }
    let warm = 3.min(options.steps - 1);
    let data_s: f64 = times[warm..].iter().map(|time| time.data_ms / 1e3).sum();
    Ok(Line {
        step_s: median(&seconds[warm..]),
        data_share: data_s / seconds[warm..].iter().sum::<f64>(),
        time: times[times.len() - 1],
        parameters: n_parameters,
        flops,
        peak_mb: peak_mb(),
        losses,
    })
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
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

/// A bank of those widths.
fn bank(anchor: &AnchorConfig, kind: &str) -> Result<Blocking<LocalBank>> {
    if !["different", "shared"].contains(&kind) {
        return Err(format!("--memory {kind}: expected different or shared").into());
    }
    let spec = BlockSpec::ffn(anchor.n_layers, anchor.d_model, widths(anchor.d_model), vec![16; 4]);
    let options = BankOptions {
        staleness: 0,
        seed: 1,
        adamw: TrainConfig { warmup_steps: 0, ..TrainConfig::default() }.memory_adamw(),
        world_size: 1,
        checkpoint_root: PathBuf::from("never-saved"),
        offload: None,
        hashes: [].into(),
    };
    Ok(Blocking::new(Arc::new(LocalBank::create(spec, options)?))?)
}

/// A small corpus of random words, packed to sequences of `len` tokens.
fn corpus(dir: &Path, len: usize) -> Result<Corpus> {
    let (file, prepared) = (dir.join("corpus.jsonl"), dir.join("prepared"));
    let document = |i: u64| {
        let word = |j: u64| format!("w{} ", (i * 7919 + j * j * 31) % 4093);
        (0..300).map(word).collect::<String>()
    };
    let texts: Vec<String> = (0..200).map(document).collect();
    let lines: Vec<String> =
        texts.iter().map(|text| serde_json::json!({ "text": text }).to_string()).collect();
    fs::write(&file, lines.join("\n"))?;
    let tokenizer = Tokenizer::train(texts.into_iter().map(Ok), 1024, 1 << 20)?;
    let source = SourceOptions { files: vec![file.display().to_string()], ..SourceOptions::default() };
    let options = TokeniseOptions { window: len as u32, validation_permille: 0 };
    corpus::tokenise(&source, &tokenizer, &prepared, &options, &mut |_| ())?;
    let n_windows = TokenStore::open(&prepared)?.n_windows();
    let options = PackOptions { seq_len: len as u32, seed: 1, embedder: String::new(), tree: String::new() };
    corpus::pack(&prepared, &vec![0; n_windows], &[2], &options)?;
    Ok(Corpus::open(&prepared)?)
}

/// Most memory the process ever held, MiB.
fn peak_mb() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) / 1024
}
