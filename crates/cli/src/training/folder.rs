//! What lies in the folder of a run beside its checkpoints.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, bail};
use cluster_tree::ClusterTree;
use corpus::{Fingerprint, Tokenizer};

use crate::checkpoint;
use crate::config::Config;
use crate::prepare::Prepared;
use crate::run::write_whole;

/// Files that a run copies from its prepared corpus, so that it routes and generates on its own.
const COPIED: [&str; 4] = ["tokenizer.json", "tree.safetensors", "fingerprint.json", EMBEDDER];

/// Only the hashed embedder is a file of the prepared corpus.
const EMBEDDER: &str = "embedder.safetensors";

/// Makes the run folder, or checks that its checkpoints are of the same configuration and corpus; only then
/// is anything written.
pub(super) fn begin(config: &Config, prepared: &Prepared, resumed: Option<u64>) -> Result<()> {
    let dir = &config.run.dir;
    let path = dir.join("config.toml");
    if resumed.is_some() {
        check_same(&path, &Config::load(&path, &[])?, config)?;
        Fingerprint::load(dir)?
            .compare(&Fingerprint::load(&prepared.dir)?)
            .with_context(|| format!("{} goes on only with the corpus it began with", dir.display()))?;
    } else {
        copy_belongings(&prepared.dir, dir)?;
        let checkpoint = config.anchor.checkpoint.as_deref().map(checkpoint::describe).transpose()?;
        if let Some(template) = checkpoint.and_then(|checkpoint| checkpoint.chat_template) {
            write_whole(&dir.join("chat_template.jinja"), template.as_bytes())?;
        }
    }
    Ok(())
}

/// Copies what a run routes and generates with.
pub(super) fn copy_belongings(from: &Path, to: &Path) -> Result<()> {
    for name in COPIED {
        let path = from.join(name);
        match fs::read(&path) {
            Ok(bytes) => write_whole(&to.join(name), &bytes)?,
            Err(e) if name == EMBEDDER && e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| format!("{}", path.display())),
        }
    }
    Ok(())
}

/// Writes the configuration that a run is of: from then on it is one.
pub(super) fn write_config(config: &Config) -> Result<()> {
    let mut resolved = config.clone();
    resolved.run.version = Some(env!("CARGO_PKG_VERSION").into());
    write_whole(&config.run.dir.join("config.toml"), resolved.to_toml()?.as_bytes())
}

/// A run goes on only with the configuration it began with; what is only reported may change.
fn check_same(path: &Path, before: &Config, now: &Config) -> Result<()> {
    match difference(before, now)? {
        None => Ok(()),
        Some((key, before, now)) => bail!(
            "{}: {key} was {before} when the run began and is {now} now; use another run.dir, or remove this one",
            path.display()
        ),
    }
}

/// A key that decides what is trained and is not the same, with both values.
pub(super) fn difference(one: &Config, other: &Config) -> Result<Option<(String, String, String)>> {
    let (one, other) = (decisive(one)?, decisive(other)?);
    let key = one.keys().chain(other.keys()).find(|&key| one.get(key) != other.get(key));
    let show = |value: Option<&String>| value.map_or("nothing".to_owned(), Clone::clone);
    Ok(key.map(|key| (key.clone(), show(one.get(key)), show(other.get(key)))))
}

/// The keys that decide what is trained, with their values.
pub(super) fn decisive(config: &Config) -> Result<BTreeMap<String, String>> {
    let table: toml::Table = toml::from_str(&config.to_toml()?)?;
    let mut keys = BTreeMap::new();
    for section in ["corpus", "embed", "tree", "anchor", "memory", "train"] {
        for (key, value) in table.get(section).and_then(toml::Value::as_table).into_iter().flatten() {
            let reported = ["log_every", "save_every", "keep", "validate_every", "validate_sequences"];
            let reported = section == "train" && reported.contains(&key.as_str());
            // How a store or the shards are reached decides nothing: the fingerprint and the bank's
            // identity hold what comes from there.
            let reached = match section {
                "corpus" => key == "store",
                "memory" => ["shards", "replicated", "bulk", "cache_mib", "tls", "token_file", "placement"]
                    .contains(&key.as_str()),
                _ => false,
            };
            if !reported && !reached {
                keys.insert(format!("{section}.{key}"), value.to_string());
            }
        }
    }
    Ok(keys)
}

/// The tree and the tokenizer that a run's folder holds.
pub(super) fn belongings(config: &Config) -> Result<(ClusterTree, Tokenizer)> {
    let dir = &config.run.dir;
    Ok((ClusterTree::load(&dir.join("tree.safetensors"))?, Tokenizer::load(&dir.join("tokenizer.json"))?))
}
