//! `anchorage posthoc`: memory added to a checkpoint, beside other ways to learn the same.

mod cloze;
mod corpora;
mod hand_over;
mod measure;
mod report;

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use corpus::Tokenizer;
use eval::MemoryMode;
use launch::Ranks;
use memory_bank::MemoryLayers;
use train::{Assign, Ended, Phase};

use crate::ConfigArgs;
use crate::config::{Config, Method, PosthocSection};
use crate::run::{Run, write_whole};
use crate::training;
use corpora::Corpora;
use measure::{Asked, Measured};

pub(crate) use hand_over::hand_over;

#[derive(Args)]
pub(crate) struct PosthocArgs {
    /// Anchor, corpus, tree and memory as of a run, and the section [posthoc].
    #[command(flatten)]
    config: ConfigArgs,
    /// End with one line of JSON.
    #[arg(long)]
    json: bool,
}

/// All runs of one seed, measured.
pub(crate) struct Seed {
    pub(crate) seed: u64,
    /// In the order of [`Method::ALL`].
    pub(crate) methods: Vec<(Method, Measured)>,
}

/// Trains every method with every seed, measures all, and writes what was found. What is trained or measured already
/// is not again.
pub(crate) fn posthoc(args: &PosthocArgs) -> Result<()> {
    let config = Config::load(&args.config.config, &args.config.set)?;
    let Some(section) = &config.posthoc else {
        bail!("{}: expected a section [posthoc], found none", args.config.config.display());
    };
    report::check_card(section)?;
    let corpora = Corpora::prepare(&config, section)?;
    let methods: Vec<Method> = Method::ALL.into_iter().filter(|m| section.methods.contains(m)).collect();
    let seeds: Vec<u64> = (config.train.seed..).take(section.seeds as usize).collect();
    for &seed in &seeds {
        for &method in &methods {
            let run = method_config(&config, section, (method, seed), &corpora);
            eprintln!("{:>18}: seed {seed}, {}", "posthoc", run.run.dir.display());
            if training::train(&run, &Ranks::alone())? == Ended::Stopped {
                bail!("stopped; the same command goes on");
            }
        }
    }
    let first = dir(&config, Method::Memory, seeds[0]);
    let asked = Asked::open(&config, section, &corpora, &Tokenizer::load(&first.join("tokenizer.json"))?)?;
    // One run at a time is held.
    let before = asked.measure("the checkpoint as it was", &Run::open(&first)?, MemoryMode::None)?;
    let mut measured: Vec<Seed> = vec![];
    for &seed in &seeds {
        let mut of_seed = vec![];
        for &method in &methods {
            let run = Run::open(&dir(&config, method, seed))?;
            let name = format!("seed {seed}, {}", method.name());
            of_seed.push((method, asked.measure(&name, &run, mode(method))?));
        }
        measured.push(Seed { seed, methods: of_seed });
    }
    let first = Run::open(&first)?;
    let command = format!("anchorage posthoc {}", args.config.config.display());
    let study = report::build((&config, section), (&first, &command), &asked, (&before, &measured))?;
    let folder = &config.run.dir;
    write_whole(&folder.join("posthoc.json"), serde_json::to_string(&study)?.as_bytes())?;
    let page = folder.join("posthoc.html");
    write_whole(&page, eval::report::posthoc_html(&study).as_bytes())?;
    let bank = folder.join("hand-over");
    hand_over(&first, &bank, false)?;
    print!("{}", report::table(&study));
    eprintln!("{:>18}: {}", "report", page.display());
    if args.json {
        println!("{}", serde_json::to_string(&study)?);
    }
    Ok(())
}

/// The memory that a method's run is read with.
fn mode(method: Method) -> MemoryMode {
    match method {
        Method::Memory => MemoryMode::Fetched,
        Method::Generic | Method::Lora => MemoryMode::Generic,
        Method::Full | Method::Replay => MemoryMode::None,
    }
}

fn dir(config: &Config, method: Method, seed: u64) -> PathBuf {
    config.run.dir.join(format!("seed{seed}")).join(method.name())
}

/// The run of one method: the configuration's but for what makes the method.
fn method_config(
    config: &Config,
    section: &PosthocSection,
    (method, seed): (Method, u64),
    corpora: &Corpora,
) -> Config {
    let mut run = Config { posthoc: None, ..config.clone() };
    run.run.dir = dir(config, method, seed);
    (run.train.seed, run.memory.seed) = (seed, seed);
    (run.train.phase, run.train.assign) = match method {
        Method::Memory => (Phase::Frozen, Assign::Fetched),
        Method::Generic | Method::Lora => (Phase::Frozen, Assign::AlwaysOn),
        Method::Full | Method::Replay => (Phase::Anchor, Assign::Fetched),
    };
    if method == Method::Lora {
        run.memory.kind = section.lora_kind;
        run.memory.layers = MemoryLayers::Uniform;
        // One block for every text: of the coarsest level.
        run.memory.width = vec![0; run.tree.branching.len()];
        run.memory.width[0] = section.lora_rank;
        run.train.memory_learning_rate = section.lora_learning_rate.unwrap_or(run.train.memory_learning_rate);
    }
    if method == Method::Replay {
        run.corpus = corpora.mixed.corpus.clone();
        run.tree.from = corpora.mixed.tree.from.clone();
    }
    run
}
