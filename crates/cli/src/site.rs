//! Where jobs run: one TOML, which `plan` reads for what its machines can do and `submit` for how it takes jobs.

use std::path::Path;

use anyhow::{Context, Result, bail};
use launch::{kubernetes, slurm};
use serde::Deserialize;

use crate::config::explain;

/// A site's file.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Site {
    worker: Option<WorkerSpeeds>,
    shard: Option<ShardSpeeds>,
    /// How it takes jobs.
    pub(crate) slurm: Option<slurm::Site>,
    /// The same, of a Kubernetes cluster.
    pub(crate) kubernetes: Option<kubernetes::Site>,
}

/// What machines can do.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Speeds {
    pub(crate) worker: WorkerSpeeds,
    pub(crate) shard: ShardSpeeds,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WorkerSpeeds {
    pub(crate) tflops: f64,
    pub(crate) efficiency: f64,
    pub(crate) device_gib: f64,
    pub(crate) network_gb_s: f64,
    pub(crate) dollars_per_hour: f64,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ShardSpeeds {
    pub(crate) host_gib: f64,
    pub(crate) network_gb_s: f64,
    pub(crate) memory_gb_s: f64,
    pub(crate) dollars_per_hour: f64,
}

impl Site {
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
        let name = path.display().to_string();
        let site: Self = toml::from_str(&text).map_err(|e| explain(&e, Some(&text), &name))?;
        let Self { worker, shard, slurm, kubernetes } = &site;
        if slurm.is_some() && kubernetes.is_some() {
            bail!("{name}: expected one of [slurm] and [kubernetes], found both");
        }
        if let Some(slurm) = slurm {
            slurm.check().context(name.clone())?;
        }
        let of_worker = worker.iter().flat_map(|worker| {
            [
                ("worker.tflops", worker.tflops),
                ("worker.efficiency", worker.efficiency),
                ("worker.device_gib", worker.device_gib),
                ("worker.network_gb_s", worker.network_gb_s),
            ]
        });
        let of_shard = shard.iter().flat_map(|shard| {
            [
                ("shard.host_gib", shard.host_gib),
                ("shard.network_gb_s", shard.network_gb_s),
                ("shard.memory_gb_s", shard.memory_gb_s),
            ]
        });
        for (key, found) in of_worker.chain(of_shard) {
            if !(found.is_finite() && found > 0.0) {
                bail!("{name}: {key}: expected a number above 0, found {found}");
            }
        }
        Ok(site)
    }

    /// What its machines can do; `path` is named where that is not said.
    pub(crate) fn speeds(self, path: &Path) -> Result<Speeds> {
        let missing = |section: &str| {
            format!("{}: expected a section [{section}] with speeds and prices, found none", path.display())
        };
        let worker = self.worker.with_context(|| missing("worker"))?;
        Ok(Speeds { worker, shard: self.shard.with_context(|| missing("shard"))? })
    }
}
