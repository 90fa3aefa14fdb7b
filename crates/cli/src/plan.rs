//! `anchorage plan`: what a job holds, moves and takes, before it runs.

mod replayed;

use std::path::PathBuf;

use anchor::{Compute, TrainingShape};
use anyhow::{Result, bail};
use clap::Args;
use cluster_tree::ClusterTree;
use corpus::{Corpus, Tokenizer};
use memory_bank::BlockSpec;
use memory_service::Dtype;
use serde::Serialize;
use train::LevelTraffic;

use crate::ConfigArgs;
use crate::config::Config;
use crate::prepare::Prepared;
use crate::site::{Site, Speeds};
use crate::training::block_spec;

use replayed::ReplayedPlan;

#[derive(Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The site, such as cluster/h100.toml: speeds, sizes and prices of its machines.
    #[arg(long)]
    site: PathBuf,
    /// Workers.
    #[arg(long, default_value_t = 1)]
    workers: usize,
    /// Shards.
    #[arg(long, default_value_t = 1)]
    shards: usize,
    /// Count blocks in the batches of so many steps that the sampler makes of the prepared corpus, instead of
    /// what the sizes of clusters let expect.
    #[arg(long, value_name = "STEPS")]
    simulate: Option<u64>,
    /// With --simulate: sizes of a worker's cache (memory.cache_mib) to be replayed, as MiB, several with commas.
    #[arg(long, value_name = "MIB", value_delimiter = ',', default_value = "16,256")]
    cache_mib: Vec<u64>,
    /// Tokens of the run, instead of train.steps.
    #[arg(long)]
    tokens: Option<f64>,
    /// End with one line of JSON.
    #[arg(long)]
    json: bool,
}

/// Bytes of a parameter with its two moments, in f32.
const STATE_BYTES: f64 = 12.0;
/// Bytes that an update moves for a parameter: weights, moments and gradient read, weights and moments written.
const UPDATE_BYTES: f64 = 28.0;
/// Sequences whose clusters are looked at for expectations.
const LOOKED_AT: u64 = 200_000;
const GIB: f64 = (1u64 << 30) as f64;

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Plan {
    workers: usize,
    shards: usize,
    anchor_parameters: u64,
    fetch_parameters: u64,
    bank_parameters: u64,
    levels: Vec<LevelPlan>,
    /// With --simulate: all of its steps under other policies, the run's own first.
    replayed: Vec<ReplayedPlan>,
    /// Of a step, all workers together.
    fetched_bytes: f64,
    pushed_bytes: f64,
    /// Fetched and pushed, one path for each sequence.
    naive_bytes: f64,
    /// What a worker sends to others: gradients of the anchor, and of blocks that several have.
    exchanged_bytes_per_worker: f64,
    worker_gib: f64,
    /// Of replicated levels, in the memory of a worker's host.
    copies_gib: f64,
    shard_gib: f64,
    tokens_per_step: f64,
    /// Seconds of a step.
    compute_s: f64,
    exchange_s: f64,
    worker_network_s: f64,
    shard_network_s: f64,
    shard_update_s: f64,
    step_s: f64,
    /// The longest of them.
    bound_by: &'static str,
    mfu: f64,
    tokens_per_s: f64,
    steps: f64,
    hours: f64,
    dollars: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
struct LevelPlan {
    level: usize,
    blocks: usize,
    block_bytes: u64,
    replicated: bool,
    unique: f64,
    by_worker: f64,
}

pub(crate) fn plan(args: &PlanArgs) -> Result<()> {
    let config = Config::load(&args.config.config, &args.config.set)?;
    let site = Site::load(&args.site)?.speeds(&args.site)?;
    for (flag, found) in [("--workers", args.workers), ("--shards", args.shards)] {
        if found == 0 {
            bail!("{flag}: expected at least 1, found 0");
        }
    }
    let leaves = config.train.batch_size.div_ceil(config.train.micro_batch);
    if leaves < args.workers {
        bail!(
            "train.micro_batch: expected at least {} micro-batches, one for each worker, found {leaves}",
            args.workers
        );
    }
    let prepared = Prepared::of(&config);
    let has_memory = config.train.phase.has_memory();
    let corpus = match corpus::stage_is_finished(&prepared.dir, "pack")? {
        true => Some(Corpus::open(&prepared.dir)?),
        false => None,
    };
    let spec = match (&corpus, has_memory) {
        (Some(_), true) => Some(block_spec(&config, &ClusterTree::load(&prepared.tree())?)),
        (None, true) => Some(config.block_spec(config.tree.branching.clone())),
        (_, false) => None,
    };
    let vocab_size = match &corpus {
        Some(corpus) => corpus.vocab_size(),
        None => match config.tokenizer()? {
            Some(path) => Tokenizer::load(&path)?.vocab_size(),
            None => config.corpus.vocab_size,
        },
    };
    let traffic = match &spec {
        None => vec![],
        Some(spec) => traffic(args, &config, spec, corpus.as_ref())?,
    };
    let mut plan = compute(args, &config, &site, (vocab_size, spec.as_ref(), &traffic));
    if let (Some(steps), Some(spec), Some(corpus)) = (args.simulate, &spec, &corpus) {
        plan.replayed = replayed::replayed(args, &config, (spec, corpus), steps)?;
    }
    print(&plan, &config, &site, corpus.is_some());
    replayed::print(&plan.replayed, args.simulate.unwrap_or_default());
    if args.json {
        println!("{}", serde_json::to_string(&plan)?);
    }
    Ok(())
}

fn traffic(
    args: &PlanArgs,
    config: &Config,
    spec: &BlockSpec,
    corpus: Option<&Corpus>,
) -> Result<Vec<LevelTraffic>> {
    spec.validate()?;
    match (args.simulate, corpus) {
        (Some(0), _) => bail!("--simulate: expected at least 1 step, found 0"),
        (Some(steps), Some(corpus)) => {
            Ok(train::simulated(corpus, &config.train, spec, args.workers, 1..=steps)?)
        }
        (Some(_), None) => bail!(
            "--simulate: expected a prepared corpus, found none in {}",
            config.corpus.prepared.display()
        ),
        (None, Some(corpus)) => {
            let shares = train::cluster_shares(corpus, &config.train, LOOKED_AT)?;
            Ok(train::expected(&config.train, spec, &shares, args.workers))
        }
        (None, None) => Ok(train::expected(&config.train, spec, &train::even_shares(spec), args.workers)),
    }
}

/// The levels of a bank with their part of a step.
fn levels(config: &Config, spec: Option<&BlockSpec>, traffic: &[LevelTraffic]) -> Vec<LevelPlan> {
    let Some(spec) = spec else { return vec![] };
    let level = |level: usize| LevelPlan {
        level,
        blocks: spec.n_blocks(level) + 1,
        block_bytes: 4 * spec.block_len(level) as u64,
        replicated: config.memory.replicated.contains(&level),
        unique: traffic[level].unique,
        by_worker: traffic[level].by_worker,
    };
    spec.levels().map(level).collect()
}

/// Bytes of a step.
struct Moved {
    /// From shards, to all workers.
    fetched: f64,
    /// To shards.
    pushed: f64,
    /// Both ways, one path for each sequence.
    naive: f64,
    /// From each worker to the others.
    exchanged: f64,
}

/// Gradients of the anchor go by reduce-scatter and all-gather, 2 (W - 1) / W of their bytes from each worker;
/// parts of blocks' gradients to the worker who adds them up; sums of replicated levels to all.
fn moved(config: &Config, levels: &[LevelPlan], workers: f64, anchor_parameters: u64) -> Moved {
    let pushed_share = if config.memory.push_dtype == Dtype::Bf16 { 0.5 } else { 1.0 };
    let sum = |of: &dyn Fn(&LevelPlan) -> f64| -> f64 {
        levels.iter().map(|level| of(level) * level.block_bytes as f64).sum()
    };
    let of_anchor = match config.train.phase.trains_anchor() {
        true => 2.0 * (workers - 1.0) / workers * 4.0 * anchor_parameters as f64,
        false => 0.0,
    };
    let parts = sum(&|level| level.by_worker - level.unique) / workers;
    let copies = sum(&|level| if level.replicated { level.unique } else { 0.0 }) * (workers - 1.0) / workers;
    Moved {
        fetched: sum(&|level| if level.replicated { 0.0 } else { level.by_worker }),
        pushed: sum(&|level| level.unique) * pushed_share,
        naive: sum(&|_| config.train.batch_size as f64) * (1.0 + pushed_share),
        exchanged: of_anchor + parts + copies,
    }
}

/// The formulas. Times of one step: products at the site's efficiency; what workers exchange over their network;
/// blocks over the slower of both sides' networks, and the
/// shards' updates at their memory's speed. With staleness the way to the shards and back lies behind a step's
/// products; without, it is added.
fn compute(
    args: &PlanArgs,
    config: &Config,
    site: &Speeds,
    (vocab_size, spec, traffic): (usize, Option<&BlockSpec>, &[LevelTraffic]),
) -> Plan {
    let (workers, shards) = (args.workers as f64, args.shards as f64);
    let train = &config.train;
    let anchor = config.anchor.config(vocab_size);
    let len = config.corpus.seq_len as usize;
    let memory_width = spec.map_or(0, |spec| spec.width.iter().sum());
    let levels = levels(config, spec, traffic);
    let sum = |of: &dyn Fn(&LevelPlan) -> f64| levels.iter().map(of).sum::<f64>();
    let bytes = |level: &LevelPlan| level.block_bytes as f64;
    let anchor_parameters = anchor.n_parameters();
    let Moved { fetched, pushed, naive, exchanged } = moved(config, &levels, workers, anchor_parameters);

    let tokens_per_step = (train.batch_size * len) as f64;
    let flops =
        tokens_per_step * train.phase.flops_per_token(&anchor, len, spec.map_or(0, BlockSpec::fetch_len));
    let peak = workers * site.worker.tflops * 1e12;
    let compute_s = flops / (peak * site.worker.efficiency);
    let exchange_s = exchanged / (site.worker.network_gb_s * 1e9);
    let worker_network_s = (fetched + pushed) / (workers * site.worker.network_gb_s * 1e9);
    let shard_network_s = (fetched + pushed) / (shards * site.shard.network_gb_s * 1e9);
    let updated = sum(&|level| level.unique * bytes(level) / 4.0);
    let shard_update_s = updated * UPDATE_BYTES / (shards * site.shard.memory_gb_s * 1e9);
    let to_shards_s = worker_network_s.max(shard_network_s) + shard_update_s;
    let step_s = match train.staleness {
        0 => compute_s + exchange_s + to_shards_s,
        _ => (compute_s + exchange_s).max(to_shards_s),
    };
    let times = [
        ("compute", compute_s),
        ("exchange between workers", exchange_s),
        ("the workers' network to the shards", worker_network_s),
        ("the shards' network", shard_network_s),
        ("updates in the shards", shard_update_s),
    ];
    let bound_by = times.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).map_or("", |(name, _)| name);

    let shape = TrainingShape {
        micro_batch: train.micro_batch.min(train.batch_size),
        len,
        memory_kind: config.memory.kind,
        memory_width,
        block_parameters: sum(&|level| level.by_worker / workers * bytes(level) / 4.0) as u64,
    };
    let held = anchor.training_bytes(
        shape,
        Compute { precision: train.precision, checkpoint: train.checkpoint_activations },
    );
    let copied = sum(&|level| match level.replicated {
        true => level.blocks as f64 * bytes(level) / 4.0 * STATE_BYTES,
        false => 0.0,
    });
    let bank_parameters = spec.map_or(0, BlockSpec::bank_len);
    // The rest of a shard's rows is on its disk.
    let host_gib = config.shard.offload.as_ref().map_or(f64::INFINITY, |rows| rows.host_mib as f64 / 1024.0);
    let steps = args.tokens.map_or(train.steps as f64, |tokens| (tokens / tokens_per_step).ceil());
    let hours = steps * step_s / 3600.0;
    let has_shards = if spec.is_some() { shards } else { 0.0 };
    Plan {
        workers: args.workers,
        shards: args.shards,
        anchor_parameters,
        fetch_parameters: spec.map_or(0, |spec| spec.fetch_len()),
        bank_parameters,
        levels,
        replayed: vec![],
        fetched_bytes: fetched,
        pushed_bytes: pushed,
        naive_bytes: naive,
        exchanged_bytes_per_worker: exchanged,
        worker_gib: held.total() as f64 / GIB,
        copies_gib: copied / GIB,
        shard_gib: (bank_parameters as f64 * STATE_BYTES / shards / GIB).min(host_gib),
        tokens_per_step,
        compute_s,
        exchange_s,
        worker_network_s,
        shard_network_s,
        shard_update_s,
        step_s,
        bound_by,
        mfu: flops / (peak * step_s),
        tokens_per_s: tokens_per_step / step_s,
        steps,
        hours,
        dollars: hours * (workers * site.worker.dollars_per_hour + has_shards * site.shard.dollars_per_hour),
    }
}

fn print(plan: &Plan, config: &Config, site: &Speeds, is_prepared: bool) {
    let gb = |bytes: f64| bytes / 1e9;
    let Plan { workers, shards, .. } = *plan;
    println!(
        "model: anchor of {} parameters, {} fetched of a bank of {}",
        plan.anchor_parameters, plan.fetch_parameters, plan.bank_parameters
    );
    let clusters =
        if is_prepared { "as the prepared corpus has them" } else { "taken as even: no corpus is prepared" };
    if !plan.levels.is_empty() {
        println!("blocks of a step of {} sequences (clusters {clusters}):", config.train.batch_size);
        println!("  level    blocks   MB each    unique  by worker  placement");
    }
    for level in &plan.levels {
        println!(
            "  {:>5}{:>10}{:>10.3}{:>10.1}{:>11.1}  {}",
            level.level,
            level.blocks,
            level.block_bytes as f64 / 1e6,
            level.unique,
            level.by_worker,
            if level.replicated { "replicated" } else { "sharded" }
        );
    }
    if plan.naive_bytes > 0.0 {
        println!(
            "moved in a step: {:.3} GB fetched, {:.3} GB pushed, {:.4} of one path for each sequence; \
             {:.3} GB from each worker to others",
            gb(plan.fetched_bytes),
            gb(plan.pushed_bytes),
            (plan.fetched_bytes + plan.pushed_bytes) / plan.naive_bytes,
            gb(plan.exchanged_bytes_per_worker)
        );
    }
    let fits = |found: f64, room: f64| if found <= room { "fits" } else { "does not fit" };
    println!(
        "held: {:.1} GiB by each of {workers} workers ({} {} GiB), {:.1} GiB of copies in its host's memory",
        plan.worker_gib,
        fits(plan.worker_gib, site.worker.device_gib),
        site.worker.device_gib,
        plan.copies_gib
    );
    if plan.bank_parameters > 0 {
        println!(
            "      {:.1} GiB by each of {shards} shards once all blocks are updated ({} {} GiB)",
            plan.shard_gib,
            fits(plan.shard_gib, site.shard.host_gib),
            site.shard.host_gib
        );
    }
    println!(
        "step: {:.3} s: compute {:.3}, between workers {:.3}, to shards {:.3} (theirs {:.3}), updates {:.3}; \
         bound by {}",
        plan.step_s,
        plan.compute_s,
        plan.exchange_s,
        plan.worker_network_s,
        plan.shard_network_s,
        plan.shard_update_s,
        plan.bound_by
    );
    println!("speed: {:.0} tokens/s, MFU {:.3}", plan.tokens_per_s, plan.mfu);
    println!(
        "run: {:.0} steps, {:.3e} tokens, {:.1} hours, {:.0} dollars",
        plan.steps,
        plan.steps * plan.tokens_per_step,
        plan.hours,
        plan.dollars
    );
}
