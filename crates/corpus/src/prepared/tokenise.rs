//! The stage `tokenise`: documents to token ids.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::journal::{Layout, Writer};
use super::stages::{begin_stage, hash_inputs};
use super::tokens::{FORMAT, Manifest};
use crate::source::{self, Document, Documents, FileRecord, SourceFile, SourceOptions};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// A batch of documents ends at this much text, or at this many documents: enough for every thread,
/// and little enough that a few batches in flight do not matter.
const BATCH_BYTES: usize = 8 << 20;
const BATCH_DOCUMENTS: usize = 8192;

/// Tokens between two entries of the journal; a killed run loses at most these and one source file.
const JOURNAL_TOKENS: u64 = 32 << 20;

/// How documents become tokens.
#[derive(Clone, Copy, Debug)]
pub struct TokeniseOptions {
    /// Tokens of a window at most: what is embedded and routed as one.
    pub window: u32,
    /// Documents of a thousand that are held out for validation, by a hash of their id.
    pub validation_permille: u32,
}

impl Default for TokeniseOptions {
    /// Windows of 2,048 tokens (the paper's sequence length), 5 documents of 1,000 for validation.
    fn default() -> Self {
        Self { window: 2048, validation_permille: 5 }
    }
}

/// How far the stage has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokeniseProgress {
    /// Source files done.
    pub n_files_done: usize,
    /// All source files.
    pub n_files: usize,
    /// Documents written.
    pub n_documents: u64,
    /// Tokens written.
    pub n_tokens: u64,
    /// Bytes of the source files that are done, as they lie in the store.
    pub bytes_done: u64,
    /// Bytes of all source files.
    pub bytes: u64,
}

/// What the stage left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokeniseSummary {
    /// Source files read.
    pub n_files: usize,
    /// Documents, training and validation.
    pub n_documents: u64,
    /// Documents held out for validation.
    pub n_validation_documents: u64,
    /// Documents skipped because they held no text.
    pub n_empty: u64,
    /// Windows.
    pub n_windows: u64,
    /// Tokens.
    pub n_tokens: u64,
}

/// Reads the documents of `source` in file order, encodes them in parallel batches, and leaves the
/// token files in `dir` (made if need be). Memory is bounded whatever the size of the corpus. A run
/// that was killed goes on after the last source file of its journal, to the same bytes. Calls
/// `progress` after every batch and every file. Fails on the first unreadable document, on a corpus
/// without documents. The caller holds the folder ([`lock`](crate::lock)).
pub fn tokenise(
    source: &SourceOptions,
    tokenizer: &Tokenizer,
    dir: &Path,
    options: &TokeniseOptions,
    progress: &mut dyn FnMut(TokeniseProgress),
) -> Result<TokeniseSummary> {
    run(&Job { source, tokenizer, dir, options, journal_tokens: JOURNAL_TOKENS }, progress)
}

/// The arguments of [`tokenise`], and how often the journal is written.
pub(super) struct Job<'a> {
    pub(super) source: &'a SourceOptions,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) dir: &'a Path,
    pub(super) options: &'a TokeniseOptions,
    pub(super) journal_tokens: u64,
}

pub(super) fn run(job: &Job, progress: &mut dyn FnMut(TokeniseProgress)) -> Result<TokeniseSummary> {
    check(job.options)?;
    let mut files = source::list(job.source)?;
    let n_training_files = files.len();
    files.extend(source::list_held_out(job.source, &files)?);
    fs::create_dir_all(job.dir).map_err(Error::io(job.dir))?;
    begin_stage(job.dir, "tokenise")?;
    let layout = Layout {
        vocab_size: job.tokenizer.vocab_size(),
        window: job.options.window,
        validation_permille: job.options.validation_permille,
    };
    let mut writer = Writer::open(job.dir, inputs(job, &files), layout)?;
    for (index, file) in files.iter().enumerate().skip(writer.done.files.len()) {
        if index >= n_training_files {
            writer.hold_out_from_here();
        }
        let mut report = |writer: &Writer| progress(progress_of(writer, &files));
        report(&writer);
        let (record, n_empty) = add_file(job, file, &mut writer, &mut report)?;
        writer.end_file(record, n_empty, job.journal_tokens)?;
        report(&writer);
    }
    finish(job, writer)
}

fn check(options: &TokeniseOptions) -> Result<()> {
    if options.window == 0 {
        return Err(Error::Option { key: "window", expected: "at least 1", found: "0".to_owned() });
    }
    let permille = options.validation_permille;
    if permille > 1000 {
        let found = permille.to_string();
        return Err(Error::Option { key: "validation_permille", expected: "at most 1000", found });
    }
    Ok(())
}

/// Encodes the documents of one file while a thread reads ahead. Returns what was read and how many
/// documents were empty.
fn add_file(
    job: &Job,
    file: &SourceFile,
    writer: &mut Writer,
    report: &mut dyn FnMut(&Writer),
) -> Result<(FileRecord, u64)> {
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(2);
        let reading = scope.spawn(move || read_batches(file, job.source, &sender));
        let n_empty = add_batches(job.tokenizer, receiver, writer, report)?;
        let documents = reading.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let n_empty = n_empty + documents.n_empty();
        Ok((documents.finish()?, n_empty))
    })
}

fn read_batches(
    file: &SourceFile,
    options: &SourceOptions,
    sender: &SyncSender<Vec<Document>>,
) -> Result<Documents> {
    let mut documents = source::read(file, options)?;
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for document in &mut documents {
        let document = document?;
        bytes += document.text.len();
        batch.push(document);
        if bytes >= BATCH_BYTES || batch.len() == BATCH_DOCUMENTS {
            bytes = 0;
            // The receiver is gone when encoding failed; that error is the one to report.
            if sender.send(std::mem::take(&mut batch)).is_err() {
                return Ok(documents);
            }
        }
    }
    let _ = sender.send(batch);
    Ok(documents)
}

/// Writes the batches in order. Returns how many documents came out without a token.
fn add_batches(
    tokenizer: &Tokenizer,
    receiver: Receiver<Vec<Document>>,
    writer: &mut Writer,
    report: &mut dyn FnMut(&Writer),
) -> Result<u64> {
    let mut n_empty = 0;
    for batch in receiver {
        let texts: Vec<&str> = batch.iter().map(|document| document.text.as_str()).collect();
        let tokens = tokenizer.encode_batch(&texts)?;
        for (document, tokens) in batch.into_iter().zip(tokens) {
            // A tokenizer's normaliser may leave nothing of a text.
            if tokens.is_empty() {
                n_empty += 1;
                continue;
            }
            writer.add(id_hash(&document.id), document.label, &tokens)?;
        }
        report(writer);
    }
    Ok(n_empty)
}

fn finish(job: &Job, writer: Writer) -> Result<TokeniseSummary> {
    let done = &writer.done;
    if done.n_documents == 0 {
        return Err(Error::EmptyCorpus {
            patterns: job.source.files.join(", "),
            n_files: done.files.len(),
            n_empty: done.n_empty,
        });
    }
    let manifest = Manifest {
        format: FORMAT.to_owned(),
        tokenizer: job.tokenizer.hash().to_owned(),
        vocab_size: job.tokenizer.vocab_size(),
        eot: job.tokenizer.eot(),
        bos: job.tokenizer.bos(),
        window: job.options.window,
        validation_permille: job.options.validation_permille,
        n_documents: done.n_documents,
        n_validation_documents: done.n_validation_documents,
        first_held_out: done.first_held_out,
        n_windows: done.n_windows,
        n_tokens: done.n_tokens,
        n_empty: done.n_empty,
        files: done.files.clone(),
        options: content_options(job),
    };
    writer.finish(&manifest)?;
    Ok(TokeniseSummary {
        n_files: manifest.files.len(),
        n_documents: manifest.n_documents,
        n_validation_documents: manifest.n_validation_documents,
        n_empty: manifest.n_empty,
        n_windows: manifest.n_windows,
        n_tokens: manifest.n_tokens,
    })
}

/// The options that decide what the files hold.
fn content_options(job: &Job) -> BTreeMap<String, Value> {
    let source = job.source;
    let options: [(&str, Value); 8] = [
        ("text_key", source.text_key.clone().into()),
        ("id_key", source.id_key.clone().into()),
        ("label_key", source.label_key.clone().into()),
        ("format", source.format.map_or(Value::Null, |format| format!("{format:?}").to_lowercase().into())),
        ("txt_split", format!("{:?}", source.txt_split).to_lowercase().into()),
        ("n_validation_patterns", source.validation_files.len().into()),
        ("window", job.options.window.into()),
        ("validation_permille", job.options.validation_permille.into()),
    ];
    options.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// A hash of all that decides the result, without reading the files.
fn inputs(job: &Job, files: &[SourceFile]) -> String {
    let options = Value::from_iter(content_options(job)).to_string();
    hash_inputs(&[FORMAT, job.tokenizer.hash(), &options, &source::identity(files)])
}

/// A hash of a document's id that is the same everywhere: the first 8 bytes of its sha256.
pub(super) fn id_hash(id: &str) -> u64 {
    let digest = Sha256::digest(id);
    digest[..8].iter().rev().fold(0, |hash, &byte| hash << 8 | u64::from(byte))
}

fn progress_of(writer: &Writer, files: &[SourceFile]) -> TokeniseProgress {
    let n_files_done = writer.done.files.len();
    TokeniseProgress {
        n_files_done,
        n_files: files.len(),
        n_documents: writer.done.n_documents,
        n_tokens: writer.done.n_tokens,
        bytes_done: files[..n_files_done].iter().map(|file| file.bytes).sum(),
        bytes: files.iter().map(|file| file.bytes).sum(),
    }
}
