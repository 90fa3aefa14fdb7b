//! Files that are whole or not there.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// A file written under a temporary name beside its place; [`commit`](Self::commit) puts it there.
pub(crate) struct NewFile {
    target: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
}

impl NewFile {
    /// Starts an empty file.
    pub(crate) fn create(target: &Path) -> Result<Self> {
        let temporary = atomic_file::temporary(target);
        let file = File::create(&temporary).map_err(Error::io(&temporary))?;
        Ok(Self { target: target.to_owned(), temporary, file: BufWriter::with_capacity(1 << 20, file) })
    }

    /// Goes on with the first `len` bytes of the temporary file that an earlier process left, and
    /// drops what follows; `None` when there are fewer.
    pub(crate) fn resume(target: &Path, len: u64) -> Result<Option<Self>> {
        let temporary = atomic_file::temporary(target);
        let error = Error::io(&temporary);
        let mut file = match OpenOptions::new().write(true).open(&temporary) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(error(e)),
        };
        if file.metadata().map_err(Error::io(&temporary))?.len() < len {
            return Ok(None);
        }
        file.set_len(len).and_then(|()| file.seek(SeekFrom::Start(len))).map_err(error)?;
        let file = BufWriter::with_capacity(1 << 20, file);
        Ok(Some(Self { target: target.to_owned(), temporary, file }))
    }

    /// Appends bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io(&self.temporary))
    }

    /// Brings what was written to the disk.
    pub(crate) fn sync(&mut self) -> Result<()> {
        let error = Error::io(&self.temporary);
        self.file.flush().and_then(|()| self.file.get_ref().sync_all()).map_err(error)
    }

    /// Brings the file to the disk and to its place.
    pub(crate) fn commit(mut self) -> Result<()> {
        self.sync()?;
        fs::rename(&self.temporary, &self.target).map_err(Error::io(&self.target))?;
        atomic_file::sync_parent(&self.target).map_err(Error::io(&self.target))
    }
}

/// Writes a whole file.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    atomic_file::write(path, bytes).map_err(Error::io(path))
}

/// Writes a value as JSON, indented for people.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|e| Error::io(path)(e.into()))?;
    bytes.push(b'\n');
    write_whole(path, &bytes)
}

/// Reads a JSON file; `None` when there is none.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path)(e)),
    };
    let wrong = |e: serde_json::Error| Error::WrongFile {
        path: path.to_owned(),
        expected: "a file that a stage wrote".to_owned(),
        found: e.to_string(),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(wrong)
}

/// Removes a file if it is there.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => atomic_file::sync_parent(path).map_err(Error::io(path)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io(path)(e)),
    }
}

/// Maps a file of a prepared folder into memory.
#[allow(unsafe_code)]
pub(crate) fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(Error::io(path))?;
    // SAFETY: the bytes of a map must not change while it lives. Files of a prepared folder are
    // written under another name and renamed, never changed in place, so a map keeps the file that it
    // opened even when a later stage replaces it.
    unsafe { Mmap::map(&file) }.map_err(Error::io(path))
}

/// Holds a prepared folder for one process, for as long as the value lives: two that prepared it at a
/// time would mix their files. Every stage expects its caller to hold it.
pub fn lock(dir: &Path) -> Result<File> {
    fs::create_dir_all(dir).map_err(Error::io(dir))?;
    atomic_file::lock(dir).map_err(Error::io(dir))?.ok_or_else(|| Error::Locked { dir: dir.to_owned() })
}
