//! A file for the arrays of a shard that are not in memory.
//!
//! It is scratch space of one process: it has no name, so nothing of it outlives the process, and what a
//! crash loses is what no checkpoint holds anyway. An array is written once, to a slot of its own, and never
//! changed. So whoever holds the slot, such as a save, reads the same numbers for as long as it holds it,
//! and takes no copy; the slot is free again when nobody does.
//!
//! Arrays are read and written by calls to the system and not mapped. Memory is then what the shard counts,
//! and not what the system lets pages take; a disk that is full or fails is an error, not a signal that ends
//! the process; and nothing is unsafe. The price is a copy for what is not in memory. Written arrays pass
//! through the system's page cache, which gives its pages up to whoever needs memory.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Result;
use crate::bank_store::unique;
use crate::tensor_file::{io_error, mismatch};

/// Slots are whole pages: a write of part of one would first read it.
const PAGE: u64 = 4096;

/// The file.
#[derive(Debug)]
pub(crate) struct Scratch {
    file: File,
    /// Where it is, for messages.
    dir: PathBuf,
    slots: Mutex<Slots>,
}

#[derive(Default, Debug)]
struct Slots {
    /// Bytes of the file.
    end: u64,
    /// Bytes of slots that are held.
    held: u64,
    /// Where free slots start, by their bytes. The block sizes of a bank are few, so slots are used again.
    free: BTreeMap<u64, Vec<u64>>,
}

/// An array in the file.
#[derive(Debug)]
pub(crate) struct Slot {
    scratch: Arc<Scratch>,
    start: u64,
    /// Numbers.
    len: usize,
    /// CRC-32C of their bytes.
    crc: u32,
}

impl Scratch {
    /// A file in a folder, which is made if it is not there.
    pub(crate) fn create(dir: &Path) -> Result<Arc<Self>> {
        let failed = |source| io_error(dir, source);
        fs::create_dir_all(dir).map_err(failed)?;
        let path = dir.join(format!("rows-{}", unique()));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).map_err(failed)?;
        fs::remove_file(&path).map_err(failed)?;
        Ok(Self::of(file, dir))
    }

    pub(crate) fn of(file: File, dir: &Path) -> Arc<Self> {
        Arc::new(Self { file, dir: dir.to_owned(), slots: Mutex::default() })
    }

    /// Writes an array to a slot of its own. Fails when the disk is full.
    pub(crate) fn write(self: &Arc<Self>, values: &[f32]) -> Result<Slot> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let start = self.take(slot_bytes(values.len()));
        let slot = Slot { scratch: Arc::clone(self), start, len: values.len(), crc: crc32c::crc32c(bytes) };
        self.file.write_all_at(bytes, start).map_err(|source| io_error(&self.dir, source))?;
        Ok(slot)
    }

    /// Bytes of the arrays that are held.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.slots().held
    }

    fn take(&self, bytes: u64) -> u64 {
        let mut slots = self.slots();
        slots.held += bytes;
        let free = slots.free.get_mut(&bytes).and_then(Vec::pop);
        free.unwrap_or_else(|| {
            slots.end += bytes;
            slots.end - bytes
        })
    }

    /// No code that can panic runs under this lock.
    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn crc(&self) -> u32 {
        self.crc
    }

    /// Fails when the disk does, or has kept something else.
    pub(crate) fn read(&self) -> Result<Vec<f32>> {
        let Scratch { file, dir, .. } = &*self.scratch;
        let mut values = vec![0f32; self.len];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        file.read_exact_at(bytes, self.start).map_err(|source| io_error(dir, source))?;
        match crc32c::crc32c(bytes) {
            found if found == self.crc => Ok(values),
            found => {
                let what = format!("crc32c of the array at byte {} of the rows on disk", self.start);
                Err(mismatch(dir, &what, format!("{:08x}", self.crc), format!("{found:08x}")))
            }
        }
    }
}

/// The same slot: of two slots with the same numbers nobody knows without reading them.
impl PartialEq for Slot {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let bytes = slot_bytes(self.len);
        let mut slots = self.scratch.slots();
        slots.held -= bytes;
        slots.free.entry(bytes).or_default().push(self.start);
    }
}

fn slot_bytes(len: usize) -> u64 {
    ((len * size_of::<f32>()) as u64).next_multiple_of(PAGE)
}
