//! Commands that ask a finished run: route, generate, bank inspect; and `check`, which asks a
//! configuration.

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};

use anchor::{Compute, TrainingShape};
use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use cluster_tree::ClusterPath;
use generate::{Options, Prompt};

use crate::config::Config;
use crate::prepare::named_embedder;
use crate::run::Run;

/// Texts that are answered together: bounds the memory of a long standard input.
const BATCH: usize = 32;

/// Calls `answer` with the text of an argument, or for `-` with the lines of the standard input, some at a
/// time, and with the number of texts before them.
fn for_texts(argument: &str, mut answer: impl FnMut(&[&str], usize) -> Result<()>) -> Result<()> {
    if argument != "-" {
        return answer(&[argument], 0);
    }
    let mut lines = std::io::stdin().lock().lines();
    let mut n = 0;
    loop {
        let texts = lines.by_ref().take(BATCH).collect::<std::io::Result<Vec<_>>>()?;
        if texts.is_empty() {
            return Ok(());
        }
        if let Some(i) = texts.iter().position(|text| text.trim().is_empty()) {
            bail!("standard input: line {} is empty, expected a text", n + i + 1);
        }
        answer(&texts.iter().map(String::as_str).collect::<Vec<_>>(), n)?;
        n += texts.len();
    }
}

pub(crate) fn route(dir: &Path, text: &str, json: bool) -> Result<()> {
    let retriever = Run::open(dir)?.retriever()?;
    let mut out = std::io::stdout().lock();
    for_texts(text, |texts, _| {
        for (text, routes) in texts.iter().zip(retriever.routes(texts)?) {
            if json {
                let routes: Vec<_> = routes.iter().map(|(path, d)| (path.to_string(), d)).collect();
                writeln!(out, "{}", serde_json::json!({"text": text, "routes": routes}))?;
                continue;
            }
            for (path, distance) in routes {
                writeln!(out, "{:<24} distance {distance:.4}", path.to_string())?;
            }
        }
        Ok(())
    })
}

/// The memory that a prompt is given.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum MemoryArg {
    /// The path of the prompt.
    Fetched,
    /// The context-independent path.
    Generic,
    /// No memory.
    None,
}

#[derive(Args)]
pub(crate) struct GenerateArgs {
    /// Folder of the run.
    run: PathBuf,
    /// The text to continue.
    prompt: String,
    /// Memory to fetch; fetched if the run has a bank.
    #[arg(long, value_enum)]
    memory: Option<MemoryArg>,
    /// Tokens to generate at most.
    #[arg(long)]
    max_new_tokens: Option<usize>,
    /// 0 takes the likeliest token.
    #[arg(long)]
    temperature: Option<f64>,
    /// Sample among the likeliest tokens of this probability together.
    #[arg(long)]
    top_p: Option<f64>,
    /// Seed of the sampling.
    #[arg(long)]
    seed: Option<u64>,
    /// A text that ends the completion; may be given several times.
    #[arg(long)]
    stop: Vec<String>,
    /// Overrides a key of [memory.placement], where the memory is read from; may be given several times.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

pub(crate) fn generate(args: GenerateArgs) -> Result<()> {
    let run = Run::open_with(&args.run, &args.set)?;
    let from = &run.config.generate;
    let options = Options {
        max_new_tokens: args.max_new_tokens.unwrap_or(from.max_new_tokens),
        temperature: args.temperature.unwrap_or(from.temperature),
        top_p: args.top_p.unwrap_or(from.top_p),
        seed: args.seed.unwrap_or(from.seed),
        stop: if args.stop.is_empty() { from.stop.clone() } else { args.stop },
    };
    options.check()?;
    let default = match (run.bank.is_some(), run.is_always_on()) {
        (false, _) => MemoryArg::None,
        (true, true) => MemoryArg::Generic,
        (true, false) => MemoryArg::Fetched,
    };
    let memory = args.memory.unwrap_or(default);
    let retriever = if memory == MemoryArg::Fetched { Some(run.retriever()?) } else { None };
    let paths = |texts: &[&str]| -> Result<Vec<Option<ClusterPath>>> {
        Ok(match (memory, &retriever) {
            (MemoryArg::Fetched, Some(retriever)) => retriever.paths(texts)?.into_iter().map(Some).collect(),
            (MemoryArg::Generic, _) => vec![Some(ClusterPath::generic(run.tree.n_levels())?); texts.len()],
            _ => vec![None; texts.len()],
        })
    };
    for_texts(&args.prompt, |texts, first| {
        let paths = paths(texts)?;
        let prompt = |(text, path): (&&str, &Option<ClusterPath>)| -> Result<Prompt> {
            Ok(Prompt { tokens: run.tokenizer.encode(text)?, path: path.clone() })
        };
        let prompts = texts.iter().zip(&paths).map(prompt).collect::<Result<Vec<_>>>()?;
        // A text's random numbers are those of its place among all.
        let options = Options { seed: options.seed.wrapping_add(first as u64), ..options.clone() };
        let completions = generate::generate(&run.model(), &run.tokenizer, &prompts, &options)?;
        for ((text, path), completion) in texts.iter().zip(&paths).zip(completions) {
            let path = path.as_ref().map_or("no memory".to_string(), ToString::to_string);
            eprintln!("memory: {path}");
            println!("{text}{}", completion.text);
        }
        Ok(())
    })?;
    run.tell_tiers();
    Ok(())
}

/// Sizes that follow from a configuration, before anything is read or trained.
pub(crate) fn check(config: &Config) -> Result<()> {
    let source = config.corpus.source();
    let files = corpus::list(&source)?;
    let held_out = corpus::list_held_out(&source, &files)?;
    let bytes: u64 = files.iter().chain(&held_out).map(|file| file.bytes).sum();
    println!("corpus: {} files ({} held out), {bytes} bytes", files.len() + held_out.len(), held_out.len());
    if let Some(embedder) = named_embedder(config)? {
        println!("embedder: {} dimensions", embedder.dim());
    }
    let vocab_size = match config.tokenizer()? {
        Some(path) => {
            let tokenizer = corpus::Tokenizer::load(&path)?;
            config.check_vocabulary(&tokenizer)?;
            tokenizer.vocab_size()
        }
        None => config.corpus.vocab_size,
    };
    let anchor = config.anchor.config(vocab_size);
    match &config.anchor.checkpoint {
        None => println!("anchor: {} parameters", anchor.n_parameters()),
        Some(checkpoint) => {
            let family = crate::checkpoint::describe(checkpoint)?.family;
            println!("anchor: {} parameters of {} ({family})", anchor.n_parameters(), checkpoint.display());
        }
    }
    let mut pass = TrainingShape {
        micro_batch: config.train.micro_batch.min(config.train.batch_size),
        len: config.corpus.seq_len as usize,
        memory_kind: config.memory.kind,
        memory_width: 0,
        block_parameters: 0,
    };
    let mut bank_bytes = 0;
    if config.train.phase.has_memory() {
        let spec = config.block_spec(config.tree.branching.clone());
        spec.validate()?;
        println!("memory: {} parameters fetched of a bank of {}", spec.fetch_len(), spec.bank_len());
        bank_bytes = spec.bank_len() * 12;
        pass.memory_width = spec.width.iter().sum();
        // Of a level, at most a block for each sequence, the generic one among them.
        let blocks =
            |level: usize| config.train.batch_size.min(spec.n_blocks(level) + 1) * spec.block_len(level);
        pass.block_parameters = spec.levels().map(blocks).sum::<usize>() as u64;
    }
    let tokens = config.train.steps * config.train.batch_size as u64 * u64::from(config.corpus.seq_len);
    println!("training: {} steps, at most {tokens} tokens", config.train.steps);
    let compute =
        Compute { precision: config.train.precision, checkpoint: config.train.checkpoint_activations };
    let mut bytes = anchor.training_bytes(pass, compute);
    if !config.train.phase.trains_anchor() {
        // Neither gradients nor moments.
        bytes.parameters /= 4;
    }
    let mib = |bytes: u64| bytes >> 20;
    println!(
        "bytes: at most {} MiB (anchor with optimizer {}, bank {}, fetched blocks {}, activations {}, workspace {})",
        mib(bytes.total() + bank_bytes),
        mib(bytes.parameters),
        mib(bank_bytes),
        mib(bytes.blocks),
        mib(bytes.activations),
        mib(bytes.workspace)
    );
    Ok(())
}
