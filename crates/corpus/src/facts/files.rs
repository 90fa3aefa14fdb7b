//! The world on disk.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::{Error, Result};
use super::options::N_BUCKETS;
use super::{Facts, Options};
use crate::source::hex;

/// What `facts.json` says of the three files beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Summary {
    /// The options that the world was made with.
    pub options: Options,
    /// The buckets, the rarest first.
    pub buckets: Vec<BucketSummary>,
    /// Entities in all.
    pub entities: usize,
    /// Documents of the training corpus.
    pub documents: usize,
    /// Documents kept for validation.
    pub validation_documents: usize,
    /// Questions of both phrasings.
    pub questions: usize,
    /// Words of the training corpus, as split at white space.
    pub words: usize,
    /// The three files by name.
    pub files: BTreeMap<String, FileSummary>,
}

/// Counts of one frequency bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BucketSummary {
    /// 1 (rarest) to 5.
    pub bucket: usize,
    /// Documents of one entity.
    pub documents_per_entity: usize,
    /// Entities in the bucket.
    pub entities: usize,
    /// Facts of these entities.
    pub facts: usize,
    /// Documents of these entities in the training corpus.
    pub documents: usize,
}

/// Size and content hash of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSummary {
    /// Length in bytes.
    pub bytes: usize,
    /// SHA-256 of the content, lower-case hexadecimal.
    pub sha256: String,
}

/// Writes the three files, then `facts.json`, which vouches for them.
pub(super) fn write(facts: &Facts, dir: &Path) -> Result<Summary> {
    fs::create_dir_all(dir).map_err(io("create", dir))?;
    let contents = [
        ("corpus.jsonl", json_lines("corpus.jsonl", &facts.corpus)?),
        ("validation.jsonl", json_lines("validation.jsonl", &facts.validation)?),
        ("questions.jsonl", json_lines("questions.jsonl", &facts.questions)?),
    ];
    let mut files = BTreeMap::new();
    for (name, bytes) in &contents {
        write_file(&dir.join(name), bytes)?;
        files.insert((*name).to_owned(), FileSummary { bytes: bytes.len(), sha256: sha256(bytes) });
    }
    let summary = summary(facts, files);
    let mut text =
        serde_json::to_vec_pretty(&summary).map_err(|source| Error::Json { file: "facts.json", source })?;
    text.push(b'\n');
    write_file(&dir.join("facts.json"), &text)?;
    Ok(summary)
}

fn summary(facts: &Facts, files: BTreeMap<String, FileSummary>) -> Summary {
    let bucket = |bucket| {
        let members: Vec<_> = facts.entities.iter().filter(|entity| entity.bucket == bucket).collect();
        BucketSummary {
            bucket,
            documents_per_entity: facts.options.ladder[bucket - 1],
            entities: members.len(),
            facts: members.iter().map(|entity| entity.facts.len()).sum(),
            documents: members.iter().map(|entity| entity.documents).sum(),
        }
    };
    Summary {
        options: facts.options.clone(),
        buckets: (1..=N_BUCKETS).map(bucket).collect(),
        entities: facts.entities.len(),
        documents: facts.corpus.len(),
        validation_documents: facts.validation.len(),
        questions: facts.questions.len(),
        words: facts.corpus.iter().map(|document| document.text.split_whitespace().count()).sum(),
        files,
    }
}

fn json_lines<T: Serialize>(file: &'static str, records: &[T]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for record in records {
        serde_json::to_writer(&mut bytes, record).map_err(|source| Error::Json { file, source })?;
        bytes.push(b'\n');
    }
    Ok(bytes)
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    atomic_file::write(path, bytes).map_err(io("write", path))
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}
