use std::collections::BTreeMap;

use serde::Deserialize;

use crate::{Error, Result};

/// The section `[kubernetes]` of a site: what its cluster has, and where jobs go there.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Site {
    /// Of all that a job makes.
    #[serde(default = "default_namespace")]
    pub namespace: String,
    /// An image with `anchorage` in the path.
    pub image: String,
    /// A PersistentVolumeClaim that all pods can write: corpora and runs.
    pub volume: String,
    /// Where it is in the pods; relative paths of a configuration begin here.
    #[serde(default = "default_mount")]
    pub mount: String,
    /// A Secret for the image's registry.
    pub pull_secret: Option<String>,
    /// A Secret whose keys become variables: credentials of object stores.
    pub store_secret: Option<String>,
    /// ServiceAccount of the pods; its token is not given to them.
    pub service_account: Option<String>,
    /// PriorityClass of the pods.
    pub priority_class: Option<String>,
    /// LocalQueue of Kueue that the workers wait in.
    pub queue: Option<String>,
    /// Whether workers and shards may do without certificates.
    #[serde(default)]
    pub insecure: bool,
    /// User and group of the processes, and group of the volume.
    #[serde(default = "default_user")]
    pub user: u32,
    /// Seconds that a pod has to save once it is told to stop.
    #[serde(default = "default_grace")]
    pub grace_s: u32,
    /// How often pods of workers may fail in the whole job; those that asked to be started again and those
    /// that the cluster took away do not count.
    #[serde(default = "default_failures")]
    pub failures: u32,
    /// Seconds that a job that is over is kept, with its shards.
    #[serde(default = "default_keep")]
    pub keep_s: u32,
    /// Pods of workers.
    pub worker: Pods,
    /// Pods of shards; a job without shards needs none.
    pub shard: Option<Pods>,
}

/// What pods of a kind need.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pods {
    /// Cores, such as `8` or `500m`.
    pub cpu: String,
    /// Memory, such as `64Gi`.
    pub memory: String,
    /// Devices of each pod; a worker uses one.
    #[serde(default)]
    pub gpus: u32,
    /// What the cluster calls them.
    #[serde(default = "default_gpu")]
    pub gpu: String,
    /// Size of /dev/shm, which counts as memory of the pod.
    pub shared_memory: Option<String>,
    /// Size of /scratch, a disk that is the pod's own and ends with it: for `shard.offload` or caches.
    pub scratch: Option<String>,
    /// StorageClass that it is of; the node's own disk without it.
    pub scratch_class: Option<String>,
    /// A Secret with `tls.crt`, `tls.key` and `ca.crt`.
    pub certificate: Option<String>,
    /// A Secret with `tokens`, a shard's file of tokens, or `token`, a worker's own.
    pub token: Option<String>,
    /// Labels that nodes must have.
    #[serde(default)]
    pub node_selector: BTreeMap<String, String>,
    /// Taints of nodes that do not matter.
    #[serde(default)]
    pub tolerations: Vec<Toleration>,
}

/// A taint of nodes that does not matter.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Toleration {
    /// Its key.
    pub key: String,
    /// Its value; any without it.
    pub value: Option<String>,
    /// Its effect; all without it.
    pub effect: Option<String>,
}

fn default_namespace() -> String {
    "default".into()
}

fn default_mount() -> String {
    "/work".into()
}

fn default_user() -> u32 {
    65532
}

fn default_grace() -> u32 {
    300
}

fn default_failures() -> u32 {
    100
}

fn default_keep() -> u32 {
    3600
}

fn default_gpu() -> String {
    "nvidia.com/gpu".into()
}

impl Site {
    /// Fails on what a job of so many workers and shards lacks; the rest shows in its manifests.
    ///
    /// # Errors
    /// Names the key.
    pub fn check(&self, workers: usize, shards: usize) -> Result<()> {
        let wrong = |key: &'static str, expected: &str, found: &str| {
            Err(Error::Site { section: "kubernetes", key, expected: expected.into(), found: found.into() })
        };
        if self.user == 0 {
            return wrong("user", "one that is not root", "0");
        }
        match (&self.worker.certificate, self.insecure) {
            (Some(_), true) => return wrong("insecure", "false, since there are certificates", "true"),
            (None, false) if workers > 1 || shards > 0 => {
                let expected = "the name of a Secret with tls.crt, tls.key and ca.crt (or insecure = true)";
                return wrong("worker.certificate", expected, "nothing");
            }
            _ => {}
        }
        if shards == 0 {
            return Ok(());
        }
        let Some(shard) = &self.shard else {
            return wrong("shard", &format!("what the pods of {shards} shards need"), "nothing");
        };
        for (key, key_of_worker, of_shard, of_worker) in [
            ("shard.certificate", "worker.certificate", &shard.certificate, &self.worker.certificate),
            ("shard.token", "worker.token", &shard.token, &self.worker.token),
        ] {
            match (of_shard, of_worker) {
                (Some(_), None) => return wrong(key_of_worker, "one beside the shards'", "nothing"),
                (None, Some(_)) => return wrong(key, "one beside the workers'", "nothing"),
                _ => {}
            }
        }
        Ok(())
    }
}
