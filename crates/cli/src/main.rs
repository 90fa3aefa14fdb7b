//! `anchorage`: the command line over the whole system.

mod config;
mod evaluate;
mod facts;
mod prepare;
mod progress;
mod run;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use crate::config::Config;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Pretrain language models with hierarchical memories.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct ConfigArgs {
    /// A run's configuration, one TOML.
    config: PathBuf,
    /// Overrides a key; may be given several times.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Write a corpus whose content is known.
    Corpus {
        #[command(subcommand)]
        kind: CorpusKind,
    },
    /// Tokenise, embed, cluster and pack the corpus of a run; unchanged stages are skipped.
    Prepare(ConfigArgs),
    /// Prepare the corpus if need be and train, from the newest checkpoint if there is one.
    Train(ConfigArgs),
    /// Loss and closed-book recall of a run under every kind of memory.
    Eval {
        /// Folder of the run.
        run: PathBuf,
        /// End with one line of JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Subcommand)]
enum CorpusKind {
    /// A closed world of elements, countries and invented people, companies and places: corpus,
    /// held-out documents and closed-book questions.
    Facts {
        /// Folder to write to.
        out: PathBuf,
        /// Decides names, facts and wording.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Further options, as in facts.json: `--set families=256`, `--set ladder=[6,14,32,80,200]`.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
}

fn main() -> ExitCode {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    ops::init_threads(threads);
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Corpus { kind: CorpusKind::Facts { out, seed, set } } => facts::write(&out, seed, &set)?,
        Command::Prepare(args) => {
            prepare::prepare(&Config::load(&args.config, &args.set)?)?;
        }
        Command::Train(args) => {
            let config = Config::load(&args.config, &args.set)?;
            let prepared = prepare::prepare(&config)?;
            run::train(&config, &prepared)?;
        }
        Command::Eval { run, json } => {
            let evaluations = [evaluate::evaluate(&run)?];
            print!("{}", evaluate::table(&evaluations));
            if json {
                println!("{}", serde_json::to_string(&evaluate::summarise(&evaluations))?);
            }
        }
    }
    Ok(())
}
