use serde_json::{Value, json};

use super::{Pods, Site};
use crate::{REQUEUE, Result};

/// Ports of a shard: gRPC, bulk streams, and what operators look at.
const GRPC: u16 = 7070;
const BULK: u16 = 7071;
const HTTP: u16 = 9090;
/// Where rank 0 listens.
const MASTER: u16 = 29500;

/// Where the run's configuration, certificates and tokens are in a pod.
const CONFIG: &str = "/etc/anchorage/run.toml";
const TLS: &str = "/etc/anchorage-tls";
const TOKEN: &str = "/etc/anchorage-token";

/// Names of the pods' volumes.
const CONFIG_VOLUME: &str = "config";
const RUN_VOLUME: &str = "work";

/// Longest name of a job: with what the cluster appends for pods (`-worker-0-9999-abcde`) and revisions it
/// is still one label of a DNS name, 63 characters.
const MAX_NAME: usize = 40;

/// A job of workers and shards on a cluster.
#[derive(Clone, Debug)]
pub struct Job<'a> {
    /// Of the JobSet, and the beginning of all other names; as [`name_of`] makes it.
    pub name: &'a str,
    /// Workers.
    pub workers: usize,
    /// Shards; without any, every worker keeps the whole bank.
    pub shards: usize,
    /// Where it runs.
    pub site: &'a Site,
}

/// The name of a run's job: its folder, as DNS names are written (RFC 1035: letters, digits and `-`, a letter
/// first). One that is cut ends in a hash of the whole.
pub fn name_of(run_dir: &str) -> String {
    let words = run_dir.to_ascii_lowercase();
    let words = words.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    let mut name = words.collect::<Vec<_>>().join("-");
    if !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
        name = format!("run-{name}").trim_end_matches('-').to_owned();
    }
    if name.len() <= MAX_NAME {
        return name;
    }
    // FNV-1a, 32 bits.
    let hash =
        run_dir.bytes().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let kept = name[..MAX_NAME - 9].trim_end_matches('-');
    format!("{kept}-{hash:08x}")
}

impl Job<'_> {
    /// Settings `section.key=value` that the run's configuration gets here: where shards are, how they listen,
    /// and where certificates and tokens are.
    pub fn settings(&self) -> Vec<String> {
        let Site { namespace, insecure, worker, shard, .. } = self.site;
        let service = self.shard_service();
        let address = |i: usize| format!("{service}-{i}.{service}.{namespace}.svc:{GRPC}");
        let addresses: Vec<String> = (0..self.shards).map(address).collect();
        let mut settings = vec![format!("memory.shards={addresses:?}")];
        let tls = format!("{{ cert = \"{TLS}/tls.crt\", key = \"{TLS}/tls.key\", ca = \"{TLS}/ca.crt\" }}");
        settings.push(match worker.certificate {
            Some(_) => format!("collective.tls={tls}"),
            None => format!("collective.insecure={insecure}"),
        });
        let Some(shard) = shard.as_ref().filter(|_| self.shards > 0) else { return settings };
        settings.push(format!("shard.serve.listen=\"0.0.0.0:{GRPC}\""));
        settings.push(format!("shard.serve.bulk_port={BULK}"));
        settings.push(format!("shard.serve.http=\"0.0.0.0:{HTTP}\""));
        settings.push(format!("shard.serve.insecure={insecure}"));
        let optional = [
            (&shard.certificate, "shard.serve.tls", tls.clone()),
            (&worker.certificate, "memory.tls", tls),
            (&shard.token, "shard.serve.tokens", format!("\"{TOKEN}/tokens\"")),
            (&worker.token, "memory.token_file", format!("\"{TOKEN}/token\"")),
        ];
        let given = optional.into_iter().filter(|(secret, ..)| secret.is_some());
        settings.extend(given.map(|(_, key, value)| format!("{key}={value}")));
        settings
    }

    /// All that the cluster is given, the JobSet first. `config` is the text of the run's configuration, with
    /// [`Job::settings`] in it; `store_is_here` says whether the bank's checkpoints go to the site's volume. What
    /// is returned has been checked.
    ///
    /// # Errors
    /// When the site lacks something, or what it says makes no manifest that a cluster would take.
    pub fn manifests(&self, config: &str, store_is_here: bool) -> Result<Vec<Value>> {
        self.site.check(self.workers, self.shards)?;
        let mut manifests = vec![self.job_set(), self.config_map(config)];
        if let Some(shard) = self.site.shard.as_ref().filter(|_| self.shards > 0) {
            manifests.push(self.service());
            manifests.push(self.stateful_set(shard, store_is_here));
            manifests.push(self.disruption_budget());
        }
        super::check::check(&manifests, &self.given())?;
        Ok(manifests)
    }

    /// What must be in the cluster already, by kind and name.
    pub fn given(&self) -> Vec<(&'static str, String)> {
        let site = self.site;
        let pods = || [Some(&site.worker), site.shard.as_ref()].into_iter().flatten();
        let secrets = [&site.pull_secret, &site.store_secret].into_iter();
        let secrets = secrets.chain(pods().flat_map(|pods| [&pods.certificate, &pods.token]));
        let claim = ("PersistentVolumeClaim", site.volume.clone());
        let mut given: Vec<_> =
            secrets.flatten().map(|name| ("Secret", name.clone())).chain([claim]).collect();
        given.sort();
        given.dedup();
        given
    }

    fn shard_service(&self) -> String {
        format!("{}-shard", self.name)
    }

    /// What tells pods of this job, or of one kind of them, from others.
    fn labels(&self, component: Option<&str>) -> Value {
        let mut labels =
            json!({ "app.kubernetes.io/name": "anchorage", "app.kubernetes.io/instance": self.name });
        if let Some(component) = component {
            labels["app.kubernetes.io/component"] = component.into();
        }
        labels
    }

    fn metadata(&self, name: &str) -> Value {
        json!({ "name": name, "namespace": self.site.namespace, "labels": self.labels(None) })
    }

    fn config_map(&self, config: &str) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": self.metadata(self.name),
            // All pods of a job, whenever they start, read the same.
            "immutable": true,
            "data": { "run.toml": config },
        })
    }

    fn job_set(&self) -> Value {
        let pods = &self.site.worker;
        let is = |action: &str, codes: &[u8]| {
            let codes = json!({ "containerName": "worker", "operator": "In", "values": codes });
            // The list is empty, not absent: by the schemas of Kubernetes 1.28 it must be there.
            json!({ "action": action, "onExitCodes": codes, "onPodConditions": [] })
        };
        let disrupted = json!([{ "type": "DisruptionTarget", "status": "True" }]);
        let job = json!({
            "completionMode": "Indexed",
            "completions": self.workers,
            "parallelism": self.workers,
            "backoffLimit": self.site.failures,
            // Never two of a rank at once.
            "podReplacementPolicy": "Failed",
            // A pod that is gone is replaced alone: the others go back to a checkpoint in place and wait for it.
            "podFailurePolicy": { "rules": [
                is("Ignore", &[REQUEUE]),
                { "action": "Ignore", "onPodConditions": disrupted },
                // Errors that the program has explained would come again.
                is("FailJob", &[1, 2]),
            ] },
            "template": {
                "metadata": { "labels": self.labels(Some("worker")) },
                "spec": self.worker_pod(pods),
            },
        });
        let mut spec = json!({
            "ttlSecondsAfterFinished": self.site.keep_s,
            "network": { "enableDNSHostnames": true, "publishNotReadyAddresses": true, "subdomain": self.name },
            "replicatedJobs": [{ "name": "worker", "replicas": 1, "template": { "spec": job } }],
        });
        let mut metadata = self.metadata(self.name);
        if let Some(queue) = &self.site.queue {
            metadata["labels"]["kueue.x-k8s.io/queue-name"] = queue.as_str().into();
            // Kueue lets it go when there is room.
            spec["suspend"] = true.into();
        }
        json!({
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": metadata,
            "spec": spec,
        })
    }

    fn worker_pod(&self, pods: &Pods) -> Value {
        let label = |name: &str| json!({ "fieldRef": { "fieldPath": format!("metadata.labels['{name}']") } });
        let variables = json!([
            { "name": "WORLD_SIZE", "value": self.workers.to_string() },
            { "name": "MASTER_ADDR", "value": format!("{0}-worker-0-0.{0}", self.name) },
            { "name": "MASTER_PORT", "value": MASTER.to_string() },
            // Pods of an earlier job of this name are refused.
            { "name": "ANCHORAGE_JOB", "valueFrom": label("batch.kubernetes.io/controller-uid") },
        ]);
        let mut container = self.container("worker", pods, &["train", CONFIG]);
        container["ports"] = json!([{ "name": "master", "containerPort": MASTER }]);
        let mut pod = self.pod((container, variables), pods, false);
        pod["restartPolicy"] = "Never".into();
        pod
    }

    fn service(&self) -> Value {
        let port = |name: &str, port: u16| json!({ "name": name, "port": port, "targetPort": name });
        let spec = json!({
            "clusterIP": "None",
            // A shard has its name while it still reads its blocks.
            "publishNotReadyAddresses": true,
            "selector": self.labels(Some("shard")),
            "ports": [port("grpc", GRPC), port("bulk", BULK), port("http", HTTP)],
        });
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": self.metadata(&self.shard_service()),
            "spec": spec,
        })
    }

    fn stateful_set(&self, pods: &Pods, store_is_here: bool) -> Value {
        let index = "metadata.labels['apps.kubernetes.io/pod-index']";
        let variables = json!([{ "name": "SHARD", "valueFrom": { "fieldRef": { "fieldPath": index } } }]);
        let (of, workers) = (self.shards.to_string(), self.workers.to_string());
        let args =
            ["shard", CONFIG, "--shard", "$(SHARD)", "--of", &of, "--workers", &workers, "--log", "json"];
        let mut container = self.container("shard", pods, &args);
        let port = |name: &str, port: u16| json!({ "name": name, "containerPort": port });
        container["ports"] = json!([port("grpc", GRPC), port("bulk", BULK), port("http", HTTP)]);
        let probe = |path: &str, seconds: u32, failures: u32| {
            let get = json!({ "path": path, "port": "http" });
            json!({ "httpGet": get, "periodSeconds": seconds, "failureThreshold": failures, "timeoutSeconds": 5 })
        };
        // It serves once the corpus is prepared and its blocks are read: an hour at most.
        container["startupProbe"] = probe("/live", 5, 720);
        container["livenessProbe"] = probe("/live", 10, 6);
        container["readinessProbe"] = probe("/ready", 5, 1);
        let mut pod = self.pod((container, variables), pods, !store_is_here);
        let labels = self.labels(Some("shard"));
        // A node that is lost should take one shard with it.
        let spread = json!([{
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": { "matchLabels": labels },
        }]);
        pod["topologySpreadConstraints"] = spread;
        let spec = json!({
            "serviceName": self.shard_service(),
            "replicas": self.shards,
            // They wait for nobody.
            "podManagementPolicy": "Parallel",
            "selector": { "matchLabels": labels },
            "template": { "metadata": { "labels": labels }, "spec": pod },
        });
        json!({
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": self.metadata(&self.shard_service()),
            "spec": spec,
        })
    }

    /// Nodes are emptied of one shard at a time: each costs the steps since the last checkpoint.
    fn disruption_budget(&self) -> Value {
        let spec = json!({ "maxUnavailable": 1, "selector": { "matchLabels": self.labels(Some("shard")) } });
        json!({
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": self.metadata(&self.shard_service()),
            "spec": spec,
        })
    }

    fn container(&self, name: &str, pods: &Pods, args: &[&str]) -> Value {
        // The same at most as at least: the last to be evicted, and threads are as many as there are cores.
        let mut resources = json!({ "cpu": pods.cpu, "memory": pods.memory });
        if pods.gpus > 0 {
            resources[&pods.gpu] = pods.gpus.to_string().into();
        }
        json!({
            "name": name,
            "image": self.site.image,
            "command": ["anchorage"],
            "args": args,
            "workingDir": self.site.mount,
            "resources": { "requests": resources, "limits": resources },
            "securityContext": {
                "allowPrivilegeEscalation": false,
                "readOnlyRootFilesystem": true,
                "capabilities": { "drop": ["ALL"] },
            },
            // The last lines of who failed are shown with its end.
            "terminationMessagePolicy": "FallbackToLogsOnError",
        })
    }

    /// A pod of one container, with all volumes and who it runs as; `reads` the run's volume only.
    fn pod(&self, (mut container, variables): (Value, Value), pods: &Pods, reads: bool) -> Value {
        let site = self.site;
        let mut volumes = vec![
            json!({ "name": CONFIG_VOLUME, "configMap": { "name": self.name } }),
            json!({ "name": RUN_VOLUME, "persistentVolumeClaim": { "claimName": site.volume } }),
            json!({ "name": "tmp", "emptyDir": {} }),
        ];
        let mount = |name: &str, path: &str| json!({ "name": name, "mountPath": path });
        let mut mounts = vec![
            mount(CONFIG_VOLUME, "/etc/anchorage"),
            mount(RUN_VOLUME, &site.mount),
            mount("tmp", "/tmp"),
        ];
        if reads {
            mounts[1]["readOnly"] = true.into();
        }
        if let Some(size) = &pods.shared_memory {
            volumes.push(json!({ "name": "shm", "emptyDir": { "medium": "Memory", "sizeLimit": size } }));
            mounts.push(mount("shm", "/dev/shm"));
        }
        if let Some(size) = &pods.scratch {
            volumes.push(scratch(size, pods.scratch_class.as_deref()));
            mounts.push(mount("scratch", "/scratch"));
        }
        for (name, secret, path) in [("tls", &pods.certificate, TLS), ("token", &pods.token, TOKEN)] {
            if let Some(secret) = secret {
                let source = json!({ "secretName": secret, "defaultMode": 0o400 });
                volumes.push(json!({ "name": name, "secret": source }));
                mounts.push(mount(name, path));
            }
        }
        let mut env = vec![json!({ "name": "HOME", "value": "/tmp" })];
        env.extend(variables.as_array().into_iter().flatten().cloned());
        container["env"] = env.into();
        if let Some(secret) = &site.store_secret {
            container["envFrom"] = json!([{ "secretRef": { "name": secret } }]);
        }
        container["volumeMounts"] = mounts.into();
        let mut pod = json!({
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "terminationGracePeriodSeconds": site.grace_s,
            "securityContext": {
                "runAsNonRoot": true,
                "runAsUser": site.user,
                "runAsGroup": site.user,
                "fsGroup": site.user,
                // Not every file of a large volume, each time.
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "containers": [container],
            "volumes": volumes,
        });
        let tolerations: Vec<Value> = pods.tolerations.iter().map(toleration).collect();
        let optional = [
            ("serviceAccountName", site.service_account.as_deref().map(Value::from)),
            ("priorityClassName", site.priority_class.as_deref().map(Value::from)),
            ("imagePullSecrets", site.pull_secret.as_ref().map(|name| json!([{ "name": name }]))),
            ("nodeSelector", (!pods.node_selector.is_empty()).then(|| json!(pods.node_selector))),
            ("tolerations", (!tolerations.is_empty()).then(|| tolerations.into())),
        ];
        for (key, value) in optional.into_iter().filter_map(|(key, value)| Some((key, value?))) {
            pod[key] = value;
        }
        pod
    }
}

fn scratch(size: &str, class: Option<&str>) -> Value {
    let Some(class) = class else {
        return json!({ "name": "scratch", "emptyDir": { "sizeLimit": size } });
    };
    let claim = json!({
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": class,
        "resources": { "requests": { "storage": size } },
    });
    json!({ "name": "scratch", "ephemeral": { "volumeClaimTemplate": { "spec": claim } } })
}

fn toleration(toleration: &super::Toleration) -> Value {
    let super::Toleration { key, value, effect } = toleration;
    let mut rendered = match value {
        Some(value) => json!({ "key": key, "operator": "Equal", "value": value }),
        None => json!({ "key": key, "operator": "Exists" }),
    };
    if let Some(effect) = effect {
        rendered["effect"] = effect.as_str().into();
    }
    rendered
}

#[cfg(all(test, feature = "kubernetes"))]
mod schema;
#[cfg(test)]
pub(super) mod tests;
