//! A pack file: sequences as references into the windows.
//!
//! ```text
//! header | one record a sequence | the windows in packing order, u32 each
//! ```

use std::path::{Path, PathBuf};

use bytemuck::{Pod, Zeroable};
use memmap2::Mmap;

use super::files::{NewFile, map};
use crate::{Error, Result};

const MAGIC: [u8; 8] = *b"ANCHPACK";
const VERSION: u32 = 1;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: u32,
    seq_len: u32,
    n_sequences: u64,
    n_pieces: u64,
    n_targets: u64,
    /// Hexadecimal digits of the hash of the fingerprint.
    fingerprint: [u8; 64],
}

/// Where a sequence begins and ends in the stream of its leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct PackedSequence {
    /// The leaf of all its documents.
    pub(super) leaf: u32,
    /// Index into the pieces of the one that it begins in.
    pub(super) first_piece: u32,
    /// Where in that piece it begins; the end-of-text token of a first window counts.
    pub(super) offset: u32,
    /// Tokens, from 2 to `seq_len + 1`.
    pub(super) len: u32,
}

/// The content of a pack file.
pub(super) struct Packing {
    pub(super) sequences: Vec<PackedSequence>,
    /// Windows in packing order.
    pub(super) pieces: Vec<u32>,
}

impl Packing {
    /// Targets of all sequences: every token but a sequence's first is one.
    pub(super) fn n_targets(&self) -> u64 {
        self.sequences.iter().map(|sequence| u64::from(sequence.len) - 1).sum()
    }

    /// Writes the pack file. `fingerprint` is the hash of the corpus it belongs to.
    pub(super) fn write(&self, path: &Path, seq_len: u32, fingerprint: &str) -> Result<()> {
        let header = Header {
            magic: MAGIC,
            version: VERSION,
            seq_len,
            n_sequences: self.sequences.len() as u64,
            n_pieces: self.pieces.len() as u64,
            n_targets: self.n_targets(),
            fingerprint: digits(fingerprint),
        };
        let mut file = NewFile::create(path)?;
        file.write(bytemuck::bytes_of(&header))?;
        file.write(bytemuck::cast_slice(&self.sequences))?;
        file.write(bytemuck::cast_slice(&self.pieces))?;
        file.commit()
    }
}

fn digits(hash: &str) -> [u8; 64] {
    let mut digits = [0; 64];
    let n = hash.len().min(digits.len());
    digits[..n].copy_from_slice(&hash.as_bytes()[..n]);
    digits
}

/// A pack file mapped into memory.
pub(super) struct PackedSet {
    path: PathBuf,
    map: Mmap,
    header: Header,
}

impl PackedSet {
    /// Opens a pack file. Fails when it is none, belongs to another corpus, or is truncated.
    pub(super) fn open(path: &Path, fingerprint: &str) -> Result<Self> {
        let map = map(path)?;
        let wrong = |expected: String, found: String| {
            Err(Error::WrongFile { path: path.to_owned(), expected, found })
        };
        let Some(bytes) = map.get(..size_of::<Header>()) else {
            return wrong("a pack file".to_owned(), format!("{} bytes", map.len()));
        };
        let header: Header = bytemuck::pod_read_unaligned(bytes);
        if header.magic != MAGIC || header.version != VERSION {
            let found = format!("{:?} version {}", header.magic.escape_ascii().to_string(), header.version);
            return wrong(format!("\"{}\" version {VERSION}", MAGIC.escape_ascii()), found);
        }
        if header.fingerprint != digits(fingerprint) {
            let found = format!("a pack file of corpus {}", header.fingerprint.escape_ascii());
            return wrong(format!("a pack file of corpus {fingerprint}"), found);
        }
        let expected = (size_of::<Header>() as u64)
            .saturating_add(header.n_sequences.saturating_mul(size_of::<PackedSequence>() as u64))
            .saturating_add(header.n_pieces.saturating_mul(size_of::<u32>() as u64));
        let found = map.len() as u64;
        if expected != found {
            return Err(Error::Size { path: path.to_owned(), expected, found });
        }
        Ok(Self { path: path.to_owned(), map, header })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn seq_len(&self) -> u32 {
        self.header.seq_len
    }

    pub(super) fn n_sequences(&self) -> u64 {
        self.header.n_sequences
    }

    pub(super) fn n_targets(&self) -> u64 {
        self.header.n_targets
    }

    pub(super) fn sequences(&self) -> &[PackedSequence] {
        bytemuck::cast_slice(&self.map[size_of::<Header>()..self.pieces_start()])
    }

    /// Windows in packing order.
    pub(super) fn pieces(&self) -> &[u32] {
        bytemuck::cast_slice(&self.map[self.pieces_start()..])
    }

    fn pieces_start(&self) -> usize {
        // The size of the file, which open has checked, bounds the product.
        size_of::<Header>() + self.header.n_sequences as usize * size_of::<PackedSequence>()
    }
}
