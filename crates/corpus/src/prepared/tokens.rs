//! What the stage `tokenise` leaves: tokens, documents, windows, labels.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytemuck::{Pod, Zeroable};
use memmap2::Mmap;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::files::{map, read_json};
use crate::source::FileRecord;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

pub(super) const TOKENS: &str = "tokens.bin";
pub(super) const DOCUMENTS: &str = "documents.bin";
pub(super) const WINDOWS: &str = "windows.bin";
pub(super) const LABELS: &str = "labels.json";
pub(super) const MANIFEST: &str = "tokens.json";

/// The version of the layout.
pub(super) const FORMAT: &str = "anchorage.tokens.v1";

/// The label index of a document without a label.
pub(super) const NO_LABEL: u32 = u32::MAX;

/// `tokens.json`: written last, it makes the other files count.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub(super) format: String,
    pub(super) tokenizer: String,
    pub(super) vocab_size: usize,
    pub(super) eot: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) bos: Option<u32>,
    /// Tokens of a window at most.
    pub(super) window: u32,
    /// Documents of a thousand that are validation.
    pub(super) validation_permille: u32,
    pub(super) n_documents: u64,
    pub(super) n_validation_documents: u64,
    /// The first document of the validation files, which come last.
    pub(super) first_held_out: Option<u64>,
    pub(super) n_windows: u64,
    pub(super) n_tokens: u64,
    pub(super) n_empty: u64,
    pub(super) files: Vec<FileRecord>,
    /// The options that decided the content, by name.
    pub(super) options: BTreeMap<String, Value>,
}

/// A record of `documents.bin`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct DocumentRecord {
    /// The first token in `tokens.bin`.
    pub(super) start: u64,
    /// Hash of the id.
    pub(super) id_hash: u64,
    /// Tokens.
    pub(super) len: u32,
    /// Index into `labels.json`, or [`NO_LABEL`].
    pub(super) label: u32,
}

/// A record of `windows.bin`: a run of tokens of one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Window {
    /// The first token in `tokens.bin`.
    pub start: u64,
    /// The document.
    pub document: u32,
    /// Tokens, at least 1.
    pub len: u32,
}

/// Bytes of a token in `tokens.bin`.
pub(super) fn token_bytes(vocab_size: usize) -> usize {
    if vocab_size <= 1 << 16 { 2 } else { 4 }
}

/// Whether a document with this id hash is validation: decided by the id alone, so neither the order
/// of the files nor their division changes it.
pub(super) fn is_validation(id_hash: u64, permille: u32) -> bool {
    id_hash % 1000 < u64::from(permille)
}

/// The tokens of a prepared folder, mapped into memory.
pub struct TokenStore {
    dir: PathBuf,
    manifest: Manifest,
    labels: Vec<String>,
    tokens: Mmap,
    documents: Mmap,
    windows: Mmap,
}

impl TokenStore {
    /// Opens the tokens in `dir`. Fails when `tokenise` has not finished there, and on a file of
    /// another size than the manifest says.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST);
        let manifest: Manifest =
            read_json(&path)?.ok_or_else(|| Error::NotPrepared { path: path.clone(), stage: "tokenise" })?;
        if manifest.format != FORMAT {
            let expected = format!("format {FORMAT}");
            return Err(Error::WrongFile { path, expected, found: format!("format {}", manifest.format) });
        }
        let sized = |name: &str, n: u64, bytes: usize| -> Result<Mmap> {
            let path = dir.join(name);
            let map = map(&path)?;
            let (expected, found) = (n.saturating_mul(bytes as u64), map.len() as u64);
            if expected == found { Ok(map) } else { Err(Error::Size { path, expected, found }) }
        };
        let labels_path = dir.join(LABELS);
        Ok(Self {
            tokens: sized(TOKENS, manifest.n_tokens, token_bytes(manifest.vocab_size))?,
            documents: sized(DOCUMENTS, manifest.n_documents, size_of::<DocumentRecord>())?,
            windows: sized(WINDOWS, manifest.n_windows, size_of::<Window>())?,
            labels: read_json(&labels_path)?
                .ok_or(Error::NotPrepared { path: labels_path, stage: "tokenise" })?,
            dir: dir.to_owned(),
            manifest,
        })
    }

    /// Documents, training and validation.
    pub fn n_documents(&self) -> usize {
        self.document_records().len()
    }

    /// Windows, training and validation.
    pub fn n_windows(&self) -> usize {
        self.window_records().len()
    }

    /// Tokens, without any end-of-text token.
    pub fn n_tokens(&self) -> u64 {
        self.manifest.n_tokens
    }

    /// One more than the highest token id.
    pub fn vocab_size(&self) -> usize {
        self.manifest.vocab_size
    }

    /// The end-of-text token of the tokenizer.
    pub fn eot(&self) -> u32 {
        self.manifest.eot
    }

    /// Hash of the tokenizer that made the tokens.
    pub fn tokenizer_hash(&self) -> &str {
        &self.manifest.tokenizer
    }

    /// Fails when the tokens were made with another tokenizer.
    pub fn check_tokenizer(&self, tokenizer: &Tokenizer) -> Result<()> {
        if tokenizer.hash() == self.manifest.tokenizer {
            return Ok(());
        }
        Err(Error::OtherTokenizer {
            path: self.dir.join(TOKENS),
            expected: self.manifest.tokenizer.clone(),
            found: tokenizer.hash().to_owned(),
        })
    }

    /// Window `index`. Fails past the end.
    pub fn window(&self, index: usize) -> Result<Window> {
        let windows = self.window_records();
        windows.get(index).copied().ok_or(Error::OutOfRange {
            what: "window",
            index: index as u64,
            len: windows.len() as u64,
        })
    }

    /// Windows in the order of their documents' ids (as hashes), and within a document from its start: the same for
    /// the same documents however they are divided into files, as long as ids are given and differ. Fails on a window
    /// of a document that is not there.
    pub fn windows_by_id(&self) -> Result<Vec<u32>> {
        let key = |window: &Window| Ok((self.document(window.document)?.id_hash, window.start));
        let keys = self.window_records().iter().map(key).collect::<Result<Vec<_>>>()?;
        let mut order: Vec<u32> = (0..keys.len() as u32).collect();
        order.sort_by_key(|&index| keys[index as usize]);
        Ok(order)
    }

    /// The tokens of window `index`. Fails past the end, and on a token that the vocabulary does not
    /// have.
    pub fn window_tokens(&self, index: usize) -> Result<Vec<u32>> {
        let window = self.window(index)?;
        let mut tokens = Vec::with_capacity(window.len as usize);
        self.extend_tokens(&mut tokens, window.start, window.len as usize)?;
        Ok(tokens)
    }

    /// The token that stands before a window: that which begins texts before each, or without one the end-of-text
    /// token before the first of a document.
    pub fn before(&self, window: &Window) -> Result<Option<u32>> {
        match self.manifest.bos {
            Some(bos) => Ok(Some(bos)),
            None => Ok(self.begins_document(window)?.then_some(self.manifest.eot)),
        }
    }

    /// The token that begins every text, if there is one.
    pub(super) fn bos(&self) -> Option<u32> {
        self.manifest.bos
    }

    /// Whether `window` is the first of its document.
    pub fn begins_document(&self, window: &Window) -> Result<bool> {
        Ok(self.document(window.document)?.start == window.start)
    }

    /// The label of a document. Fails past the end.
    pub fn label(&self, document: u32) -> Result<Option<&str>> {
        let index = self.document(document)?.label;
        if index == NO_LABEL {
            return Ok(None);
        }
        let label = self.labels.get(index as usize).ok_or_else(|| Error::OutOfRange {
            what: "label",
            index: u64::from(index),
            len: self.labels.len() as u64,
        })?;
        Ok(Some(label))
    }

    /// All labels, in the order in which the documents first had them.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// Whether a document is held out for validation. Fails past the end.
    pub fn is_validation(&self, document: u32) -> Result<bool> {
        let id_hash = self.document(document)?.id_hash;
        let in_held_out_file = self.manifest.first_held_out.is_some_and(|first| u64::from(document) >= first);
        Ok(in_held_out_file || is_validation(id_hash, self.manifest.validation_permille))
    }

    pub(super) fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Appends tokens `start .. start + len` of `tokens.bin`.
    pub(super) fn extend_tokens(&self, tokens: &mut Vec<u32>, start: u64, len: usize) -> Result<()> {
        let bytes = token_bytes(self.manifest.vocab_size);
        let range = usize::try_from(start)
            .ok()
            .and_then(|start| Some(start.checked_mul(bytes)?..start.checked_add(len)?.checked_mul(bytes)?))
            .and_then(|range| self.tokens.get(range))
            .ok_or(Error::OutOfRange {
                what: "token",
                index: start.saturating_add(len as u64),
                len: self.manifest.n_tokens,
            })?;
        let first = tokens.len();
        match bytes {
            2 => tokens.extend(bytemuck::cast_slice::<u8, u16>(range).iter().map(|&token| u32::from(token))),
            _ => tokens.extend_from_slice(bytemuck::cast_slice(range)),
        }
        let vocab_size = self.manifest.vocab_size;
        match tokens[first..].iter().position(|&token| token as usize >= vocab_size) {
            None => Ok(()),
            Some(offset) => Err(Error::OutOfVocabulary {
                name: self.dir.join(TOKENS).display().to_string(),
                position: start + offset as u64,
                token: tokens[first + offset],
                vocab_size,
            }),
        }
    }

    fn document(&self, index: u32) -> Result<DocumentRecord> {
        let documents = self.document_records();
        documents.get(index as usize).copied().ok_or(Error::OutOfRange {
            what: "document",
            index: u64::from(index),
            len: documents.len() as u64,
        })
    }

    // The sizes are checked when the folder is opened, and a map begins at a page.
    fn document_records(&self) -> &[DocumentRecord] {
        bytemuck::cast_slice(&self.documents)
    }

    fn window_records(&self) -> &[Window] {
        bytemuck::cast_slice(&self.windows)
    }
}
