//! The files that `tokenise` writes, and the journal from which a killed run goes on.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::files::{NewFile, read_json, remove, write_json};
use super::fingerprint::Fingerprint;
use super::tokens::{DOCUMENTS, DocumentRecord, LABELS, MANIFEST, Manifest, NO_LABEL, TOKENS, WINDOWS};
use super::tokens::{Window, is_validation, token_bytes};
use crate::source::FileRecord;
use crate::{Error, Result};

const JOURNAL: &str = "tokenise.journal.json";

/// How far the stage has come. On disk it always describes the state after a whole source file, of
/// which everything has reached the disk.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(super) struct Journal {
    /// Hash of all that decides the result; a journal of other inputs is of no use.
    pub(super) inputs: String,
    /// The source files that are done.
    pub(super) files: Vec<FileRecord>,
    pub(super) n_documents: u64,
    pub(super) n_validation_documents: u64,
    pub(super) first_held_out: Option<u64>,
    pub(super) n_windows: u64,
    pub(super) n_tokens: u64,
    pub(super) n_empty: u64,
    labels: Vec<String>,
}

/// Writes tokens, documents and windows under temporary names.
pub(super) struct Writer {
    pub(super) done: Journal,
    dir: PathBuf,
    layout: Layout,
    tokens: NewFile,
    documents: NewFile,
    windows: NewFile,
    label_indices: HashMap<String, u32>,
    saved_tokens: u64,
}

/// What a document becomes.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    pub(super) vocab_size: usize,
    pub(super) window: u32,
    pub(super) validation_permille: u32,
}

impl Writer {
    /// Goes on where the journal in `dir` ends if it is of the same inputs and the files it speaks of
    /// are there; else begins anew.
    pub(super) fn open(dir: &Path, inputs: String, layout: Layout) -> Result<Self> {
        let journal = read_json::<Journal>(&dir.join(JOURNAL))?.filter(|journal| journal.inputs == inputs);
        if let Some(journal) = journal
            && let Some(writer) = Self::resume(dir, journal, layout)?
        {
            return Ok(writer);
        }
        remove(&dir.join(JOURNAL))?;
        Ok(Self {
            done: Journal { inputs, ..Journal::default() },
            dir: dir.to_owned(),
            layout,
            tokens: NewFile::create(&dir.join(TOKENS))?,
            documents: NewFile::create(&dir.join(DOCUMENTS))?,
            windows: NewFile::create(&dir.join(WINDOWS))?,
            label_indices: HashMap::new(),
            saved_tokens: 0,
        })
    }

    fn resume(dir: &Path, journal: Journal, layout: Layout) -> Result<Option<Self>> {
        let file = |name: &str, n: u64, bytes: usize| NewFile::resume(&dir.join(name), n * bytes as u64);
        let tokens = file(TOKENS, journal.n_tokens, token_bytes(layout.vocab_size))?;
        let documents = file(DOCUMENTS, journal.n_documents, size_of::<DocumentRecord>())?;
        let windows = file(WINDOWS, journal.n_windows, size_of::<Window>())?;
        let (Some(tokens), Some(documents), Some(windows)) = (tokens, documents, windows) else {
            return Ok(None);
        };
        let label_indices = (0..).zip(&journal.labels).map(|(index, label)| (label.clone(), index)).collect();
        let saved_tokens = journal.n_tokens;
        let dir = dir.to_owned();
        Ok(Some(Self { done: journal, dir, layout, tokens, documents, windows, label_indices, saved_tokens }))
    }

    /// Appends a document and its windows. Every window but a document's last is full.
    pub(super) fn add(&mut self, id_hash: u64, label: Option<String>, tokens: &[u32]) -> Result<()> {
        let too_many = |what, limit: u32| Error::TooMany { what, limit: u64::from(limit) };
        let len = u32::try_from(tokens.len()).map_err(|_| too_many("tokens in a document", u32::MAX))?;
        let document = u32::try_from(self.done.n_documents)
            .map_err(|_| too_many("documents in a prepared folder", u32::MAX))?;
        let label = self.label_index(label)?;
        let start = self.done.n_tokens;
        self.documents.write(bytemuck::bytes_of(&DocumentRecord { start, id_hash, len, label }))?;
        match token_bytes(self.layout.vocab_size) {
            // Every token is below the vocabulary size, at most 65,536 here.
            2 => {
                let narrow: Vec<u16> = tokens.iter().map(|&token| token as u16).collect();
                self.tokens.write(bytemuck::cast_slice(&narrow))?;
            }
            _ => self.tokens.write(bytemuck::cast_slice(tokens))?,
        }
        let mut offset = 0;
        while offset < len {
            let window = Window {
                start: start + u64::from(offset),
                document,
                len: self.layout.window.min(len - offset),
            };
            self.windows.write(bytemuck::bytes_of(&window))?;
            self.done.n_windows += 1;
            offset += window.len;
        }
        self.done.n_documents += 1;
        let held_out =
            self.done.first_held_out.is_some() || is_validation(id_hash, self.layout.validation_permille);
        self.done.n_validation_documents += u64::from(held_out);
        self.done.n_tokens += u64::from(len);
        Ok(())
    }

    /// All documents from here on are of validation files.
    pub(super) fn hold_out_from_here(&mut self) {
        self.done.first_held_out.get_or_insert(self.done.n_documents);
    }

    fn label_index(&mut self, label: Option<String>) -> Result<u32> {
        let Some(label) = label else { return Ok(NO_LABEL) };
        if let Some(&index) = self.label_indices.get(&label) {
            return Ok(index);
        }
        let limit = u64::from(NO_LABEL);
        let index = self.done.labels.len() as u64;
        if index == limit {
            return Err(Error::TooMany { what: "labels", limit });
        }
        self.done.labels.push(label.clone());
        self.label_indices.insert(label, index as u32);
        Ok(index as u32)
    }

    /// Ends a source file. The journal is written when `journal_tokens` tokens have come since the
    /// last time: after every small file it would cost more than it saves.
    pub(super) fn end_file(&mut self, record: FileRecord, n_empty: u64, journal_tokens: u64) -> Result<()> {
        self.done.files.push(record);
        self.done.n_empty += n_empty;
        if self.done.n_tokens - self.saved_tokens < journal_tokens {
            return Ok(());
        }
        self.tokens.sync()?;
        self.documents.sync()?;
        self.windows.sync()?;
        write_json(&self.dir.join(JOURNAL), &self.done)?;
        self.saved_tokens = self.done.n_tokens;
        Ok(())
    }

    /// Puts all files in their places, the manifest last. What an earlier run left stops counting
    /// before the first of them changes.
    pub(super) fn finish(self, manifest: &Manifest) -> Result<()> {
        Fingerprint::remove(&self.dir)?;
        remove(&self.dir.join(MANIFEST))?;
        self.tokens.commit()?;
        self.documents.commit()?;
        self.windows.commit()?;
        write_json(&self.dir.join(LABELS), &self.done.labels)?;
        write_json(&self.dir.join(MANIFEST), manifest)?;
        remove(&self.dir.join(JOURNAL))
    }
}
