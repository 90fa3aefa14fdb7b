//! The blocks of one level in a file of slots of one size, and an index of them.
//!
//! Blocks are read by `pread`, not mapped: on files in the page cache it copied and checked 13 GB/s
//! of blocks of 0.9 and 3.4 MB against 10 to 11 GB/s out of a map (8 to 11 both of 64 KiB); a disk
//! that fails is an error instead of a signal; and nothing unsafe reads a file that changes.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Result};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytemuck::{Pod, Zeroable};
use lru::LruCache;

use crate::tiers::{BlockDtype, Encoded};

/// Bytes of the index for each slot.
pub(crate) const ENTRY_BYTES: u64 = size_of::<Entry>() as u64;

/// What the blocks of a level are, and how many there may be.
#[derive(Copy, Clone, Debug)]
pub(crate) struct SlabShape {
    pub(crate) level: u8,
    pub(crate) dtype: BlockDtype,
    pub(crate) row_len: usize,
    /// Numbers of a block.
    pub(crate) len: usize,
    /// Bytes of a block.
    pub(crate) slot_bytes: u64,
    pub(crate) n_slots: u32,
}

/// One level of the cache. Blocks are read and written beside each other; the lock is held to find
/// and to take slots only.
pub(crate) struct Slab {
    shape: SlabShape,
    path: PathBuf,
    blocks: File,
    index: File,
    slots: Mutex<Slots>,
}

/// What became of a read.
#[derive(Debug)]
pub(crate) enum Read {
    Hit(Encoded),
    Miss,
    /// The slot did not hold what its checksum says; it is free now.
    Damaged,
}

struct Slots {
    /// By index within the level, oldest use last.
    held: LruCache<u32, Slot>,
    free: Vec<u32>,
}

#[derive(Copy, Clone, PartialEq)]
struct Slot {
    place: u32,
    crc: u32,
}

/// What the index file says of one slot; zeros are a free one. It is cleared before a slot is
/// overwritten and written after it, so a process may die at any point. A machine may too, and lose
/// writes in any order: then the checksums tell.
#[derive(Copy, Clone, Pod, Zeroable)]
#[repr(C)]
struct Entry {
    /// Of the block within its level.
    index: u32,
    /// CRC-32C of the block's bytes.
    block_crc: u32,
    /// CRC-32C of the two numbers before it.
    crc: u32,
}

impl Entry {
    fn new(index: u32, block_crc: u32) -> Self {
        let crc = crc32c::crc32c(bytemuck::bytes_of(&[index, block_crc]));
        Self { index, block_crc, crc }
    }

    fn is_whole(self) -> bool {
        self.crc == Self::new(self.index, self.block_crc).crc
    }
}

impl Slab {
    /// Opens the files `level<n>.blocks` and `level<n>.index` of a folder, made when they are not
    /// there, with the blocks that they hold if `keep`.
    pub(crate) fn open(folder: &Path, shape: SlabShape, keep: bool) -> Result<Self> {
        let path = folder.join(format!("level{}.blocks", shape.level));
        let open =
            |path: &Path| OpenOptions::new().read(true).write(true).create(true).truncate(!keep).open(path);
        let (blocks, index) = (open(&path)?, open(&path.with_extension("index"))?);
        // The cache may have had more slots.
        let n_slots = u64::from(shape.n_slots);
        for (file, max_bytes) in [(&blocks, n_slots * shape.slot_bytes), (&index, n_slots * ENTRY_BYTES)] {
            if file.metadata()?.len() > max_bytes {
                file.set_len(max_bytes)?;
            }
        }
        let mut entries = vec![Entry::zeroed(); (index.metadata()?.len() / ENTRY_BYTES) as usize];
        index.read_exact_at(bytemuck::cast_slice_mut(&mut entries), 0)?;
        let (mut held, mut free) = (LruCache::unbounded(), Vec::new());
        for place in 0..shape.n_slots {
            match entries.get(place as usize) {
                Some(entry) if entry.is_whole() && !held.contains(&entry.index) => {
                    held.put(entry.index, Slot { place, crc: entry.block_crc });
                }
                _ => free.push(place),
            }
        }
        // The first places are taken first, so that the file is no longer than it must be.
        free.reverse();
        Ok(Self { shape, path, blocks, index, slots: Mutex::new(Slots { held, free }) })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the blocks held.
    pub(crate) fn bytes(&self) -> u64 {
        self.slots().held.len() as u64 * self.shape.slot_bytes
    }

    /// A block, by its index within the level, which becomes the one used last.
    pub(crate) fn read(&self, index: u32) -> Result<Read> {
        let Some(slot) = self.slots().held.get(&index).copied() else { return Ok(Read::Miss) };
        let mut block = Encoded::zeros(self.shape.dtype, self.shape.row_len, self.shape.len);
        let (mut crc, mut at) = (0, self.start(slot.place));
        for part in block.parts_mut() {
            match self.blocks.read_exact_at(part, at) {
                // Someone cut the file short; the checksum will tell.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => {}
                other => other?,
            }
            (crc, at) = (crc32c::crc32c_append(crc, part), at + part.len() as u64);
        }
        if crc == slot.crc {
            return Ok(Read::Hit(block));
        }
        let mut slots = self.slots();
        if slots.held.peek(&index) != Some(&slot) {
            // Another block took the slot meanwhile.
            return Ok(Read::Miss);
        }
        slots.held.pop(&index);
        self.clear(slot.place)?;
        slots.free.push(slot.place);
        Ok(Read::Damaged)
    }

    /// Holds a block, unless it is held, and returns the one that had to go, by its index.
    pub(crate) fn write(&self, index: u32, block: &Encoded) -> Result<Option<u32>> {
        let Some((place, evicted)) = self.take(index) else { return Ok(None) };
        if evicted.is_some() {
            self.clear(place)?;
        }
        let (mut crc, mut at) = (0, self.start(place));
        for part in block.parts() {
            self.blocks.write_all_at(part, at)?;
            (crc, at) = (crc32c::crc32c_append(crc, part), at + part.len() as u64);
        }
        let entry = Entry::new(index, crc);
        self.index.write_all_at(bytemuck::bytes_of(&entry), u64::from(place) * ENTRY_BYTES)?;
        let mut slots = self.slots();
        if let Some(other) = slots.held.put(index, Slot { place, crc }) {
            // Someone wrote the same block meanwhile.
            self.clear(other.place)?;
            slots.free.push(other.place);
        }
        Ok(evicted)
    }

    /// A slot to write to, free or that of the block not used for longest; none when the block is
    /// held, and when all slots are being written to.
    fn take(&self, index: u32) -> Option<(u32, Option<u32>)> {
        let mut slots = self.slots();
        if slots.held.contains(&index) {
            return None;
        }
        match slots.free.pop() {
            Some(place) => Some((place, None)),
            None => slots.held.pop_lru().map(|(evicted, slot)| (slot.place, Some(evicted))),
        }
    }

    fn clear(&self, place: u32) -> Result<()> {
        let entry = Entry::zeroed();
        self.index.write_all_at(bytemuck::bytes_of(&entry), u64::from(place) * ENTRY_BYTES)
    }

    fn start(&self, place: u32) -> u64 {
        u64::from(place) * self.shape.slot_bytes
    }

    /// No code that can panic runs under this lock.
    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
