//! One file as blocks of bytes, wherever it is.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};

use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{ChunkReader, Length};
use bytes::Bytes;
use object_store::ObjectStoreExt;
use sha2::{Digest, Sha256};

use super::remote::Remote;
use super::{FileRecord, SourceFile};
use crate::{Error, Result};

/// Size of a block, the unit of a request.
const BLOCK_BYTES: u64 = 4 << 20;
/// Blocks kept: enough that the columns of a table, which lie apart, do not evict each other.
const KEPT_BLOCKS: usize = 8;

/// A file, read in blocks. Reading on from block to block fetches the next one ahead.
pub(super) struct Object {
    file: SourceFile,
    origin: Origin,
    block_bytes: u64,
    blocks: Mutex<Blocks>,
}

enum Origin {
    Local(Mutex<File>),
    Remote(Remote),
}

#[derive(Default)]
struct Blocks {
    kept: VecDeque<(u64, Bytes)>,
    ahead: Option<(u64, Receiver<object_store::Result<Bytes>>)>,
    /// Of blocks `0..n_hashed`: the hash grows while the file streams, so that no second pass over
    /// it is needed.
    hasher: Sha256,
    n_hashed: u64,
}

impl Object {
    /// Opens a listed file.
    pub(super) fn open(file: &SourceFile, options: &[(String, String)]) -> Result<Self> {
        let origin = if file.url.contains("://") {
            Origin::Remote(Remote::open(&file.url, options)?)
        } else {
            let path = Path::new(&file.url);
            Origin::Local(Mutex::new(File::open(path).map_err(Error::io(path))?))
        };
        Ok(Self { file: file.clone(), origin, block_bytes: BLOCK_BYTES, blocks: Mutex::default() })
    }

    /// A file of a store at hand, in blocks of `block_bytes`.
    #[cfg(test)]
    pub(super) fn in_store(file: &SourceFile, remote: Remote, block_bytes: u64) -> Self {
        Self { file: file.clone(), origin: Origin::Remote(remote), block_bytes, blocks: Mutex::default() }
    }

    /// The file's path or URL.
    pub(super) fn url(&self) -> &str {
        &self.file.url
    }

    /// The file by content; reads and hashes the blocks that were not read in order.
    pub(super) fn record(&self) -> Result<FileRecord> {
        let hash = match &self.file.etag {
            Some(etag) => format!("etag:{etag}"),
            None => format!("sha256:{}", self.sha256().map_err(|e| Error::reading(self.url(), 0, e))?),
        };
        Ok(FileRecord { url: self.file.url.clone(), bytes: self.file.bytes, hash })
    }

    fn sha256(&self) -> io::Result<String> {
        let n_blocks = self.file.bytes.div_ceil(self.block_bytes);
        loop {
            let n_hashed = self.lock().n_hashed;
            if n_hashed == n_blocks {
                break;
            }
            self.block(n_hashed)?;
        }
        Ok(hex(&self.lock().hasher.clone().finalize()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Block `index`: bytes from `index * block_bytes`, all of the same size but the last.
    fn block(&self, index: u64) -> io::Result<Bytes> {
        let mut blocks = self.lock();
        let kept = blocks.kept.iter().find(|(kept, _)| *kept == index).map(|(_, bytes)| bytes.clone());
        let bytes = match kept {
            Some(bytes) => bytes,
            None => {
                let bytes = self.fetch(index, blocks.ahead.take_if(|(ahead, _)| *ahead == index))?;
                let follows = index == 0 || blocks.kept.iter().any(|(kept, _)| kept + 1 == index);
                if follows && blocks.ahead.is_none() {
                    blocks.ahead = self.request(index + 1).map(|receiver| (index + 1, receiver));
                }
                if blocks.kept.len() == KEPT_BLOCKS {
                    blocks.kept.pop_front();
                }
                blocks.kept.push_back((index, bytes.clone()));
                bytes
            }
        };
        if index == blocks.n_hashed {
            blocks.hasher.update(&bytes);
            blocks.n_hashed += 1;
        }
        Ok(bytes)
    }

    fn fetch(
        &self,
        index: u64,
        ahead: Option<(u64, Receiver<object_store::Result<Bytes>>)>,
    ) -> io::Result<Bytes> {
        let range = self.range(index);
        let bytes = match &self.origin {
            Origin::Local(file) => {
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                file.seek(SeekFrom::Start(range.start))?;
                let mut bytes = Vec::with_capacity((range.end - range.start) as usize);
                (&mut *file).take(range.end - range.start).read_to_end(&mut bytes)?;
                Bytes::from(bytes)
            }
            Origin::Remote(_) => ahead
                .map(|(_, receiver)| receiver)
                .or_else(|| self.request(index))
                .and_then(|receiver| receiver.recv().ok())
                .ok_or_else(|| io::Error::other("the object store's request was aborted"))??,
        };
        if bytes.len() as u64 != range.end - range.start {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{} bytes when listed, bytes {range:?} are no longer there", self.file.bytes),
            ));
        }
        Ok(bytes)
    }

    /// Starts to fetch block `index` of a remote file, if there is one. A local file needs no such
    /// help: the system reads ahead.
    fn request(&self, index: u64) -> Option<Receiver<object_store::Result<Bytes>>> {
        let Origin::Remote(remote) = &self.origin else { return None };
        let range = self.range(index);
        if range.is_empty() {
            return None;
        }
        let (store, path) = (remote.store.clone(), remote.path.clone());
        Some(remote.start(async move { store.get_range(&path, range).await }))
    }

    fn range(&self, index: u64) -> std::ops::Range<u64> {
        let end = |index: u64| index.saturating_mul(self.block_bytes).min(self.file.bytes);
        end(index)..end(index.saturating_add(1))
    }
}

/// Reads an object from a position on.
pub(super) struct ObjectReader {
    object: Arc<Object>,
    position: u64,
}

impl ObjectReader {
    pub(super) fn new(object: Arc<Object>, position: u64) -> Self {
        Self { object, position }
    }
}

impl Read for ObjectReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.position >= self.object.file.bytes || buffer.is_empty() {
            return Ok(0);
        }
        let block = self.object.block(self.position / self.object.block_bytes)?;
        let rest = &block[(self.position % self.object.block_bytes) as usize..];
        let n = rest.len().min(buffer.len());
        buffer[..n].copy_from_slice(&rest[..n]);
        self.position += n as u64;
        Ok(n)
    }
}

/// An object as the parquet reader wants it.
pub(super) struct ParquetObject(pub(super) Arc<Object>);

impl Length for ParquetObject {
    fn len(&self) -> u64 {
        self.0.file.bytes
    }
}

impl ChunkReader for ParquetObject {
    type T = BufReader<ObjectReader>;

    fn get_read(&self, start: u64) -> ::parquet::errors::Result<Self::T> {
        Ok(BufReader::new(ObjectReader::new(self.0.clone(), start)))
    }

    fn get_bytes(&self, start: u64, length: usize) -> ::parquet::errors::Result<Bytes> {
        // A damaged length must not become an allocation.
        if start.saturating_add(length as u64) > self.len() {
            return Err(ParquetError::EOF(format!(
                "{length} bytes at {start} end after the file of {} bytes",
                self.len()
            )));
        }
        let mut bytes = vec![0; length];
        ObjectReader::new(self.0.clone(), start).read_exact(&mut bytes)?;
        Ok(bytes.into())
    }
}

/// Lower-case hexadecimal digits of a hash.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
