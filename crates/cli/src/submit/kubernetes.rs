//! Runs as jobs of a Kubernetes cluster. Their folder is on the cluster's volume; the one here has `job/` alone.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use launch::kubernetes::{Job, Site, name_of, to_yaml};
use serde_json::Value;

use super::{Submission, SubmitArgs};
use crate::config::Config;

/// What must be in the cluster already, by kind and name.
type Given = [(&'static str, String)];

/// Gives a run to the cluster, or prints what that would be.
pub(super) fn submit_to(args: &SubmitArgs, site: &Site) -> Result<()> {
    let SubmitArgs { config: files, shape, .. } = args;
    let config = Config::load(&files.config, &files.set)?;
    let run = on_volume(site, ("run.dir", &config.run.dir))?;
    on_volume(site, ("corpus.prepared", &config.corpus.prepared))?;
    if let Some(init) = &config.anchor.init {
        on_volume(site, ("anchor.init", init))?;
    }
    if let Some(checkpoint) = &config.anchor.checkpoint {
        on_volume(site, ("anchor.checkpoint", checkpoint))?;
    }
    refuse_secrets(&config)?;
    let name = name_of(&config.run.dir.to_string_lossy());
    let job = Job { name: &name, workers: shape.workers, shards: shape.shards, site };
    let mut set = files.set.clone();
    if config.train.phase.has_memory() && config.shard.store.is_none() {
        // Where the bank's checkpoints are while it is on shards.
        set.push(format!("shard.store.url={:?}", run.join("bank").display().to_string()));
    }
    set.extend(job.settings());
    let config = Config::load(&files.config, &set)?;
    let store = config.shard.store.as_ref();
    let is_here = store.is_none_or(|store| !store.url.contains("://") || store.url.starts_with("file://"));
    let manifests = job.manifests(&config.to_toml()?, is_here)?;
    if args.dry_run {
        print!("{}", to_yaml(&manifests));
        return Ok(());
    }
    let dir = std::path::absolute(&config.run.dir)?;
    submit(&Submission { config, dir, shape: *shape }, &manifests, &job.given())
}

/// A folder of the run, as it is in the pods.
fn on_volume(site: &Site, (key, folder): (&str, &Path)) -> Result<PathBuf> {
    let mount = Path::new(&site.mount);
    let inside = mount.join(folder);
    if !inside.starts_with(mount) || inside.components().any(|part| part.as_os_str() == "..") {
        bail!(
            "{key}: expected a folder on the cluster's volume (relative, or in kubernetes.mount, {}), found {}",
            site.mount,
            folder.display()
        );
    }
    Ok(inside)
}

/// What every reader of a namespace's objects may read holds no credentials.
fn refuse_secrets(config: &Config) -> Result<()> {
    let of_corpus = config.corpus.store.keys().map(|key| ("corpus.store", key));
    let shards = config.shard.store.iter().flat_map(|store| store.options.keys());
    let mut keys = of_corpus.chain(shards.map(|key| ("shard.store.options", key)));
    let is_secret = |key: &str| ["key", "password", "secret", "token"].iter().any(|word| key.contains(word));
    match keys.find(|(_, key)| is_secret(key)) {
        None => Ok(()),
        Some((section, key)) => bail!(
            "{section}.{key}: expected no credentials in what a ConfigMap will hold (kubernetes.store_secret names \
             a Secret for them), found some"
        ),
    }
}

#[cfg(feature = "kubernetes")]
use with_cluster::submit;
#[cfg(feature = "kubernetes")]
pub(super) use with_cluster::{cancel, logs, requeue, status};
#[cfg(not(feature = "kubernetes"))]
use without_cluster::submit;
#[cfg(not(feature = "kubernetes"))]
pub(super) use without_cluster::{cancel, logs, requeue, status};

#[cfg(feature = "kubernetes")]
mod with_cluster {
    use std::time::Duration;

    use anyhow::Context;
    use launch::kubernetes::{Cluster, JobStatus, Phase};
    use tokio::runtime::{Builder, Runtime};

    use super::*;
    use crate::run::write_whole;
    use crate::submit::Submitted;

    /// In `job/` of the run's folder.
    const MANIFESTS: &str = "manifests.json";

    fn runtime() -> Result<Runtime> {
        Ok(Builder::new_current_thread().enable_all().build()?)
    }

    /// Has the cluster make the job.
    pub(in crate::submit) fn submit(
        submission: &Submission,
        manifests: &[Value],
        given: &Given,
    ) -> Result<()> {
        runtime()?.block_on(async {
            let cluster = Cluster::connect(manifests).await?;
            cluster.refuse_second().await?;
            submission.prepare()?;
            write_whole(&submission.folder().join(MANIFESTS), &serde_json::to_vec_pretty(manifests)?)?;
            cluster.apply(given).await?;
            anyhow::Ok(())
        })?;
        submission.note(&Submitted::Kubernetes)?;
        println!("{}", name(manifests));
        Ok(())
    }

    /// What the cluster was given.
    fn manifests(run: &Path) -> Result<Vec<Value>> {
        let path = run.join("job").join(MANIFESTS);
        let named = || path.display().to_string();
        let text = std::fs::read(&path).with_context(named)?;
        let manifests: Vec<Value> = serde_json::from_slice(&text).with_context(named)?;
        if manifests.is_empty() {
            bail!("{}: expected the manifests of a job, found none", path.display());
        }
        Ok(manifests)
    }

    pub(in crate::submit) fn status(run: &Path) -> Result<()> {
        let manifests = manifests(run)?;
        let JobStatus { phase, pods } =
            runtime()?.block_on(async { Cluster::connect(&manifests).await?.status().await })?;
        println!("job {}: {phase}", name(&manifests));
        for pod in pods {
            let line = format!(
                "{:<40} {:<10} {} restarts  {}  {}",
                pod.name, pod.phase, pod.restarts, pod.node, pod.reason
            );
            println!("{}", line.trim_end());
        }
        Ok(())
    }

    pub(in crate::submit) fn logs(run: &Path, (only, lines): (Option<&str>, usize)) -> Result<()> {
        let manifests = manifests(run)?;
        let lines = i64::try_from(lines).context("--lines")?;
        let logs = runtime()?.block_on(async { Cluster::connect(&manifests).await?.logs(lines).await })?;
        let names: Vec<&str> = logs.iter().map(|(name, _)| name.as_str()).collect();
        let is_meant = |name: &str| only.is_none_or(|only| name.contains(only));
        if let Some(only) = only.filter(|_| !names.iter().any(|name| is_meant(name))) {
            bail!("{only}: expected a part of a pod's name, found the pods {}", names.join(", "));
        }
        for (name, text) in logs.iter().filter(|(name, _)| is_meant(name)) {
            println!("==> {name} <==\n{}", text.trim_end());
        }
        Ok(())
    }

    /// Has the workers save, and takes the job away.
    pub(in crate::submit) fn cancel(run: &Path) -> Result<()> {
        let manifests = manifests(run)?;
        runtime()?.block_on(async { Cluster::connect(&manifests).await?.cancel(grace(&manifests)).await })?;
        println!("job {} is cancelled", name(&manifests));
        Ok(())
    }

    /// Takes the job away as [`cancel`] does, if it is there, and makes it again.
    pub(in crate::submit) fn requeue(run: &Path) -> Result<()> {
        let manifests = manifests(run)?;
        runtime()?.block_on(async {
            let cluster = Cluster::connect(&manifests).await?;
            if cluster.status().await?.phase != Phase::Absent {
                cluster.cancel(grace(&manifests)).await?;
            }
            cluster.apply(&[]).await
        })?;
        println!("job {} is queued again", name(&manifests));
        Ok(())
    }

    fn name(manifests: &[Value]) -> &str {
        manifests.first().and_then(|set| set["metadata"]["name"].as_str()).unwrap_or_default()
    }

    /// What its workers have to save.
    fn grace(manifests: &[Value]) -> Duration {
        let place = "/spec/replicatedJobs/0/template/spec/template/spec/terminationGracePeriodSeconds";
        let seconds = manifests.first().and_then(|set| set.pointer(place)?.as_u64());
        Duration::from_secs(seconds.unwrap_or_default())
    }
}

/// What a program says that was built without the feature.
#[cfg(not(feature = "kubernetes"))]
mod without_cluster {
    use super::*;

    const BUILT: &str = "this program was built without the feature `kubernetes`";

    pub(in crate::submit) fn submit(_: &Submission, _: &[Value], _: &Given) -> Result<()> {
        bail!("{BUILT}: give what --dry-run prints to `kubectl apply -f -`");
    }

    pub(in crate::submit) fn status(_: &Path) -> Result<()> {
        bail!("{BUILT}: `kubectl get` and `kubectl logs` show jobs by the label app.kubernetes.io/instance");
    }

    pub(in crate::submit) fn logs(run: &Path, _: (Option<&str>, usize)) -> Result<()> {
        status(run)
    }

    pub(in crate::submit) fn cancel(run: &Path) -> Result<()> {
        status(run)
    }

    pub(in crate::submit) fn requeue(run: &Path) -> Result<()> {
        status(run)
    }
}
