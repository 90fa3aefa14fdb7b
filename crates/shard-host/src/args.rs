use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use memory_bank::{Placement, Step};

use crate::{Error, Logs, ShardConfig, Start, run, start_logs, told_to_stop};

/// What differs between the shards of a bank.
#[derive(Args, Clone, Debug)]
pub struct ShardArgs {
    /// Which shard this is, from 0.
    #[arg(long, default_value_t = 0)]
    pub shard: usize,
    /// Shards of the bank.
    #[arg(long = "of", default_value_t = 1)]
    pub n_shards: usize,
    /// Workers whose pushes make a step, instead of bank.world_size.
    #[arg(long)]
    pub workers: Option<usize>,
    /// Address of gRPC, instead of serve.listen.
    #[arg(long)]
    pub listen: Option<SocketAddr>,
    /// Address of /metrics, /live and /ready, instead of serve.http.
    #[arg(long)]
    pub http: Option<SocketAddr>,
    /// Listen beyond loopback without certificates.
    #[arg(long)]
    pub insecure: bool,
    /// Begin with the checkpoint `newest` (if there is one), with that of a step, or from the `initial` state.
    #[arg(long, default_value = "newest", value_parser = parse_start)]
    pub start: Start,
    /// Serve the bank of this folder to be fetched from only.
    #[arg(long, conflicts_with = "start")]
    pub read_only: Option<PathBuf>,
    /// How log lines look.
    #[arg(long, value_enum, default_value_t)]
    pub log: Logs,
    /// Least important log lines shown.
    #[arg(long, default_value = "info")]
    pub log_level: tracing::Level,
}

impl ShardArgs {
    /// Serves the shard until the process is told to stop.
    pub fn serve(self, mut config: ShardConfig, environment: &[(String, String)]) -> Result<(), Error> {
        start_logs(self.log, self.log_level);
        // An array of a block is no multiple of 2 MiB: what huge pages round up is 7 % of a bank.
        #[cfg(target_os = "linux")]
        let _ = rustix::thread::disable_transparent_huge_pages(true);
        config.serve.listen = self.listen.unwrap_or(config.serve.listen);
        config.bank.world_size = self.workers.unwrap_or(config.bank.world_size);
        config.serve.http = self.http.or(config.serve.http);
        config.serve.insecure |= self.insecure;
        let placement = Placement { shard: self.shard, n_shards: self.n_shards };
        placement.validate()?;
        let start = self.read_only.map_or(self.start, Start::ReadOnly);
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        runtime.block_on(async {
            let stop = told_to_stop()?;
            run(config, placement, start, environment, stop).await
        })
    }
}

fn parse_start(text: &str) -> Result<Start, String> {
    match text {
        "newest" => Ok(Start::Newest),
        "initial" => Ok(Start::Initial),
        step => match step.parse() {
            Ok(step) => Ok(Start::Step(Step(step))),
            Err(_) => Err("expected newest, initial or a step".to_owned()),
        },
    }
}
