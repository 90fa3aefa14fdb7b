//! `anchorage-shard`: one shard of a memory bank, without the rest of Anchorage.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use shard_host::{ShardArgs, ShardConfig};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Serve one shard of a memory bank.
#[derive(Parser)]
#[command(name = "anchorage-shard", version, max_term_width = 100)]
struct Args {
    /// The bank and how to serve it, one TOML; `anchorage bank describe RUN.toml` makes one.
    config: PathBuf,
    #[command(flatten)]
    shard: ShardArgs,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let environment: Vec<(String, String)> = std::env::vars().collect();
    let served = ShardConfig::load(&args.config).and_then(|config| args.shard.serve(config, &environment));
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", error.to_string().replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}
