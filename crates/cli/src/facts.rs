//! `anchorage corpus facts`

use std::path::Path;

use anyhow::{Context, Result, bail};
use corpus::facts::{Facts, Options, Summary};
use serde::Deserialize;

/// The world of `seed`, with options overridden by `key=value`.
pub(crate) fn options(seed: u64, overrides: &[String]) -> Result<Options> {
    let mut table = toml::Table::try_from(Options { seed, ..Options::default() })?;
    for setting in overrides {
        if !setting.contains('=') {
            bail!("--set {setting}: expected key=value");
        }
        let parsed: toml::Table = toml::from_str(setting).with_context(|| format!("--set {setting}"))?;
        table.extend(parsed);
        // One at a time, so that an error is that of this setting.
        Options::deserialize(table.clone())
            .map_err(|e| anyhow::anyhow!("--set {setting}: {}", e.message().replace('\n', " ")))?;
    }
    Ok(Options::deserialize(table)?)
}

pub(crate) fn generate(out: &Path, options: &Options) -> Result<Summary> {
    std::fs::create_dir_all(out).with_context(|| format!("{}", out.display()))?;
    Ok(Facts::generate(options)?.write(out)?)
}

pub(crate) fn write(out: &Path, seed: u64, overrides: &[String]) -> Result<()> {
    let summary = generate(out, &options(seed, overrides)?)?;
    println!("{}", serde_json::to_string_pretty(&summary)?);
    Ok(())
}
