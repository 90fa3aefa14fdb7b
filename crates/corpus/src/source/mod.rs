//! Documents from files.
//!
//! [`list`] turns paths, folders, globs and URLs into files, sorted; [`read`] streams the documents
//! of one. Nothing holds a whole file: bytes come in ranges of a few MiB.

mod json;
mod lines;
mod listing;
mod object;
mod parquet;
mod remote;
#[cfg(test)]
mod tests;
mod txt;

use std::io::{BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::prepared::files::NewFile;
use crate::{Error, Result};
pub(crate) use listing::identity;
pub use listing::{list, list_held_out};
pub(crate) use object::hex;
use object::{Object, ObjectReader};

/// The longest line or text document in bytes: past it a file is damaged or of another format, and
/// reading on would fill the memory.
const MAX_RECORD_BYTES: usize = 256 << 20;

/// The extensions that tell a format; each also with `.gz` or `.zst` after it.
const EXTENSIONS: &str = ".jsonl, .ndjson, .json, .txt or .parquet, each also .gz or .zst";

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One JSON object per line.
    Jsonl,
    /// Plain text, divided by [`TxtSplit`].
    Txt,
    /// A table with a column of text.
    Parquet,
}

/// What one document of a plain text file is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TxtSplit {
    /// The whole file.
    #[default]
    File,
    /// A line.
    Line,
    /// Lines up to a blank one.
    Paragraph,
}

/// Which files to read and where their documents' parts are.
#[derive(Clone)]
pub struct SourceOptions {
    /// Local paths, folders (all files of a known format below), globs (`data/*.jsonl.zst`, `**` for
    /// any depth), or URLs of the same (`s3://`, `gs://`, `az://`, `https://`, `file://`). A glob in
    /// a URL knows `*` and `[...]` but not `?`, which starts a query.
    pub files: Vec<String>,
    /// More of the same, whose documents are all held out for validation.
    pub validation_files: Vec<String>,
    /// The key or column that holds the text.
    pub text_key: String,
    /// The key or column that holds the id, a string or an integer; without it a document's id is
    /// `<file name>:<record number>`.
    pub id_key: Option<String>,
    /// The key or column that holds the label; a record may lack it.
    pub label_key: Option<String>,
    /// The format of every file; without it each file's extension tells.
    pub format: Option<Format>,
    /// What one document of a plain text file is.
    pub txt_split: TxtSplit,
    /// Options of the object stores as `object_store` names them (`aws_region`, ...). Keys that a
    /// store does not know are ignored, so that one list serves several stores.
    pub object_store_options: Vec<(String, String)>,
}

impl Default for SourceOptions {
    /// No files; the text under `text`, no id and no label.
    fn default() -> Self {
        Self {
            files: Vec::new(),
            validation_files: Vec::new(),
            text_key: "text".to_owned(),
            id_key: None,
            label_key: None,
            format: None,
            txt_split: TxtSplit::File,
            object_store_options: Vec::new(),
        }
    }
}

/// A file that [`list`] found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    /// An absolute path, or a URL when the file is in an object store.
    pub url: String,
    /// Size in bytes.
    pub bytes: u64,
    /// The store's entity tag, where it gives one.
    pub etag: Option<String>,
    /// Time of the last change in nanoseconds since 1970, where it is known.
    pub modified_ns: Option<i64>,
}

/// What was read: one file, by content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// An absolute path, or a URL when the file is in an object store.
    pub url: String,
    /// Size in bytes.
    pub bytes: u64,
    /// `sha256:<hex>` of the content, or `etag:<tag>` where the object store vouches for it.
    pub hash: String,
}

/// A text with its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The value of the id key, or `<file name>:<record number>` (the line or row, from 1, on which
    /// the document begins).
    pub id: String,
    /// The value of the label key.
    pub label: Option<String>,
    /// The text; never empty or all white space.
    pub text: String,
}

/// The documents of one file, in its order. Ends after the first error.
pub struct Documents {
    object: Arc<Object>,
    records: Box<dyn Iterator<Item = Result<Document>> + Send>,
    n_empty: u64,
    failed: bool,
}

impl Documents {
    /// Documents skipped so far because they held nothing but white space.
    pub fn n_empty(&self) -> u64 {
        self.n_empty
    }

    /// The record of the file by content. Reads what the documents did not need of it, if its hash
    /// has to be computed here. Fails when the file cannot be read.
    pub fn finish(self) -> Result<FileRecord> {
        self.object.record()
    }
}

impl Iterator for Documents {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.failed {
            match self.records.next()? {
                Ok(document) if document.text.trim().is_empty() => self.n_empty += 1,
                Ok(document) => return Some(Ok(document)),
                Err(error) => {
                    self.failed = true;
                    return Some(Err(error));
                }
            }
        }
        None
    }
}

/// Streams the documents of `file`. Fails at once when the file cannot be opened or its format is
/// unknown; what is wrong with a record comes as an item.
pub fn read(file: &SourceFile, options: &SourceOptions) -> Result<Documents> {
    let object = Arc::new(Object::open(file, &options.object_store_options)?);
    documents(object, options)
}

fn documents(object: Arc<Object>, options: &SourceOptions) -> Result<Documents> {
    let url = object.url();
    let (name_format, compression) = format_of(url);
    let format = options
        .format
        .or(name_format)
        .ok_or_else(|| Error::UnknownFormat { url: url.to_owned(), expected: EXTENSIONS })?;
    let records: Box<dyn Iterator<Item = Result<Document>> + Send> = match format {
        Format::Jsonl => {
            let lines = lines::Lines::new(decoder(&object, compression)?, url, MAX_RECORD_BYTES);
            Box::new(json::JsonlDocuments::new(lines, options))
        }
        Format::Txt => {
            let lines = lines::Lines::new(decoder(&object, compression)?, url, MAX_RECORD_BYTES);
            Box::new(txt::TxtDocuments::new(lines, options.txt_split, MAX_RECORD_BYTES))
        }
        Format::Parquet if compression == Compression::None => {
            Box::new(parquet::ParquetDocuments::new(object::ParquetObject(object.clone()), url, options)?)
        }
        Format::Parquet => {
            let file = parquet::unpack(&mut decoder(&object, compression)?, url)?;
            Box::new(parquet::ParquetDocuments::new(file, url, options)?)
        }
    };
    Ok(Documents { object, records, n_empty: 0, failed: false })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

/// Format and compression by the name's extensions.
fn format_of(url: &str) -> (Option<Format>, Compression) {
    let name = file_name(url).to_ascii_lowercase();
    let (stem, compression) = match name.rsplit_once('.') {
        Some((stem, "gz")) => (stem, Compression::Gzip),
        Some((stem, "zst")) => (stem, Compression::Zstd),
        _ => (name.as_str(), Compression::None),
    };
    let format = match stem.rsplit_once('.').map(|(_, extension)| extension) {
        Some("jsonl" | "ndjson" | "json") => Some(Format::Jsonl),
        Some("txt") => Some(Format::Txt),
        Some("parquet") => Some(Format::Parquet),
        _ => None,
    };
    (format, compression)
}

/// The last component of a path or URL.
pub(crate) fn file_name(url: &str) -> &str {
    url.rsplit(['/', std::path::MAIN_SEPARATOR]).next().unwrap_or(url)
}

type Decoder = BufReader<Box<dyn Read + Send>>;

/// The decompressed bytes of `object`: all members of a gzip file, all frames of a zstd file.
fn decoder(object: &Arc<Object>, compression: Compression) -> Result<Decoder> {
    let reader = ObjectReader::new(object.clone(), 0);
    let reader: Box<dyn Read + Send> = match compression {
        Compression::None => Box::new(reader),
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(reader)),
        Compression::Zstd => Box::new(zstd_decoder(reader).map_err(|e| Error::reading(object.url(), 1, e))?),
    };
    Ok(BufReader::with_capacity(1 << 16, reader))
}

fn zstd_decoder(reader: ObjectReader) -> std::io::Result<impl Read + Send> {
    let mut decoder = zstd::stream::read::Decoder::new(reader)?;
    // Published corpora are often written with `--long=31`, which the default bound refuses.
    decoder.window_log_max(31)?;
    Ok(decoder)
}

/// Copies a listed file to `to`, which appears whole or not at all; calls `progress` with the bytes done.
///
/// # Errors
/// When reading or writing fails.
pub fn copy(
    file: &SourceFile,
    options: &[(String, String)],
    to: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let mut reader = ObjectReader::new(Arc::new(Object::open(file, options)?), 0);
    let mut copy = NewFile::create(to)?;
    let (mut buffer, mut done) = (vec![0; 1 << 20], 0);
    loop {
        let n = reader.read(&mut buffer).map_err(|e| Error::reading(&file.url, 0, e))?;
        if n == 0 {
            return copy.commit();
        }
        copy.write(&buffer[..n])?;
        done += n as u64;
        progress(done);
    }
}
