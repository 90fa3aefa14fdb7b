//! From patterns to files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use futures::TryStreamExt;
use object_store::{ObjectMeta, ObjectStoreExt};

use super::remote::Remote;
use super::{SourceFile, SourceOptions, format_of};
use crate::prepared::stages::hash_inputs;
use crate::{Error, Result};

/// `*` stays within one path component, `**` does not.
const GLOB: glob::MatchOptions = glob::MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: true,
};

/// The files that the patterns of `options` name, each once, sorted by path or URL. Fails on a
/// pattern without a file, naming it.
pub fn list(options: &SourceOptions) -> Result<Vec<SourceFile>> {
    if options.files.is_empty() {
        return Err(Error::Option { key: "files", expected: "at least one", found: "none".to_owned() });
    }
    matching(&options.files, options)
}

/// The files of `validation_files`, in the same way; none when there are no patterns. Fails on a file
/// that is among the `training` files too.
pub fn list_held_out(options: &SourceOptions, training: &[SourceFile]) -> Result<Vec<SourceFile>> {
    let held_out = matching(&options.validation_files, options)?;
    match held_out.iter().find(|file| training.iter().any(|other| other.url == file.url)) {
        Some(file) => Err(Error::TrainedAndHeldOut { url: file.url.clone() }),
        None => Ok(held_out),
    }
}

fn matching(patterns: &[String], options: &SourceOptions) -> Result<Vec<SourceFile>> {
    let mut files = BTreeMap::new();
    for pattern in patterns {
        let found = match pattern.split_once("://") {
            Some(("file", _)) => local(&local_path(pattern)?, pattern, options)?,
            Some(_) => remote(pattern, options)?,
            None => local(pattern, pattern, options)?,
        };
        if found.is_empty() {
            return Err(Error::NoMatch { pattern: pattern.clone() });
        }
        files.extend(found.into_iter().map(|file| (file.url.clone(), file)));
    }
    Ok(files.into_values().collect())
}

/// A hash of what a listing knows of its files (path, size, tag, time of change): equal listings mean
/// unchanged files without reading them.
pub(crate) fn identity(files: &[SourceFile]) -> String {
    let parts: Vec<String> = files
        .iter()
        .map(|file| format!("{} {} {:?} {:?}", file.url, file.bytes, file.etag, file.modified_ns))
        .collect();
    hash_inputs(&parts)
}

/// Whether a folder's file is a document file: hidden files and unknown formats are not.
fn belongs(name: &str, options: &SourceOptions) -> bool {
    !super::file_name(name).starts_with('.') && (options.format.is_some() || format_of(name).0.is_some())
}

/// The path of a `file://` pattern. What holds glob characters is no URL proper, so nothing in it is
/// decoded.
fn local_path(pattern: &str) -> Result<String> {
    let invalid = |reason: &str| Error::Url { url: pattern.to_owned(), reason: reason.to_owned() };
    let rest = pattern.strip_prefix("file://").unwrap_or(pattern);
    if rest.contains(['*', '?', '[']) {
        return Ok(rest.to_owned());
    }
    let url = url::Url::parse(pattern).map_err(|e| invalid(&e.to_string()))?;
    let path = url.to_file_path().map_err(|()| invalid("not a local path"))?;
    path.into_os_string().into_string().map_err(|_| invalid("the path is not utf-8"))
}

fn local(path: &str, pattern: &str, options: &SourceOptions) -> Result<Vec<SourceFile>> {
    let invalid = |reason: String| Error::Url { url: pattern.to_owned(), reason };
    let root = Path::new(path);
    if root.is_file() {
        return Ok(vec![local_file(root)?]);
    }
    let is_folder = root.is_dir();
    let pattern = match is_folder {
        true => Path::new(&glob::Pattern::escape(path)).join("**/*").display().to_string(),
        false => path.to_owned(),
    };
    let mut files = Vec::new();
    for found in glob::glob_with(&pattern, GLOB).map_err(|e| invalid(e.to_string()))? {
        let found = found.map_err(|e| Error::Io { path: e.path().to_owned(), source: e.into() })?;
        let wanted = !is_folder || found.to_str().is_none_or(|name| belongs(name, options));
        if wanted && found.is_file() {
            files.push(local_file(&found)?);
        }
    }
    Ok(files)
}

fn local_file(path: &Path) -> Result<SourceFile> {
    let metadata = fs::metadata(path).map_err(Error::io(path))?;
    let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let url = absolute(path)?.into_os_string().into_string().map_err(|_| Error::Url {
        url: path.display().to_string(),
        reason: "the path is not utf-8".to_owned(),
    })?;
    Ok(SourceFile {
        url,
        bytes: metadata.len(),
        etag: None,
        modified_ns: modified.and_then(|time| i64::try_from(time.as_nanos()).ok()),
    })
}

/// The absolute path, with links resolved in the folder only: the name of a link tells the format,
/// that of its target may not.
fn absolute(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path).map_err(Error::io(path))?;
    match (path.parent(), path.file_name()) {
        (Some(folder), Some(name)) => Ok(folder.canonicalize().map_err(Error::io(folder))?.join(name)),
        _ => Ok(path),
    }
}

fn remote(pattern: &str, options: &SourceOptions) -> Result<Vec<SourceFile>> {
    // Up to the folder that holds the first glob character, a pattern is a URL. There, `?` would
    // start a query, which no store takes.
    let base_end = match pattern.find(['*', '[']) {
        Some(start) => pattern[..start].rfind('/').map_or(0, |slash| slash + 1),
        None => pattern.len(),
    };
    let remote = Remote::open(&pattern[..base_end], &options.object_store_options)?;
    remote_files(&remote, pattern, base_end, options)
}

/// The files of `pattern` in a store; `remote.path` is the part of the pattern up to `base_end`.
pub(super) fn remote_files(
    remote: &Remote,
    pattern: &str,
    base_end: usize,
    options: &SourceOptions,
) -> Result<Vec<SourceFile>> {
    let (base, rest) = pattern.split_at(base_end);
    let root = base
        .trim_end_matches('/')
        .strip_suffix(remote.path.as_ref())
        .ok_or_else(|| Error::Url {
            url: pattern.to_owned(),
            reason: "percent-encoded paths are not supported".to_owned(),
        })?
        .trim_end_matches('/');
    let found = if rest.is_empty() {
        remote_named(remote, base, options)?
    } else {
        let full = [remote.path.as_ref(), rest].join(if remote.path.as_ref().is_empty() { "" } else { "/" });
        let glob = glob::Pattern::new(&full)
            .map_err(|e| Error::Url { url: pattern.to_owned(), reason: e.to_string() })?;
        let mut found = below(remote, pattern)?;
        found.retain(|meta| glob.matches_with(meta.location.as_ref(), GLOB));
        found
    };
    Ok(found.into_iter().map(|meta| remote_file(root, meta)).collect())
}

/// The object at `remote.path`, or the document files below it.
fn remote_named(remote: &Remote, url: &str, options: &SourceOptions) -> Result<Vec<ObjectMeta>> {
    if !remote.path.as_ref().is_empty() && !url.ends_with('/') {
        let (store, path) = (remote.store.clone(), remote.path.clone());
        match wait(remote, url, async move { store.head(&path).await }) {
            Ok(meta) => return Ok(vec![meta]),
            // Plain web servers cannot list.
            Err(Error::Store { source: object_store::Error::NotFound { .. }, .. }) => {
                if url.starts_with("http") {
                    return Ok(Vec::new());
                }
            }
            Err(error) => return Err(error),
        }
    }
    let mut found = below(remote, url)?;
    found.retain(|meta| belongs(meta.location.as_ref(), options));
    Ok(found)
}

/// All objects below `remote.path`.
fn below(remote: &Remote, url: &str) -> Result<Vec<ObjectMeta>> {
    let (store, path) = (remote.store.clone(), remote.path.clone());
    wait(remote, url, async move { store.list(Some(&path)).try_collect().await })
}

fn wait<T: Send + 'static>(
    remote: &Remote,
    url: &str,
    future: impl Future<Output = object_store::Result<T>> + Send + 'static,
) -> Result<T> {
    let aborted = |_| Error::Url { url: url.to_owned(), reason: "the request was aborted".to_owned() };
    let result = remote.start(future).recv().map_err(aborted)?;
    result.map_err(|source| Error::Store { url: url.to_owned(), source })
}

fn remote_file(root: &str, meta: ObjectMeta) -> SourceFile {
    SourceFile {
        url: format!("{root}/{}", meta.location),
        bytes: meta.size,
        etag: meta.e_tag,
        modified_ns: meta.last_modified.timestamp_nanos_opt(),
    }
}
