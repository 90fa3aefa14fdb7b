//! Models by name: a folder, or an id on the Hugging Face hub.

use std::path::{Path, PathBuf};

use hf_hub::Cache;
use hf_hub::api::sync::{ApiBuilder, ApiError};

use crate::{Bert, Error, Result, settings};

/// The files of a BERT's folder, the one that no folder lacks last.
pub const FILES: [&str; 5] =
    ["config.json", "modules.json", "sentence_bert_config.json", "tokenizer.json", "model.safetensors"];

/// The BERT in a folder, or of a hub id.
///
/// # Errors
/// As [`folder`] and [`Bert::load`].
pub fn open(name: &Path) -> Result<Bert> {
    Bert::load(&folder(name, &FILES)?)
}

/// The folder that `name` is, or, if it is an id of the Hugging Face hub (`owner/name`), the one in the hub's
/// local cache, which is filled unless it holds all of `files`: those that the repository has, in its root and in the
/// folders of its modules (`1_Pooling`). The cache is the one that other tools use: `HF_HOME`, or
/// `~/.cache/huggingface`.
///
/// # Errors
/// When `name` is neither, the hub does not answer, or it has no such repository or last file.
pub fn folder(name: &Path, files: &[&str]) -> Result<PathBuf> {
    if name.is_dir() {
        return Ok(name.to_owned());
    }
    let id = name.to_str().filter(|id| is_id(id)).ok_or_else(|| Error::Name { path: name.to_owned() })?;
    let last = files.last().copied().unwrap_or_default();
    let cache = Cache::from_env().model(id.to_owned());
    // Another tool may have fetched only some, and a model without its modules would be another model.
    let cached: Option<Vec<PathBuf>> = files.iter().map(|file| cache.get(file)).collect();
    let modules = cache.get("modules.json");
    let lacks_pooling = modules.as_deref().and_then(Path::parent).is_some_and(settings::lacks_pooling);
    let file = match cached.filter(|_| !lacks_pooling).and_then(|mut cached| cached.pop()) {
        Some(file) => file,
        None => fetch(id, files, last)?,
    };
    Ok(file.parent().unwrap_or(&file).to_owned())
}

/// Fetches what is there of `files`, and then `last`, whose presence so tells that all is.
fn fetch(id: &str, files: &[&str], last: &str) -> Result<PathBuf> {
    let error = |reason: String| Error::Hub { id: id.to_owned(), reason: reason.replace('\n', " ") };
    let failed = |cause: ApiError| error(cause.to_string());
    let repository = ApiBuilder::from_env().build().map_err(failed)?.model(id.to_owned());
    let there = repository.info().map_err(failed)?.siblings;
    let is_wanted = |path: &str| match path.split_once('/') {
        None => files.contains(&path) && path != last,
        Some((folder, file)) => folder.starts_with(|c: char| c.is_ascii_digit()) && files.contains(&file),
    };
    for file in there.iter().map(|file| file.rfilename.as_str()).filter(|path| is_wanted(path)) {
        repository.get(file).map_err(failed)?;
    }
    if !there.iter().any(|file| file.rfilename == last) {
        return Err(error(format!("it has no {last}")));
    }
    repository.get(last).map_err(failed)
}

/// Whether a name has the form of a hub id.
fn is_id(name: &str) -> bool {
    let is_part = |part: &str| {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && !part.starts_with('.') && part.chars().all(is_plain)
    };
    name.split_once('/').is_some_and(|(owner, name)| is_part(owner) && is_part(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_an_owner_and_a_name() {
        for id in ["sentence-transformers/all-MiniLM-L6-v2", "a/b_1.0"] {
            assert!(is_id(id), "{id}");
        }
        for name in ["minilm", "a/b/c", "./models", "../models", "/models", "models/", "a/b c", ""] {
            assert!(!is_id(name), "{name}");
        }
    }
}
