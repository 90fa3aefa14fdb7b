//! `anchorage quickstart`: the main job from nothing, and what memory is worth.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};
use launch::Ranks;
use train::Ended;

use crate::config::Config;
use crate::evaluate::{Evaluation, evaluate};
use crate::run::Run;
use crate::{facts, report, summary, training};

/// The runs, in the order in which they are trained; the last one is compared with the others.
const RUNS: [(&str, &str); 4] = [
    ("anchor", include_str!("../../../configs/facts/anchor.toml")),
    ("none", include_str!("../../../configs/facts/none.toml")),
    ("always_on", include_str!("../../../configs/facts/always_on.toml")),
    ("memory", include_str!("../../../configs/facts/memory.toml")),
];

/// Where to work and how often.
pub(crate) struct Quickstart {
    pub(crate) dir: PathBuf,
    pub(crate) first_seed: u64,
    pub(crate) n_seeds: u64,
    pub(crate) json: bool,
    pub(crate) overrides: Vec<String>,
}

/// Keys that follow from the folder and the seed.
const DECIDED: [&str; 13] = [
    "run.dir",
    "corpus.prepared",
    "corpus.files",
    "corpus.validation_files",
    "corpus.seed",
    "embed.seed",
    "tree.seed",
    "memory.seed",
    "train.seed",
    "anchor.init",
    "eval.none",
    "eval.always_on",
    "eval.questions",
];

pub(crate) fn quickstart(options: &Quickstart) -> Result<()> {
    let key = |setting: &String| setting.split('=').next().unwrap_or_default().trim().to_string();
    if let Some(key) = options.overrides.iter().map(key).find(|key| DECIDED.contains(&key.as_str())) {
        bail!("--set {key}: expected a key that --dir, --seed and --seeds do not decide");
    }
    let began = Instant::now();
    let mut evaluations = vec![];
    for seed in options.first_seed..options.first_seed + options.n_seeds {
        let evaluation = one_seed(&options.dir.join(format!("seed{seed}")), seed, &options.overrides)?;
        println!("\nseed {seed}");
        print!("{}", summary::table(std::slice::from_ref(&evaluation)));
        evaluations.push(evaluation);
    }
    if evaluations.len() > 1 {
        println!("\nall {} seeds", evaluations.len());
        print!("{}", summary::table(&evaluations));
    }
    println!("\nloss: nats per token on held-out documents. exact match: questions in the wording of the");
    println!("corpus, with 95 % intervals, from the rarest bucket of entities to the commonest.");
    if options.json {
        let mut line = summary::summarise(&evaluations);
        line.seconds = began.elapsed().as_secs_f64();
        println!("{}", serde_json::to_string(&line)?);
    }
    Ok(())
}

fn one_seed(dir: &Path, seed: u64, overrides: &[String]) -> Result<Evaluation> {
    let data = dir.join("data");
    if !data.join("facts.json").exists() {
        facts::generate(&data, &facts::options(seed, &[])?)?;
    }
    let memory = dir.join("memory");
    for (name, text) in RUNS {
        let config = config(dir, (name, text), seed, overrides)?;
        if training::train(&config, &Ranks::alone())? == Ended::Stopped {
            bail!("stopped; the same command goes on");
        }
    }
    let run = Run::open(&memory)?;
    let evaluation = evaluate(&run)?;
    let page = report::write(&run, &evaluation)?;
    eprintln!("{:>18}: {}", "report", page.display());
    Ok(evaluation)
}

/// A configuration of `configs/facts`, moved to `dir` and to another seed.
fn config(dir: &Path, (name, text): (&str, &str), seed: u64, overrides: &[String]) -> Result<Config> {
    let file = format!("configs/facts/{name}.toml");
    let mut config = Config::parse(text, &file, overrides)?;
    let data = dir.join("data");
    config.run.dir = dir.join(name);
    config.corpus.prepared = dir.join("prepared");
    config.corpus.files = vec![data.join("corpus.jsonl").display().to_string()];
    config.corpus.validation_files = vec![data.join("validation.jsonl").display().to_string()];
    config.corpus.seed = seed;
    config.embed.seed = seed;
    config.tree.seed = seed;
    config.memory.seed = seed;
    config.train.seed = seed;
    config.anchor.init = config.anchor.init.map(|_| dir.join("anchor"));
    config.eval.none = config.eval.none.map(|_| dir.join("none"));
    config.eval.always_on = config.eval.always_on.map(|_| dir.join("always_on"));
    config.eval.questions = config.eval.questions.map(|_| data.join("questions.jsonl"));
    Ok(config)
}
