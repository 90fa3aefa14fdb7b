//! The cluster itself, through its API server.

use std::fmt;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, LogParams, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

use crate::{Error, Result};

/// Who owns the fields that are applied.
const MANAGER: &str = "anchorage";
/// Between two looks at what is going away.
const LOOK: Duration = Duration::from_secs(1);
/// What a pod may take to be gone beside the time that it is given.
const GOING: Duration = Duration::from_secs(60);

/// A cluster, and the manifests of one job there, the JobSet first.
pub struct Cluster<'a> {
    client: Client,
    manifests: &'a [Value],
}

/// How a job is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct JobStatus {
    /// Of the whole.
    pub phase: Phase,
    /// Of workers and shards, by name.
    pub pods: Vec<PodStatus>,
}

/// Of a whole job.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Phase {
    /// The cluster does not have it.
    Absent,
    /// It waits, for Kueue or for whoever suspended it.
    Suspended,
    /// It is at work, or on its way there.
    Active,
    /// All workers are done.
    Completed,
    /// It is given up, with what is said of it.
    Failed(String),
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("not in the cluster"),
            Self::Suspended => f.write_str("waiting"),
            Self::Active => f.write_str("active"),
            Self::Completed => f.write_str("completed"),
            Self::Failed(message) => write!(f, "failed: {message}"),
        }
    }
}

/// Of one pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PodStatus {
    /// Its name.
    pub name: String,
    /// `Pending`, `Running`, `Succeeded` or `Failed`.
    pub phase: String,
    /// The node that it is on, if on any.
    pub node: String,
    /// How often its process was started again in place.
    pub restarts: i32,
    /// Why it waits or has ended, in one line, if anything is said.
    pub reason: String,
}

impl<'a> Cluster<'a> {
    /// The cluster that the kubeconfig names, or that this process is in.
    ///
    /// # Errors
    /// When there is none, or it cannot be spoken to.
    pub async fn connect(manifests: &'a [Value]) -> Result<Self> {
        let client = Client::try_default().await.map_err(|error| failed("the cluster", &error))?;
        Ok(Self { client, manifests })
    }

    /// Fails while a job of this name is not over; tells what is there else.
    ///
    /// # Errors
    /// When there is one, and when the server does not say.
    pub async fn refuse_second(&self) -> Result<Phase> {
        match self.phase().await? {
            phase @ (Phase::Active | Phase::Suspended) => {
                let expected = "no job of this name (cancel it, or use another run.dir)".to_owned();
                Err(Error::Job { name: self.label(0), expected, found: format!("one that is {phase}") })
            }
            phase => Ok(phase),
        }
    }

    /// Makes the job, whole or not at all. One of its name that is over is taken away first; `given` is what must
    /// be in the cluster already.
    ///
    /// # Errors
    /// When a job of its name is there, when something of `given` is not, and when the server refuses a manifest.
    pub async fn apply(&self, given: &[(&'static str, String)]) -> Result<()> {
        if self.refuse_second().await? != Phase::Absent {
            self.delete(Duration::ZERO).await?;
        }
        for (kind, name) in given {
            self.require(kind, name).await?;
        }
        // Before anything is made the server says whether it takes all of it.
        let params = PatchParams { dry_run: true, ..PatchParams::apply(MANAGER).validation_strict() };
        for (i, manifest) in self.manifests.iter().enumerate() {
            self.patch(i, manifest, &params).await?;
        }
        let params = PatchParams { dry_run: false, ..params };
        let set = self.patch(0, &self.manifests[0], &params).await?;
        // What belongs to the JobSet goes when it goes.
        let owner = json!([{
            "apiVersion": self.manifests[0]["apiVersion"],
            "kind": "JobSet",
            "name": set.name_any(),
            "uid": set.uid(),
        }]);
        for (i, manifest) in self.manifests.iter().enumerate().skip(1) {
            let mut owned = manifest.clone();
            owned["metadata"]["ownerReferences"] = owner.clone();
            if let Err(error) = self.patch(i, &owned, &params).await {
                self.delete(Duration::ZERO).await?;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Stops the workers, who save, and takes all of the job away; they have `grace` for it. Fails when the cluster
    /// does not have it.
    ///
    /// # Errors
    /// When the server refuses, or pods do not go.
    pub async fn cancel(&self, grace: Duration) -> Result<()> {
        match self.phase().await? {
            Phase::Absent => {
                let found = "none".to_owned();
                return Err(Error::Job {
                    name: self.label(0),
                    expected: "a job in the cluster".into(),
                    found,
                });
            }
            // Shards are there until the workers have saved.
            Phase::Active => {
                let suspend = json!({ "spec": { "suspend": true } });
                let api = self.api(0);
                let name = self.name(0);
                let patched = api.patch(name, &PatchParams::default(), &Patch::Merge(&suspend)).await;
                patched.map_err(|error| failed(&self.label(0), &error))?;
                self.wait(grace, "its workers gone", async || {
                    Ok(self.pods("worker").await?.iter().all(is_over))
                })
                .await?;
            }
            Phase::Suspended | Phase::Completed | Phase::Failed(_) => {}
        }
        self.delete(grace).await
    }

    /// How the job is now.
    ///
    /// # Errors
    /// When the server does not say.
    pub async fn status(&self) -> Result<JobStatus> {
        let mut pods = vec![];
        for component in ["worker", "shard"] {
            pods.extend(self.pods(component).await?.iter().map(status_of));
        }
        Ok(JobStatus { phase: self.phase().await?, pods })
    }

    /// The last lines of every pod that has any, by its name.
    ///
    /// # Errors
    /// When the server does not say.
    pub async fn logs(&self, lines: i64) -> Result<Vec<(String, String)>> {
        let api = Api::<Pod>::namespaced(self.client.clone(), self.namespace());
        let params = LogParams { tail_lines: Some(lines), ..LogParams::default() };
        let mut logs = vec![];
        for component in ["worker", "shard"] {
            for pod in self.pods(component).await? {
                let name = pod.name_any();
                match api.logs(&name, &params).await {
                    Ok(text) => logs.push((name, text)),
                    // One that has not begun has none.
                    Err(kube::Error::Api(status)) if status.code == 400 => {}
                    Err(error) => return Err(failed(&format!("Pod {name}"), &error)),
                }
            }
        }
        Ok(logs)
    }

    async fn phase(&self) -> Result<Phase> {
        let found = self.api(0).get_opt(self.name(0)).await;
        let Some(set) = found.map_err(|error| failed(&self.label(0), &error))? else {
            return Ok(Phase::Absent);
        };
        let conditions = set.data["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let is = |kind: &str| {
            conditions.iter().find(|condition| condition["type"] == kind && condition["status"] == "True")
        };
        Ok(if is("Completed").is_some() {
            Phase::Completed
        } else if let Some(condition) = is("Failed") {
            Phase::Failed(condition["message"].as_str().unwrap_or_default().replace('\n', " "))
        } else if set.data["spec"]["suspend"] == true {
            Phase::Suspended
        } else {
            Phase::Active
        })
    }

    /// Deletes all manifests, and waits until the JobSet is gone: another of its name may follow.
    async fn delete(&self, grace: Duration) -> Result<()> {
        for i in (0..self.manifests.len()).rev() {
            let params = if i == 0 { DeleteParams::foreground() } else { DeleteParams::background() };
            match self.api(i).delete(self.name(i), &params).await {
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                deleted => drop(deleted.map_err(|error| failed(&self.label(i), &error))?),
            }
        }
        self.wait(grace, "it gone", async || Ok(self.phase().await? == Phase::Absent)).await
    }

    /// Looks until something is so, for `grace` and what pods take to be gone.
    async fn wait(&self, grace: Duration, what: &str, so: impl AsyncFn() -> Result<bool>) -> Result<()> {
        let begin = Instant::now();
        while !so().await? {
            if begin.elapsed() > grace + GOING {
                let expected = format!("{what} in {} s", (grace + GOING).as_secs());
                return Err(Error::Job { name: self.label(0), expected, found: "some of it".into() });
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    async fn patch(&self, i: usize, manifest: &Value, params: &PatchParams) -> Result<DynamicObject> {
        let patched = self.api(i).patch(self.name(i), params, &Patch::Apply(manifest)).await;
        patched.map_err(|error| failed(&self.label(i), &error))
    }

    /// Fails when the cluster does not have an object; who may not look is not told.
    async fn require(&self, kind: &str, name: &str) -> Result<()> {
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", kind));
        let api = Api::<DynamicObject>::namespaced_with(self.client.clone(), self.namespace(), &resource);
        match api.get_metadata_opt(name).await {
            Ok(None) => {
                let (name, expected) = (format!("{kind} {name}"), "one that the site names".to_owned());
                Err(Error::Job { name, expected, found: format!("none in namespace {}", self.namespace()) })
            }
            Err(kube::Error::Api(status)) if status.code == 403 => Ok(()),
            found => found.map(drop).map_err(|error| failed(&format!("{kind} {name}"), &error)),
        }
    }

    async fn pods(&self, component: &str) -> Result<Vec<Pod>> {
        let name = self.name(0);
        let labels = format!("app.kubernetes.io/instance={name},app.kubernetes.io/component={component}");
        let api = Api::<Pod>::namespaced(self.client.clone(), self.namespace());
        let listed = api.list(&ListParams::default().labels(&labels)).await;
        let mut pods = listed.map_err(|error| failed(&self.label(0), &error))?.items;
        pods.sort_by_key(ResourceExt::name_any);
        Ok(pods)
    }

    fn api(&self, i: usize) -> Api<DynamicObject> {
        let text = |key: &str| self.manifests[i][key].as_str().unwrap_or_default();
        let (group, version) = text("apiVersion").rsplit_once('/').unwrap_or(("", text("apiVersion")));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, text("kind")));
        Api::namespaced_with(self.client.clone(), self.namespace(), &resource)
    }

    fn name(&self, i: usize) -> &str {
        self.manifests[i]["metadata"]["name"].as_str().unwrap_or_default()
    }

    fn namespace(&self) -> &str {
        self.manifests[0]["metadata"]["namespace"].as_str().unwrap_or_default()
    }

    /// Kind and name, as messages have them.
    fn label(&self, i: usize) -> String {
        format!("{} {}", self.manifests[i]["kind"].as_str().unwrap_or_default(), self.name(i))
    }
}

/// What the server says, or why it says nothing, in one line.
fn failed(what: &str, error: &kube::Error) -> Error {
    let reason = match error {
        kube::Error::Api(status) => status.message.clone(),
        other => with_causes(other),
    };
    Error::Cluster { what: what.to_owned(), reason: reason.replace('\n', " ") }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.map(ToString::to_string).fold(error.to_string(), |text, cause| match text.contains(&cause) {
        true => text,
        false => format!("{text}: {cause}"),
    })
}

fn is_over(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn status_of(pod: &Pod) -> PodStatus {
    let status = pod.status.clone().unwrap_or_default();
    let container = status.container_statuses.unwrap_or_default().into_iter().next();
    let said = container.as_ref().and_then(said_of);
    // Why no node takes it.
    let condition =
        status.conditions.unwrap_or_default().into_iter().find(|condition| condition.status == "False");
    let waits = condition.filter(|_| container.is_none()).and_then(|condition| condition.message);
    PodStatus {
        name: pod.name_any(),
        phase: status.phase.unwrap_or_default(),
        node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default(),
        restarts: container.map_or(0, |container| container.restart_count),
        reason: said.or(waits).unwrap_or_default().trim().replace('\n', " "),
    }
}

/// Why a container waits, or how it ended, now or the last time.
fn said_of(container: &ContainerStatus) -> Option<String> {
    let joined = |parts: Vec<Option<String>>| parts.into_iter().flatten().collect::<Vec<_>>().join(": ");
    let state = container.state.clone().unwrap_or_default();
    if let Some(waiting) = state.waiting {
        return Some(joined(vec![waiting.reason, waiting.message]));
    }
    let ended = state.terminated.or_else(|| container.last_state.clone()?.terminated)?;
    let lines = ended.message.unwrap_or_default();
    let last = lines.lines().rev().find(|line| !line.trim().is_empty()).map(str::to_owned);
    let reason = ended.reason.filter(|reason| reason != "Error" && reason != "Completed");
    Some(joined(vec![Some(format!("exit code {}", ended.exit_code)), reason, last]))
}

#[cfg(test)]
mod tests;
