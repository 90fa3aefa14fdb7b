//! `anchorage serve`: a run over HTTP, and memory by text over gRPC.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ::serve::http::{self, App, ChatTemplate, Parts};
use ::serve::memory::{BankSource, Banks, Memory, MemoryOptions, Retrieval, RetrievalParts};
use anchor::{Decoder, DecoderOptions};
use anyhow::{Context, Result, bail};
use candle_core::Device;
use clap::Args;
use generate::engine::Engine;
use memory_bank::{BlockSpec, Step};
use memory_service::RetrievalOptions;
use memory_service::security::{ApiKeys, Https, Tls, TlsFiles, Tokens};
use shard_host::{Logs, start_logs, told_to_stop};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::config::ServeSection;
use crate::run::Run;
use crate::{shards, tree};

/// The file of a run that is its template of chats.
const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// Sections that `--set` may change: the others were decided when the run was trained.
const KEYS: [&str; 6] =
    ["serve.", "retrieve.", "memory.placement.", "memory.tls.", "memory.token_file", "memory.bank"];

/// How a run is served.
#[derive(Args)]
pub(crate) struct ServeArgs {
    /// Folder of the run.
    run: PathBuf,
    /// Address of HTTP, instead of serve.listen.
    #[arg(long)]
    listen: Option<SocketAddr>,
    /// A file of API keys, instead of serve.keys.
    #[arg(long)]
    keys: Option<PathBuf>,
    /// Listen beyond loopback without keys.
    #[arg(long)]
    insecure: bool,
    /// Overrides a key of [serve], [retrieve] or [memory.placement]; may be given several times.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// How log lines look.
    #[arg(long, value_enum, default_value_t)]
    log: Logs,
    /// Least important log lines shown.
    #[arg(long, default_value = "warn")]
    log_level: tracing::Level,
}

/// Serves a run until the process is told to stop.
pub(crate) fn serve(args: ServeArgs) -> Result<()> {
    start_logs(args.log, args.log_level);
    let is_served = |setting: &&String| KEYS.iter().any(|key| setting.trim_start().starts_with(key));
    if let Some(setting) = args.set.iter().find(|setting| !is_served(setting)) {
        bail!(
            "--set {setting}: expected a key of [serve], [retrieve] or [memory.placement]: the rest was decided when \
             the run was trained"
        );
    }
    // The decoder is on the CPU, whatever else this program was built with.
    let mut run = Run::open_without_bank(&args.run, &args.set, &Device::Cpu)?;
    let section = &mut run.config.serve;
    section.listen = args.listen.unwrap_or(section.listen);
    section.keys = args.keys.or(section.keys.take());
    section.insecure |= args.insecure;
    section.check_bind()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let served = runtime.block_on(serve_run(run));
    // What clusters are about may still be read; nobody waits for it.
    runtime.shutdown_timeout(Duration::from_millis(100));
    served
}

async fn serve_run(run: Run) -> Result<()> {
    let section = run.config.serve.clone();
    let stop = told_to_stop()?;
    // Bound before anything is read: an address that is taken is told at once.
    let listen = || format!("serve.listen: {}", section.listen);
    let listener = TcpListener::bind(section.listen).await.with_context(listen)?;
    let address = listener.local_addr()?;
    let (retrieval, spec) = match run.config.train.phase.has_memory() {
        true => {
            let retrieval = retrieval(&run).await?;
            (Some(retrieval), Some(run.identity().spec))
        }
        false => (None, None),
    };
    let (dir, hash, step) = (run.dir.clone(), run.tree.hash(), run.state.step);
    let told = told(&run, spec.as_ref());
    let app = app(run, retrieval.clone())?;
    let https = match section.tls.clone() {
        None => None,
        Some(files) => Some(Arc::new(Https::reloading(files.cert, files.key).context("serve.tls")?)),
    };
    let (stopping, stopped) = watch::channel(false);
    let grpc = match &retrieval {
        Some(retrieval) => start_grpc(&section, retrieval.clone(), stopped.clone()).await?,
        None => None,
    };
    if let Some(retrieval) = retrieval.filter(|_| section.explain) {
        tokio::task::spawn_blocking(move || explain(&retrieval, &dir, &hash));
    }
    let scheme = if https.is_some() { "https" } else { "http" };
    let mut out = std::io::stdout().lock();
    writeln!(out, "serving {told} on {scheme}://{address}")?;
    out.flush()?;
    drop(out);
    tracing::info!(%address, step, "serving");
    http::serve(app, listener, https, stop).await;
    // The other port's server may have failed before.
    let _ = stopping.send(true);
    if let Some(grpc) = grpc {
        grpc.await??;
    }
    Ok(())
}

/// The run in the words of the line that says that it is served.
fn told(run: &Run, spec: Option<&BlockSpec>) -> String {
    let parameters = short(run.anchor.config().n_parameters());
    let bank = spec.map_or("no bank".to_owned(), |spec| format!("bank of {}", short(spec.bank_len())));
    format!("{} (step {}, {parameters} parameters, {bank})", run.dir.display(), run.state.step)
}

/// A number in thousands, millions or billions.
fn short(n: u64) -> String {
    let value = n as f64;
    match n {
        0..1_000 => n.to_string(),
        1_000..1_000_000 => format!("{:.1}k", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1}M", value / 1e6),
        _ => format!("{:.1}B", value / 1e9),
    }
}

/// What finds memory, with the run's own bank and those of serve.banks.
async fn retrieval(run: &Run) -> Result<Retrieval> {
    let (section, tiers) = (&run.config.serve, &run.config.memory.placement);
    let options = MemoryOptions {
        packed_mib: section.packed_mib,
        pinned_levels: section.pinned_levels.clone(),
        prefetch: section.prefetch,
    };
    let retrieval = Retrieval::new(RetrievalParts {
        retriever: run.retriever()?,
        tree: Arc::clone(&run.tree),
        identity: run.identity(),
        page: None,
        reach: shards::reach(&run.config)?,
        options,
    })?;
    let memory = run.memory_folder();
    let folder = memory.join("manifest.json").exists().then_some(memory);
    if folder.is_none() && tiers.shards.is_empty() && tiers.store.is_none() {
        bail!(
            "{}: found no bank (one that was trained on shards is read with memory.placement.shards or .store)",
            run.memory_folder().display()
        );
    }
    let own = BankSource { folder, step: Some(Step(run.state.step)), tiers: tiers.clone() };
    retrieval.banks().load(Banks::DEFAULT, own).await?;
    for (name, source) in &section.banks {
        let source = BankSource::parse(source, tiers);
        retrieval.banks().load(name, source).await.with_context(|| format!("serve.banks.{name}"))?;
    }
    Ok(retrieval)
}

/// Packs the anchor once, and starts the engine.
fn app(run: Run, retrieval: Option<Retrieval>) -> Result<App> {
    let section = run.config.serve.clone();
    let memory = match (retrieval.is_some(), run.is_always_on()) {
        (false, _) => Memory::Off,
        (true, true) => Memory::Generic,
        (true, false) => Memory::Auto,
    };
    let name = section.name.clone().unwrap_or_else(|| name_of(&run.dir));
    let tokenizer = Arc::new(run.tokenizer);
    let n_parameters = run.anchor.config().n_parameters();
    let decoder = Arc::new(Decoder::new(&run.anchor, DecoderOptions { weights: section.weights })?);
    drop(run.anchor);
    let engine =
        Engine::start(decoder, Arc::clone(&tokenizer), section.engine.clone()).context("[serve.engine]")?;
    let keys = match &section.keys {
        None => None,
        Some(file) => Some(ApiKeys::reloading(file).context("serve.keys")?),
    };
    let eot = tokenizer.decode(&[tokenizer.eot()])?;
    let chat = chat_template(&section, &run.dir, eot)?;
    App::new(Parts {
        name,
        step: run.state.step,
        n_parameters,
        positions: engine.max_positions(),
        tokenizer,
        engine,
        retrieval,
        memory,
        chat,
        keys,
        tiers: run.config.memory.placement,
        limits: section.limits,
    })
    .context("[serve]")
}

/// The last part of a run's path.
fn name_of(dir: &Path) -> String {
    let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    whole.file_name().map_or_else(|| "anchorage".to_owned(), |name| name.to_string_lossy().into_owned())
}

fn chat_template(section: &ServeSection, dir: &Path, eot: String) -> Result<Option<ChatTemplate>> {
    let file = match &section.chat_template {
        Some(file) => file.clone(),
        None if dir.join(CHAT_TEMPLATE).exists() => dir.join(CHAT_TEMPLATE),
        None => return Ok(None),
    };
    let of_file = || format!("{}", file.display());
    let text = std::fs::read_to_string(&file).with_context(of_file)?;
    Ok(Some(ChatTemplate::new(text, eot).with_context(of_file)?))
}

type Task = tokio::task::JoinHandle<Result<()>>;

/// The second port, of `retrieval.v1`, if there is one.
async fn start_grpc(
    section: &ServeSection,
    retrieval: Retrieval,
    mut stopped: watch::Receiver<bool>,
) -> Result<Option<Task>> {
    let Some(grpc) = section.grpc.clone() else { return Ok(None) };
    let listen = || format!("serve.grpc.listen: {}", grpc.listen);
    let tls = match grpc.tls.clone() {
        None => None,
        Some(shard_host::TlsSection { cert, key, ca }) => {
            let files = TlsFiles { cert, key, ca };
            Some(Arc::new(Tls::reloading(files).context("serve.grpc.tls")?))
        }
    };
    let tokens = match &grpc.tokens {
        None => None,
        Some(file) => Some(Arc::new(Tokens::reloading(file).context("serve.grpc.tokens")?)),
    };
    memory_service::security::check_bind(grpc.listen, tls.is_some(), section.insecure)
        .with_context(listen)?;
    let listener = TcpListener::bind(grpc.listen).await.with_context(listen)?;
    eprintln!("{:>18}: grpc://{}", "retrieval.v1", listener.local_addr()?);
    let options = RetrievalOptions { limits: grpc.limits, tls, tokens, insecure: section.insecure };
    let shutdown = async move {
        // A sender that is gone ends it too.
        let _ = stopped.wait_for(|stopped| *stopped).await;
    };
    let served = memory_service::serve_retrieval(retrieval, listener, options, shutdown);
    Ok(Some(tokio::spawn(async move { Ok(served.await?) })))
}

/// Reads what clusters are about. Without the corpus they have sizes and counts only.
fn explain(retrieval: &Retrieval, dir: &Path, hash: &str) {
    let told = tree::page_of(dir, hash).and_then(|page| Ok(retrieval.set_page(page)?));
    if let Err(error) = told {
        eprintln!("note: clusters are told without terms and texts: {}", crate::one_line(&error));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_told_in_few_digits() {
        let of =
            [(7, "7"), (1_234, "1.2k"), (1_440_000, "1.4M"), (26_000_000, "26.0M"), (2_500_000_000, "2.5B")];
        for (n, expected) in of {
            assert_eq!(short(n), expected);
        }
    }
}
