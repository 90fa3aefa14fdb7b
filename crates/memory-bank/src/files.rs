//! The files of one bank in an object store: small ones read whole, large ones in ranges, and written
//! in parts while they are hashed.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::stream::{Stream, StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::path::Path as StorePath;
use object_store::{
    GetOptions, GetRange, GetResult, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutPayload,
    UpdateVersion,
};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::task::{JoinSet, spawn_blocking};

use crate::manifest::hex;
use crate::tensor_file::{io_error, mismatch};
use crate::{Error, FileRecord, Result};

/// Pieces of a file that may wait for the thread that hashes them.
const HASH_QUEUE: usize = 64;
/// Parts of a local file after which the disk is told to begin with them.
const WRITE_BACK_PARTS: usize = 4;
/// Pieces shorter than this are copied together: a part of many tiny ones would be slow to write.
const SMALL_BYTES: usize = 64 << 10;

/// A folder of a store, by paths relative to it.
#[derive(Clone)]
pub(crate) struct Files {
    store: Arc<dyn ObjectStore>,
    prefix: StorePath,
    /// What messages call the folder.
    shown: PathBuf,
    /// Whether it is one of this machine's disks.
    is_local: bool,
}

/// What a store made of an update.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Updated {
    Done,
    /// As it should be, or it knows no updates.
    Refused,
}

/// How large files are written.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Parts {
    /// Bytes of every part but the last.
    pub(crate) bytes: usize,
    /// Parts sent at the same time.
    pub(crate) in_flight: usize,
}

impl Files {
    pub(crate) fn new(store: Arc<dyn ObjectStore>, prefix: StorePath, shown: PathBuf) -> Self {
        Self { store, prefix, shown, is_local: false }
    }

    /// A local folder that is there. What is written is on the disk before it has its name.
    pub(crate) fn local(folder: &Path) -> Result<Self> {
        if !folder.is_dir() {
            let found = std::fs::metadata(folder).map(|_| std::io::ErrorKind::NotADirectory.into());
            return Err(io_error(folder, found.unwrap_or_else(|error| error)));
        }
        let store = LocalFileSystem::new_with_prefix(folder)
            .map_err(|source| Error::Store { place: folder.to_owned(), source: Box::new(source) })?;
        let files = Self::new(Arc::new(store.with_fsync(true)), StorePath::default(), folder.to_owned());
        Ok(Self { is_local: true, ..files })
    }

    /// What messages call a file.
    pub(crate) fn place(&self, path: &str) -> PathBuf {
        self.shown.join(path)
    }

    fn at(&self, path: &str) -> StorePath {
        self.prefix.parts().chain(StorePath::from(path).parts()).collect()
    }

    fn failed(&self, path: &str) -> impl Fn(object_store::Error) -> Error {
        let place = self.place(path);
        move |source| Error::Store { place: place.clone(), source: Box::new(source) }
    }

    /// A whole file of at most `limit` bytes.
    pub(crate) async fn read_small(&self, path: &str, limit: u64) -> Result<Bytes> {
        let found = self.store.get(&self.at(path)).await.map_err(self.failed(path))?;
        let n_bytes = found.meta.size;
        if n_bytes > limit {
            let (expected, found) = (format!("at most {limit} bytes"), format!("{n_bytes} bytes"));
            return Err(mismatch(&self.place(path), "size", expected, found));
        }
        self.collect(path, found, n_bytes).await
    }

    /// A range of a file. Fails when the file is of another size than its record says, whatever the
    /// range.
    pub(crate) async fn read(&self, file: &FileRecord, range: Range<u64>) -> Result<Bytes> {
        let n_bytes = range.end - range.start;
        let found = self.get(file, range).await?;
        self.collect(&file.path, found, n_bytes).await
    }

    async fn get(&self, file: &FileRecord, range: Range<u64>) -> Result<GetResult> {
        let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
        match self.store.get_opts(&self.at(&file.path), options).await {
            Ok(found) => self.check_size(file, found.meta.size).map(|()| found),
            // A range beyond the end of a file cut short is an error of each store's own.
            Err(source) => {
                self.check(file).await?;
                Err(self.failed(&file.path)(source))
            }
        }
    }

    /// Fails unless the file is there, in its size.
    pub(crate) async fn check(&self, file: &FileRecord) -> Result<()> {
        let found = self.store.head(&self.at(&file.path)).await.map_err(self.failed(&file.path))?;
        self.check_size(file, found.size)
    }

    fn check_size(&self, file: &FileRecord, found: u64) -> Result<()> {
        if found == file.bytes {
            return Ok(());
        }
        let (expected, found) = (format!("{} bytes", file.bytes), format!("{found} bytes"));
        Err(mismatch(&self.place(&file.path), "size", expected, found))
    }

    async fn collect(&self, path: &str, found: GetResult, n_bytes: u64) -> Result<Bytes> {
        let bytes = found.bytes().await.map_err(self.failed(path))?;
        if bytes.len() as u64 == n_bytes {
            return Ok(bytes);
        }
        Err(mismatch(&self.place(path), "bytes read", n_bytes, bytes.len()))
    }

    /// Writes a small file if there is none of its name: `false` if there is.
    pub(crate) async fn create(&self, path: &str, bytes: Bytes) -> Result<bool> {
        match self.store.put_opts(&self.at(path), bytes.into(), PutMode::Create.into()).await {
            Ok(_) => Ok(true),
            // Some stores call the lost race for one name a conflict of conditions.
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                Ok(false)
            }
            Err(source) => Err(self.failed(path)(source)),
        }
    }

    /// Tries to update a small file by the tag of a content that it no longer has.
    pub(crate) async fn update_stale(&self, path: &str) -> Result<Updated> {
        let (at, failed) = (self.at(path), self.failed(path));
        let old = self.store.head(&at).await.map_err(&failed)?;
        self.store.put(&at, Bytes::from_static(b"newer content").into()).await.map_err(&failed)?;
        if old.e_tag.is_none() && old.version.is_none() {
            return Ok(Updated::Refused);
        }
        let stale = UpdateVersion { e_tag: old.e_tag, version: old.version };
        let update =
            self.store.put_opts(&at, Bytes::from_static(b"stale").into(), PutMode::Update(stale).into());
        match update.await {
            Ok(_) => Ok(Updated::Done),
            Err(
                object_store::Error::Precondition { .. }
                | object_store::Error::NotImplemented { .. }
                | object_store::Error::NotSupported { .. }
                | object_store::Error::AlreadyExists { .. },
            ) => Ok(Updated::Refused),
            Err(source) => Err(failed(source)),
        }
    }

    /// Removes a file; one that is not there is none to remove.
    pub(crate) async fn remove(&self, path: &str) -> Result<()> {
        match self.store.delete(&self.at(path)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(self.failed(path)(source)),
        }
    }

    /// Every file, by its path and size.
    pub(crate) async fn list(&self) -> Result<Vec<(String, u64)>> {
        let relative = |meta: ObjectMeta| {
            let parts = meta.location.prefix_match(&self.prefix)?;
            let path: Vec<String> = parts.map(|part| part.as_ref().to_owned()).collect();
            Some((path.join("/"), meta.size))
        };
        let listed = self.store.list(Some(&self.prefix)).try_collect::<Vec<_>>().await;
        Ok(listed.map_err(self.failed(""))?.into_iter().filter_map(relative).collect())
    }

    /// Writes a file of a start and what follows it, in parts sent beside each other and hashed beside
    /// that. The file has its name once it is whole.
    pub(crate) async fn write<S>(&self, path: &str, start: Bytes, rest: S, parts: Parts) -> Result<FileRecord>
    where
        S: Stream<Item = Result<Bytes>>,
    {
        let (hash, mut to_hash) = mpsc::channel::<Bytes>(HASH_QUEUE);
        let hashing = spawn_blocking(move || {
            let mut hasher = Sha256::new();
            while let Some(bytes) = to_hash.blocking_recv() {
                hasher.update(&bytes);
            }
            hex(&hasher.finalize())
        });
        let mut upload =
            Upload { files: self, path, sent: None, in_flight: JoinSet::new(), n_sent: 0, parts };
        let index_bytes = start.len() as u64;
        let index_sha256 = hex(&Sha256::digest(&start));
        let written = upload.write(start, rest, &hash).await;
        drop(hash);
        let sha256 = hashing.await.map_err(|source| Error::Task { source })?;
        match written {
            Ok(bytes) => Ok(FileRecord { path: path.to_owned(), bytes, sha256, index_bytes, index_sha256 }),
            Err(error) => {
                upload.abort().await;
                Err(error)
            }
        }
    }
}

/// The place alone: a store may show the keys that open it.
impl fmt::Debug for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Files").field(&self.shown).finish()
    }
}

/// A file on its way into a store.
struct Upload<'a> {
    files: &'a Files,
    path: &'a str,
    /// Begun with the first part that is not the last.
    sent: Option<Box<dyn object_store::MultipartUpload>>,
    in_flight: JoinSet<object_store::Result<()>>,
    n_sent: usize,
    parts: Parts,
}

impl Upload<'_> {
    /// Returns the bytes of the file.
    async fn write<S>(&mut self, start: Bytes, rest: S, hash: &mpsc::Sender<Bytes>) -> Result<u64>
    where
        S: Stream<Item = Result<Bytes>>,
    {
        let (mut part, mut n_bytes) = (PartBuffer::default(), 0);
        let mut pieces = std::pin::pin!(futures::stream::once(async { Ok(start) }).chain(rest));
        while let Some(mut piece) = pieces.next().await.transpose()? {
            n_bytes += piece.len() as u64;
            // The other end is gone only after a panic, which the caller sees.
            let _ = hash.send(piece.clone()).await;
            while !piece.is_empty() {
                if part.n_bytes == self.parts.bytes {
                    self.send(std::mem::take(&mut part)).await?;
                }
                part.push(piece.split_to(piece.len().min(self.parts.bytes - part.n_bytes)));
            }
        }
        if self.sent.is_none() {
            let put = self.files.store.put(&self.files.at(self.path), part.into_payload()).await;
            return put.map(|_| n_bytes).map_err(self.files.failed(self.path));
        }
        self.send(part).await?;
        while !self.in_flight.is_empty() {
            self.one_arrives().await?;
        }
        if let Some(sent) = &mut self.sent {
            sent.complete().await.map_err(self.files.failed(self.path))?;
        }
        Ok(n_bytes)
    }

    async fn send(&mut self, part: PartBuffer) -> Result<()> {
        if self.sent.is_none() {
            let at = self.files.at(self.path);
            let begun = self.files.store.put_multipart(&at).await;
            self.sent = Some(begun.map_err(self.files.failed(self.path))?);
        }
        while self.in_flight.len() >= self.parts.in_flight {
            self.one_arrives().await?;
        }
        if let Some(sent) = &mut self.sent {
            self.in_flight.spawn(sent.put_part(part.into_payload()));
        }
        self.n_sent += 1;
        if self.files.is_local && self.n_sent.is_multiple_of(WRITE_BACK_PARTS) {
            // The name that the store gives a file until it is whole.
            let mut staged = self.files.place(self.path).into_os_string();
            staged.push("#1");
            self.in_flight.spawn_blocking(move || {
                write_back(Path::new(&staged));
                Ok(())
            });
        }
        Ok(())
    }

    async fn one_arrives(&mut self) -> Result<()> {
        match self.in_flight.join_next().await {
            None => Ok(()),
            Some(Ok(arrived)) => arrived.map_err(self.files.failed(self.path)),
            Some(Err(source)) => Err(Error::Task { source }),
        }
    }

    /// Lets go of what was sent. A store that cannot be told keeps the parts until its own rules, or an
    /// administrator's, remove them.
    async fn abort(&mut self) {
        self.in_flight.shutdown().await;
        if let Some(sent) = &mut self.sent {
            // The error that led here is the one to report.
            let _ = sent.abort().await;
        }
    }
}

/// Has the system begin to write to the disk what it holds of a file, and let go of what it has written:
/// the disk would else wait for the last byte, and nobody reads a checkpoint soon. A file that is not
/// there, or a system that does not know this, only takes longer.
fn write_back(path: &Path) {
    #[cfg(target_os = "linux")]
    if let Ok(file) = std::fs::File::open(path) {
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = path;
}

/// The pieces of a part, those that are long shared and not copied.
#[derive(Default)]
struct PartBuffer {
    pieces: Vec<Bytes>,
    small: BytesMut,
    n_bytes: usize,
}

impl PartBuffer {
    fn push(&mut self, piece: Bytes) {
        self.n_bytes += piece.len();
        if piece.len() < SMALL_BYTES {
            self.small.extend_from_slice(&piece);
        } else {
            self.flush();
            self.pieces.push(piece);
        }
    }

    fn flush(&mut self) {
        if !self.small.is_empty() {
            self.pieces.push(self.small.split().freeze());
        }
    }

    fn into_payload(mut self) -> PutPayload {
        self.flush();
        self.pieces.into_iter().collect()
    }
}
