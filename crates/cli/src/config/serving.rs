//! The section about serving a run.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use generate::engine::EngineOptions;
use memory_bank::BlockDtype;
use memory_service::RetrievalLimits;
use serde::{Deserialize, Serialize};
use serve::http::HttpLimits;

/// How a run is served, by `anchorage serve`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ServeSection {
    /// Address of HTTP; port 0 is any that is free.
    pub(crate) listen: SocketAddr,
    /// Listens on an address that others reach, though anyone may ask.
    pub(crate) insecure: bool,
    /// The name of the model in requests; without it that of the run's folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    /// A file of API keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) keys: Option<PathBuf>,
    /// A template of chats; without it chat_template.jinja in the run's folder, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) chat_template: Option<PathBuf>,
    /// How the anchor's matrices are held: f32 or bf16.
    pub(crate) weights: BlockDtype,
    /// MiB of packed blocks, of all banks together.
    pub(crate) packed_mib: u64,
    /// Levels whose packed blocks stay once they are there.
    pub(crate) pinned_levels: Vec<usize>,
    /// Blocks that may wait to be fetched before anyone asks for them; 0 fetches none.
    pub(crate) prefetch: usize,
    /// Whether the prepared corpus is read, beside serving, for what clusters are about.
    pub(crate) explain: bool,
    /// Certificate of HTTPS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tls: Option<HttpsSection>,
    /// Bounds of the engine.
    pub(crate) engine: EngineOptions,
    /// Bounds of HTTP.
    pub(crate) limits: HttpLimits,
    /// Memory by text over gRPC, beside HTTP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) grpc: Option<GrpcSection>,
    /// Further banks by name: a checkpoint's `memory` folder, a URL of a store, or shards.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) banks: BTreeMap<String, String>,
}

/// A certificate that anyone may connect to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HttpsSection {
    /// Certificate, in PEM.
    pub(crate) cert: PathBuf,
    /// Its key.
    pub(crate) key: PathBuf,
}

/// A second port, for `retrieval.v1`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct GrpcSection {
    /// Its address; port 0 is any that is free.
    pub(crate) listen: SocketAddr,
    /// A file of tokens, as the shards'.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tokens: Option<PathBuf>,
    /// Certificates, as the shards'.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tls: Option<shard_host::TlsSection>,
    /// Bounds.
    #[serde(default)]
    pub(crate) limits: RetrievalLimits,
}

impl Default for ServeSection {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            insecure: false,
            name: None,
            keys: None,
            chat_template: None,
            weights: BlockDtype::F32,
            packed_mib: 1024,
            pinned_levels: vec![],
            prefetch: 64,
            explain: true,
            tls: None,
            engine: EngineOptions::default(),
            limits: HttpLimits::default(),
            grpc: None,
            banks: BTreeMap::new(),
        }
    }
}

impl ServeSection {
    pub(crate) fn check(&self, n_levels: usize) -> Result<()> {
        self.engine.check().context("[serve.engine]")?;
        self.limits.check().context("[serve]")?;
        if self.weights == BlockDtype::Int8 {
            bail!("serve.weights: expected \"f32\" or \"bf16\", found \"int8\"");
        }
        if let Some(level) = self.pinned_levels.iter().find(|&&level| level >= n_levels) {
            bail!("serve.pinned_levels: expected levels below {n_levels}, found {level}");
        }
        if self.name.as_deref().is_some_and(|name| name.trim().is_empty()) {
            bail!("serve.name: expected a name, found nothing");
        }
        if self.banks.contains_key(serve::memory::Banks::DEFAULT) {
            bail!("serve.banks.default: expected another name, that is the run's own bank");
        }
        Ok(())
    }

    /// Fails where others reach the address and nothing is asked of them.
    pub(crate) fn check_bind(&self) -> Result<()> {
        let address = self.listen;
        if address.ip().to_canonical().is_loopback() || self.keys.is_some() || self.insecure {
            return Ok(());
        }
        bail!(
            "serve.listen: {address} can be reached by others, expected serve.keys, a loopback address, or \
             --insecure"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_names_its_key() {
        let of = |change: fn(&mut ServeSection)| {
            let mut section = ServeSection::default();
            change(&mut section);
            format!("{:#}", section.check(2).and_then(|()| section.check_bind()).unwrap_err())
        };
        ServeSection::default().check(2).unwrap();
        assert!(of(|s| s.engine.max_sequences = 0).starts_with("[serve.engine]"));
        assert!(of(|s| s.limits.body_kib = 0).contains("limits.body_kib: expected at least 1, found 0"));
        assert!(of(|s| s.weights = BlockDtype::Int8).contains("serve.weights"));
        assert!(
            of(|s| s.pinned_levels = vec![2])
                .contains("serve.pinned_levels: expected levels below 2, found 2")
        );
        assert!(of(|s| s.name = Some(" ".into())).contains("serve.name"));
        assert!(
            of(|s| s.listen = ([0, 0, 0, 0], 80).into()).contains("expected serve.keys, a loopback address")
        );
        let open =
            ServeSection { listen: ([0, 0, 0, 0], 80).into(), insecure: true, ..ServeSection::default() };
        open.check_bind().unwrap();
    }
}
