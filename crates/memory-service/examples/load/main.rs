//! Our side of bench/shard, one subcommand for each thing that is measured. Those that are asked again and again answer
//! every line of their input by one line of JSON; the others print one line. All end when their input does.
//!
//! `load COMMAND --width 80,20 --branching 64,1`: the bank has 14 layers of 512, unless told otherwise, and these levels.

mod bank;
mod closed_loop;
mod fetch;
mod files;
mod overload;
mod paths;
mod push;
mod serve;
mod train;
mod wire;

use clap::{Parser, Subcommand};
use closed_loop::Result;

/// As the program itself has.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// A shard, whose addresses it prints.
    Serve(serve::Args),
    /// Per line `LEVEL CLIENTS SECONDS`, clients that fetch one block after another.
    Fetch(fetch::Args),
    /// Per line, the seconds of one step: gradients from bytes to updated blocks, in this process.
    Push(push::Args),
    /// Trains for some steps: fetches and pushes, with readers beside.
    Train(train::Args),
    /// Trains for some steps on a random path each.
    Paths(paths::Args),
    /// Bytes on the wire for the blocks of a batch.
    Wire(wire::Args),
    /// Per line, the seconds of one save.
    Save(files::Save),
    /// Makes a bank on the disk, to be served.
    Make(files::Make),
    /// Per line `ADDRESS`, connects and fetches one block.
    First(files::First),
    /// The peak over offered rates, then twice as much.
    Overload(overload::Args),
}

fn main() -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    match Args::parse().command {
        Command::Serve(args) => runtime.block_on(serve::run(args)),
        Command::Fetch(args) => fetch::run(args, &runtime),
        Command::Push(args) => push::run(args),
        Command::Train(args) => runtime.block_on(train::run(args)),
        Command::Paths(args) => runtime.block_on(paths::run(args)),
        Command::Wire(args) => runtime.block_on(wire::run(args)),
        Command::Save(args) => files::save(args, &runtime),
        Command::Make(args) => runtime.block_on(files::make(args)),
        Command::First(args) => files::first(args, &runtime),
        Command::Overload(args) => runtime.block_on(overload::run(args)),
    }
}
