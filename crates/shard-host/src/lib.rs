//! A shard of a memory bank as a process: its configuration, its start and its end.

mod args;
mod config;
mod logs;

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use memory_bank::{
    Access, BankStore, Live, MappedBank, Offload, Placement, Shard, ShardOptions, Step, StoreOptions,
};
use memory_service::security::{self, BankName, Role, Tls, TlsFiles, Tokens};
use memory_service::{Identity, ServeOptions, Source, StoreOfBank, serve};
use tokio::net::TcpListener;

pub use args::ShardArgs;
pub use config::{BankSection, ServeSection, ShardConfig, StoreSection, TlsSection};
pub use logs::{Logs, start_logs};

/// What keeps a shard from starting, or ends it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A configuration that does not parse.
    #[error("{}: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: Box<toml::de::Error>,
    },
    /// An address cannot be listened on.
    #[error("{address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The runtime cannot start, or the process cannot be told to stop.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The bank, its store or its files.
    #[error("{0}")]
    Bank(#[from] memory_bank::Error),
    /// Certificates, tokens or an address.
    #[error("{0}")]
    Security(#[from] security::Error),
    /// The server.
    #[error("{0}")]
    Serve(#[from] memory_service::ServeError),
    /// A checkpoint that is asked for and not there.
    #[error("{url}: no checkpoint of bank {bank}")]
    NoCheckpoint {
        /// The store.
        url: String,
        /// The bank.
        bank: String,
    },
}

/// Where a shard's blocks come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Start {
    /// The newest checkpoint of the store, and without one their initial state.
    Newest,
    /// A checkpoint of the store.
    Step(Step),
    /// Their initial state.
    Initial,
    /// A folder with a whole bank, to be fetched from only.
    ReadOnly(PathBuf),
}

/// Serves the shard of a configuration until it is told to stop; `environment` holds options of the
/// store, which those of the configuration precede.
pub async fn run(
    config: ShardConfig,
    placement: Placement,
    start: Start,
    environment: &[(String, String)],
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let ShardConfig { bank, serve: ports, store: store_section, offload } = config;
    let name: BankName = bank.name.parse()?;
    security::check_bind(ports.listen, ports.tls.is_some(), ports.insecure)?;
    if let Some(http) = ports.http {
        // Only metrics: never more than the number of blocks and bytes.
        security::check_bind(http, false, ports.insecure || ports.tls.is_some())?;
    }
    let tls = match ports.tls {
        Some(TlsSection { cert, key, ca }) => {
            let peer = cert.display().to_string();
            let tls = Tls::reloading(TlsFiles { cert, key, ca })?;
            // No client would take it for a server.
            match tls.current(Instant::now()).identity() {
                own if own.role() == Role::Shard => Some(Arc::new(tls)),
                own => return Err(security::Error::NotAShard { peer, found: own.clone() }.into()),
            }
        }
        None => None,
    };
    let tokens = match &ports.tokens {
        Some(path) => Some(Arc::new(Tokens::reloading(path)?)),
        None => None,
    };
    // Before the blocks are loaded: a port in use is told at once.
    let listener = bind(ports.listen).await?;
    let bulk = match ports.bulk {
        true => Some(bind(SocketAddr::new(ports.listen.ip(), ports.bulk_port)).await?),
        false => None,
    };
    let http = match ports.http {
        Some(address) => Some(bind(address).await?),
        None => None,
    };
    let options = ShardOptions {
        seed: bank.seed,
        adamw: bank.adamw,
        world_size: bank.world_size,
        staleness: bank.staleness,
        placement,
    };
    let identity =
        memory_bank::Identity { spec: bank.spec.clone(), seed: bank.seed, hashes: bank.hashes.clone() };
    let (source, store) = match start {
        Start::ReadOnly(folder) => {
            let mapped = MappedBank::open(&folder)?;
            mapped.manifest().check_same(&folder, &identity)?;
            (Source::ReadOnly(Arc::new(mapped)), None)
        }
        start => {
            let store = match &store_section {
                Some(section) => Some(open_store(section, name.as_str(), environment, Access::Write).await?),
                None => None,
            };
            let offload = offload.as_ref().map(Offload::open).transpose()?;
            let (shard, base) = load(&store, &identity, (options, offload.as_ref()), start).await?;
            let store = store.zip(store_section).map(|(store, section)| StoreOfBank {
                store,
                identity,
                keep: section.keep,
                base,
            });
            (Source::Live(Arc::new(Live::offloaded(shard, offload))), store)
        }
    };
    tracing::info!(
        bank = bank.name,
        shard = placement.shard,
        n_shards = placement.n_shards,
        step = source.applied().0,
        grpc = %listener.local_addr()?,
        bulk = bulk.as_ref().and_then(|bulk| bulk.local_addr().ok()).map(tracing::field::display),
        http = http.as_ref().and_then(|http| http.local_addr().ok()).map(tracing::field::display),
        "serving"
    );
    let options = ServeOptions {
        identity: Identity::new(name.as_str(), &bank.spec, bank.hashes),
        limits: ports.limits,
        compression: ports.compression,
        tls,
        tokens,
        store,
        bulk,
        http,
    };
    serve(source, listener, options, shutdown).await?;
    tracing::info!("stopped");
    Ok(())
}

/// Completes when the process is told to stop, by SIGTERM or from the keyboard.
pub fn told_to_stop() -> Result<impl Future<Output = ()> + Send + 'static, Error> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

async fn bind(address: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(address).await.map_err(|source| Error::Listen { address, source })
}

/// The store of a bank's checkpoints.
pub async fn open_store(
    section: &StoreSection,
    bank: &str,
    environment: &[(String, String)],
    access: Access,
) -> Result<BankStore, Error> {
    let configured = section.options.iter().map(|(key, value)| (key.clone(), value.clone()));
    let inherited = environment.iter().filter(|(key, _)| !section.options.contains_key(key)).cloned();
    let settings: Vec<(String, String)> = configured.chain(inherited).collect();
    let options = StoreOptions { access, ..StoreOptions::default() };
    Ok(BankStore::open_url(&section.url, &settings, bank, options).await?)
}

/// The shard as it was, and the record of the checkpoint it comes from.
async fn load(
    store: &Option<BankStore>,
    identity: &memory_bank::Identity,
    (options, offload): (ShardOptions, Option<&Offload>),
    start: Start,
) -> Result<(Shard, Option<memory_bank::ShardRecord>), Error> {
    let initial = || Ok((Shard::new(identity.spec.clone(), options)?, None));
    let checkpoint = match (store, start) {
        (Some(store), Start::Newest) => store.latest().await?,
        (Some(store), Start::Step(step)) => Some(store.checkpoint(step).await?),
        (None, Start::Step(step)) => {
            let (url, bank) = ("store.url".to_owned(), format!("at step {step}: no store is configured"));
            return Err(Error::NoCheckpoint { url, bank });
        }
        _ => None,
    };
    match checkpoint {
        None => initial(),
        Some(checkpoint) => {
            let shard = checkpoint.load_onto(identity, options, vec![], offload).await?;
            Ok((shard, checkpoint.record(options.placement)))
        }
    }
}
