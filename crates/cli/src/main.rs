//! `anchorage`: the command line over the whole system.

mod bank;
mod checkpoint;
mod config;
mod evaluate;
mod facts;
mod plan;
mod posthoc;
mod prepare;
mod progress;
mod query;
mod quickstart;
mod report;
mod roles;
mod routing;
mod run;
mod serve;
mod shards;
mod site;
mod status;
mod study;
mod submit;
mod summary;
mod task;
mod training;
mod tree;
mod up;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, Parser, Subcommand};

use launch::{REQUEUE, Ranks};
use train::Ended;

use crate::config::Config;
use crate::run::Run;

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
    /// From nothing to a comparison: make a corpus of facts, cluster it, train an anchor, then train it on
    /// without memory, with always-on parameters and with fetched memory, and ask all of them.
    Quickstart {
        /// Folder to work in; what is there already is not done again.
        #[arg(long, default_value = "runs/quickstart")]
        dir: PathBuf,
        /// First seed.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Seeds, one after the other.
        #[arg(long, default_value_t = 1)]
        seeds: u64,
        /// End with one line of JSON.
        #[arg(long)]
        json: bool,
        /// Overrides a key of all its runs; may be given several times.
        #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
        set: Vec<String>,
    },
    /// Write a corpus whose content is known.
    Corpus {
        #[command(subcommand)]
        kind: CorpusKind,
    },
    /// Tokenise, embed, cluster and pack the corpus of a run; unchanged stages are skipped.
    Prepare(ConfigArgs),
    /// Prepare the corpus if need be and train, from the newest checkpoint if there is one. Started by
    /// torchrun, srun or mpirun it is one of the job's workers.
    Train(ConfigArgs),
    /// Train with several workers and memory shards, processes of this machine that are started, watched and
    /// started again when they are killed.
    Up(up::UpArgs),
    /// Train as a job of a site with Slurm or Kubernetes.
    Submit(submit::SubmitArgs),
    /// The job that a run was submitted as.
    Job {
        #[command(subcommand)]
        command: submit::JobCommand,
    },
    /// One process of such a job, which is started again when it is killed: its script has this on each node.
    #[command(hide = true)]
    Task(task::TaskArgs),
    /// Make one run of the jobs that each trained a subtree (train.subtree).
    Merge(training::MergeArgs),
    /// Show the workers and shards of a run that trains.
    Top(status::top::TopArgs),
    /// The cluster path of a text, best first, with squared distances; `-` routes each line of the
    /// standard input.
    Route {
        /// Folder of the run.
        run: PathBuf,
        /// The text.
        text: String,
        /// One line of JSON a text.
        #[arg(long)]
        json: bool,
    },
    /// Routers compared on the texts of a run: do they find the nearest leaf, what does a miss cost, and where
    /// do short prompts go? Writes route-study.html.
    RouteStudy(study::StudyArgs),
    /// Continue a text with the memory that it fetches; `-` continues each line of the standard input.
    Generate(query::GenerateArgs),
    /// Checkpoints of memory banks: look at them, check them, join them, write them in other forms.
    Bank {
        #[command(subcommand)]
        command: bank::BankCommand,
    },
    /// Write the anchor of a run, or of another checkpoint, as a folder that transformers loads.
    Export {
        /// A run, a model folder of the Hugging Face hub, or a llama2.c file.
        from: PathBuf,
        /// The folder to write.
        folder: PathBuf,
    },
    /// Add memory to a checkpoint whose weights stay, do the same by other means with as many tokens, and measure what
    /// each gained and what it damaged. Writes posthoc.html, and the bank to hand over.
    Posthoc(posthoc::PosthocArgs),
    /// Serve a run over HTTP: completions with memory in the form of OpenAI's, memory by text, and a page.
    Serve(serve::ServeArgs),
    /// Serve one shard of a run's memory bank.
    Shard {
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        shard: shard_host::ShardArgs,
    },
    /// Make certificates for shards and those who reach them.
    Certs {
        #[command(subcommand)]
        command: shards::CertsCommand,
    },
    /// Look at the cluster tree of a prepared corpus, and edit it.
    Tree {
        #[command(subcommand)]
        command: tree::TreeCommand,
    },
    /// Check a configuration: keys, values, files, sizes and the memory that it needs.
    Check(ConfigArgs),
    /// What a job would hold, move, take and cost, without running it.
    Plan(plan::PlanArgs),
    /// Show configurations.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Loss and closed-book recall of a run under every kind of memory.
    Eval {
        /// Folder of the run.
        run: PathBuf,
        /// End with one line of JSON.
        #[arg(long)]
        json: bool,
        /// Overrides a key of the run's sections [eval], [retrieve] and [memory.placement] for this evaluation; may
        /// be given several times.
        #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
        set: Vec<String>,
    },
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Print the resolved configuration: every key with its value.
    Print(ConfigArgs),
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
    let number = |name| variable(name).and_then(|n| n.parse::<usize>().ok()).filter(|n| *n > 0);
    // Those who share a machine share its cores; a job's step may be on more of them than a task is to use.
    let threads = number("SLURM_CPUS_PER_TASK").map_or(threads, |n| n.min(threads));
    ops::init_process(threads.div_ceil(number("LOCAL_WORLD_SIZE").unwrap_or(1)));
    if variable(launch::CHILD).is_some() {
        launch::end_with_parent();
    }
    match run(Cli::parse().command) {
        Ok(ended) => ended,
        Err(error) => {
            eprintln!("error: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// What a launcher learns of how a run ended.
fn exit_code(ended: Ended) -> ExitCode {
    match ended {
        Ended::Done => ExitCode::SUCCESS,
        Ended::Stopped => ExitCode::from(REQUEUE),
    }
}

/// An error with its causes, each told once: many of our messages end in that of their cause.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line += &format!(": {cause}");
        }
    }
    line.replace('\n', " ")
}

/// Fails on a setting that decided the training.
fn only_reported(set: &[String]) -> Result<()> {
    let keys = ["eval.", "retrieve.", "memory.placement.", "memory.tls.", "memory.token_file"];
    let is_reported = |setting: &str| keys.iter().any(|key| setting.trim_start().starts_with(key));
    match set.iter().find(|setting| !is_reported(setting)) {
        None => Ok(()),
        Some(setting) => bail!(
            "--set {setting}: expected a key of [eval], [retrieve] or [memory.placement]: the rest was decided when \
             the run was trained"
        ),
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Quickstart { dir, seed, seeds, json, set } => {
            let options =
                quickstart::Quickstart { dir, first_seed: seed, n_seeds: seeds, json, overrides: set };
            quickstart::quickstart(&options)?;
        }
        Command::Corpus { kind: CorpusKind::Facts { out, seed, set } } => facts::write(&out, seed, &set)?,
        Command::Prepare(args) => {
            prepare::prepare(&Config::load(&args.config, &args.set)?)?;
        }
        Command::Train(args) => {
            let config = Config::load(&args.config, &args.set)?;
            return Ok(exit_code(training::train(&config, &Ranks::of(variable)?)?));
        }
        Command::Merge(args) => training::merge(&args)?,
        Command::Top(args) => status::top::top(&args)?,
        Command::Up(args) => return Ok(exit_code(up::up(&args)?)),
        Command::Submit(args) => submit::submit(&args)?,
        Command::Job { command } => submit::job(&command)?,
        Command::Task(args) => return Ok(exit_code(task::task(&args)?)),
        Command::Route { run, text, json } => query::route(&run, &text, json)?,
        Command::Generate(args) => {
            only_reported(&args.set)?;
            query::generate(args)?;
        }
        Command::Export { from, folder } => checkpoint::export(&from, &folder)?,
        Command::Posthoc(args) => posthoc::posthoc(&args)?,
        Command::Serve(args) => serve::serve(args)?,
        Command::Bank { command } => bank::run(command)?,
        Command::Shard { config, shard } => {
            shards::serve(&Config::load(&config.config, &config.set)?, shard)?;
        }
        Command::Certs { command } => shards::certs(command)?,
        Command::Tree { command } => tree::run(command)?,
        Command::Plan(args) => plan::plan(&args)?,
        Command::Check(args) => query::check(&Config::load(&args.config, &args.set)?)?,
        Command::Config { command: ConfigCommand::Print(args) } => {
            print!("{}", Config::load(&args.config, &args.set)?.to_toml()?);
        }
        Command::RouteStudy(args) => {
            only_reported(&args.set)?;
            study::study(&args)?;
        }
        Command::Eval { run, json, set } => {
            only_reported(&set)?;
            let run = Run::open_with(&run, &set)?;
            let evaluations = [evaluate::evaluate(&run)?];
            run.tell_tiers();
            print!("{}", summary::table(&evaluations));
            if json {
                println!("{}", serde_json::to_string(&summary::summarise(&evaluations))?);
            }
            let page = report::write(&run, &evaluations[0])?;
            eprintln!("report: {}", page.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}
