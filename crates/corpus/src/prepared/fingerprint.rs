//! What a prepared corpus was made from.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::files::{read_json, write_json};
use super::stages::hash_inputs;
use crate::source::{FileRecord, file_name};
use crate::{Error, Result};

const FILE: &str = "fingerprint.json";

/// All that decides the content of a prepared corpus, as hashes. Equal fingerprints mean equal
/// sequences to the bit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// The document files, in reading order.
    pub files: Vec<FileRecord>,
    /// Hash of the tokenizer.
    pub tokenizer: String,
    /// Hash of the embedder, as the caller of `pack` gave it.
    pub embedder: String,
    /// Hash of the cluster tree, as the caller of `pack` gave it.
    pub tree: String,
    /// Hash of the leaf of every window.
    pub assignment: String,
    /// The options of the stages, by name.
    pub options: BTreeMap<String, Value>,
}

impl Fingerprint {
    /// The fingerprint of the prepared folder `dir`. Fails when `pack` has not finished there.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        read_json(&path)?.ok_or(Error::NotPrepared { path, stage: "pack" })
    }

    pub(super) fn save(&self, dir: &Path) -> Result<()> {
        write_json(&dir.join(FILE), self)
    }

    pub(super) fn remove(dir: &Path) -> Result<()> {
        super::files::remove(&dir.join(FILE))
    }

    /// Fails when `found` is of another corpus than `self`, naming the first file or part that
    /// differs with its hash or value in both. Files are compared in order by name, size and hash, not
    /// by folder: the same files elsewhere are the same corpus.
    pub fn compare(&self, found: &Self) -> Result<()> {
        let n = self.files.len().max(found.files.len());
        for index in 0..n {
            let (ours, theirs) = (self.files.get(index), found.files.get(index));
            if ours.map(content) != theirs.map(content) {
                let url = ours.or(theirs).map_or("", |file| &file.url);
                return differs(format!("file {url}"), describe(ours), describe(theirs));
            }
        }
        let parts = |of: &Self| {
            [&of.tokenizer, &of.embedder, &of.tree, &of.assignment].map(|hash| Some(hash.clone()))
        };
        let names = ["tokenizer", "embedder", "tree", "assignment"];
        for ((name, ours), theirs) in names.into_iter().zip(parts(self)).zip(parts(found)) {
            if ours != theirs {
                return differs(name.to_owned(), ours, theirs);
            }
        }
        for key in self.options.keys().chain(found.options.keys()) {
            let (ours, theirs) = (self.options.get(key), found.options.get(key));
            if ours != theirs {
                let text = |value: Option<&Value>| value.map(Value::to_string);
                return differs(format!("option {key}"), text(ours), text(theirs));
            }
        }
        Ok(())
    }

    /// Hash over all of it, paths aside.
    pub fn hash(&self) -> String {
        let mut parts = vec![self.files.len().to_string()];
        for file in &self.files {
            let (name, bytes, hash) = content(file);
            parts.extend([name.to_owned(), bytes.to_string(), hash.to_owned()]);
        }
        parts.extend([&self.tokenizer, &self.embedder, &self.tree, &self.assignment].map(Clone::clone));
        parts.extend(self.options.iter().flat_map(|(key, value)| [key.clone(), value.to_string()]));
        hash_inputs(&parts)
    }
}

fn content(file: &FileRecord) -> (&str, u64, &str) {
    (file_name(&file.url), file.bytes, &file.hash)
}

fn describe(file: Option<&FileRecord>) -> Option<String> {
    file.map(|file| format!("{} ({} bytes, {})", file_name(&file.url), file.bytes, file.hash))
}

fn differs(part: String, expected: Option<String>, found: Option<String>) -> Result<()> {
    let or_none = |value: Option<String>| value.unwrap_or_else(|| "none".to_owned());
    Err(Error::Differs { part, expected: or_none(expected), found: or_none(found) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint() -> Fingerprint {
        let file = |name: &str, hash: &str| FileRecord {
            url: format!("/data/{name}"),
            bytes: 3,
            hash: format!("sha256:{hash}"),
        };
        Fingerprint {
            files: vec![file("a.txt", "1"), file("b.txt", "2")],
            tokenizer: "t".to_owned(),
            embedder: "e".to_owned(),
            tree: "k".to_owned(),
            assignment: "w".to_owned(),
            options: BTreeMap::from([("seed".to_owned(), 7.into())]),
        }
    }

    fn error(change: impl FnOnce(&mut Fingerprint)) -> String {
        let ours = fingerprint();
        let mut theirs = fingerprint();
        change(&mut theirs);
        assert_ne!(ours.hash(), theirs.hash());
        let error = ours.compare(&theirs).unwrap_err().to_string();
        error.strip_prefix("the corpus differs in ").unwrap().to_owned()
    }

    #[test]
    fn names_what_differs() {
        assert_eq!(
            error(|f| f.files[1].hash = "sha256:9".to_owned()),
            "file /data/b.txt: expected b.txt (3 bytes, sha256:2), found b.txt (3 bytes, sha256:9)"
        );
        assert_eq!(
            error(|f| drop(f.files.pop())),
            "file /data/b.txt: expected b.txt (3 bytes, sha256:2), found none"
        );
        assert_eq!(error(|f| f.tokenizer = "u".to_owned()), "tokenizer: expected t, found u");
        assert_eq!(error(|f| f.embedder = "u".to_owned()), "embedder: expected e, found u");
        assert_eq!(error(|f| f.tree = "l".to_owned()), "tree: expected k, found l");
        assert_eq!(error(|f| f.assignment = "x".to_owned()), "assignment: expected w, found x");
        assert_eq!(error(|f| f.options.clear()), "option seed: expected 7, found none");
        let add = |f: &mut Fingerprint| drop(f.options.insert("window".to_owned(), 1.into()));
        assert_eq!(error(add), "option window: expected none, found 1");
    }

    #[test]
    fn the_folder_of_the_files_does_not_count() {
        let mut moved = fingerprint();
        moved.files[0].url = "s3://bucket/a.txt".to_owned();
        fingerprint().compare(&moved).unwrap();
        assert_eq!(fingerprint().hash(), moved.hash());
    }
}
