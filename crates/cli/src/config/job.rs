//! The sections about the processes of a job: workers, what they tell, and shards.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail};
use collective::{TlsConfigs, is_on_this_machine};
use memory_service::security::{TlsFiles, WorkerTls};
use serde::{Deserialize, Serialize};

/// How the workers of a job mind each other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct CollectiveSection {
    /// Seconds to wait for all workers to come, and for all shards to serve.
    pub(crate) join_s: u64,
    /// Seconds after which a worker that is waited for is late, and the step given up.
    pub(crate) patience_s: u64,
    /// What sums the anchor's gradients over all workers.
    pub(crate) engine: EngineKind,
    /// How often each worker and each shard may fail without a checkpoint in between until the job does.
    pub(crate) retries: usize,
    /// Certificates of role worker, for the connections of workers to each other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tls: Option<shard_host::TlsSection>,
    /// Whether workers may meet on other addresses than loopback without certificates.
    pub(crate) insecure: bool,
}

impl CollectiveSection {
    pub(crate) fn check(&self) -> Result<()> {
        for (key, found) in [("join_s", self.join_s), ("patience_s", self.patience_s)] {
            if found == 0 {
                bail!("collective.{key}: expected at least 1, found 0");
            }
        }
        if self.engine == EngineKind::Nccl && !cfg!(feature = "nccl") {
            bail!(
                "collective.engine: expected \"tcp\", as this program was built without nccl, found \"nccl\""
            );
        }
        Ok(())
    }

    /// The certificates with which a worker meets the others at `master`.
    pub(crate) fn tls(&self, master: &str) -> Result<Option<TlsConfigs>> {
        let Some(shard_host::TlsSection { cert, key, ca }) = self.tls.clone() else {
            if self.insecure || is_on_this_machine(master) {
                return Ok(None);
            }
            bail!(
                "collective.tls: expected certificates (or collective.insecure = true), since {master}, where the \
                 workers meet, is not loopback; found nothing"
            );
        };
        let WorkerTls { server, client } =
            WorkerTls::read(&TlsFiles { cert, key, ca }).context("collective.tls")?;
        Ok(Some(TlsConfigs { server, client }))
    }
}

impl Default for CollectiveSection {
    fn default() -> Self {
        Self { join_s: 600, patience_s: 600, engine: EngineKind::Tcp, retries: 3, tls: None, insecure: false }
    }
}

/// What sums gradients.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum EngineKind {
    /// The workers, over the connections they have: the bits of one worker, for any number of them.
    Tcp,
    /// NCCL, on GPUs.
    Nccl,
}

/// What a worker tells of itself, beside its file in the run's folder.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ObserveSection {
    /// Address of /metrics, /status and /live; a worker on its machine's n-th device adds n to the port, unless
    /// that is 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) listen: Option<SocketAddr>,
    /// Listens on an address that others reach, though anyone may ask.
    pub(crate) insecure: bool,
    /// Peak of one worker's device in the precision that is trained in, TFLOP/s; utilisation is told with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) peak_tflops: Option<f64>,
}

impl ObserveSection {
    /// Where the worker of a device listens.
    pub(crate) fn endpoint(&self, local_rank: usize) -> Result<Option<SocketAddr>> {
        let Some(mut address) = self.listen else { return Ok(None) };
        memory_service::security::check_bind(address, false, self.insecure).context("observe.listen")?;
        if address.port() != 0 {
            let port = usize::from(address.port()) + local_rank;
            let port = u16::try_from(port).with_context(|| format!("observe.listen: port {port}"))?;
            address.set_port(port);
        }
        Ok(Some(address))
    }
}

/// How the shards of this run's bank are served, by `anchorage shard`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ShardSection {
    /// Ports, limits and who may connect.
    pub(crate) serve: shard_host::ServeSection,
    /// Where checkpoints go.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) store: Option<shard_host::StoreSection>,
    /// Where rows go beyond a part of memory, also those of a run that keeps its bank in its own process;
    /// without it all of them stay in memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) offload: Option<memory_bank::OffloadOptions>,
}
