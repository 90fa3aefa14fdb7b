use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use memory_bank::{AdamW, BlockSpec, OffloadOptions};
use memory_service::{Compression, Limits};
use serde::{Deserialize, Serialize};

use crate::Error;

/// What a shard's process is told: the bank, the same for all of its shards, and how to serve it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardConfig {
    /// The bank.
    pub bank: BankSection,
    /// Ports, limits and who may connect.
    #[serde(default)]
    pub serve: ServeSection,
    /// Where checkpoints go; without it there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<StoreSection>,
    /// Where rows go beyond a part of memory; without it all of them stay in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offload: Option<OffloadOptions>,
}

/// A bank, as all its shards and workers know it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BankSection {
    /// `[a-z0-9._-]{1,64}`; the folder of its checkpoints too.
    pub name: String,
    /// Seed of the initial weights.
    pub seed: u64,
    /// Ranks whose pushes make a step.
    pub world_size: usize,
    /// Steps that a rank may push beyond the one that is waited for.
    #[serde(default)]
    pub staleness: u64,
    /// The sizes of the blocks.
    pub spec: BlockSpec,
    /// How blocks are updated.
    pub adamw: AdamW,
    /// Hashes of what the bank belongs to, such as `tree`, `tokenizer` and `anchor`.
    pub hashes: BTreeMap<String, String>,
}

/// Ports, limits and who may connect.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServeSection {
    /// Of gRPC; port 0 is any that is free.
    pub listen: SocketAddr,
    /// Whether to offer bulk streams, on a second port of the same address.
    pub bulk: bool,
    /// That second port; 0 is any that is free.
    pub bulk_port: u16,
    /// Of `/metrics`, `/live` and `/ready`; without it they are not served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<SocketAddr>,
    /// Whether other addresses than loopback may be listened on without certificates.
    pub insecure: bool,
    /// Of gRPC messages.
    pub compression: Compression,
    /// A file of tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<PathBuf>,
    /// Certificates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsSection>,
    /// Bounds on what is done at once.
    pub limits: Limits,
}

impl Default for ServeSection {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7070)),
            bulk: true,
            bulk_port: 0,
            http: None,
            insecure: false,
            compression: Compression::None,
            tokens: None,
            tls: None,
            limits: Limits::default(),
        }
    }
}

/// PEM files of a certificate, its key, and the authority that callers' certificates come from.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsSection {
    /// Certificate.
    pub cert: PathBuf,
    /// Private key.
    pub key: PathBuf,
    /// Certificate of the authority.
    pub ca: PathBuf,
}

/// Where checkpoints go.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreSection {
    /// A folder, or the URL of an object store; each bank has a folder of its name there.
    pub url: String,
    /// Checkpoints kept; 0 keeps all.
    #[serde(default = "default_keep")]
    pub keep: usize,
    /// Options of the store, before those of the environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub options: BTreeMap<String, String>,
}

fn default_keep() -> usize {
    3
}

impl ShardConfig {
    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::File { path: path.into(), source })?;
        toml::from_str(&text).map_err(|source| Error::Config { path: path.into(), source: Box::new(source) })
    }
}
