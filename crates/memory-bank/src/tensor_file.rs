//! Safetensors files that may be larger than memory: a header known from shapes alone, then tensors
//! written row by row, and blocks read from their own range.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use bytemuck::{AnyBitPattern, NoUninit};
use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::manifest::hex;
use crate::{BlockSpec, Error, FileRecord, Result};

// Values are written and mapped as they lie in memory.
const _: () = assert!(cfg!(target_endian = "little"), "bank files are little-endian");

/// Data starts at a multiple of this, so that rows of a mapped file suit any vector width.
const ALIGNMENT: usize = 64;
/// The limit that the safetensors library sets too.
const MAX_HEADER_BYTES: u64 = 100_000_000;
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// Name, type and shape of one tensor of a file.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// `level0`, `level1`… of the levels with memory: `[n_blocks + 1, L, 3, r, d]`.
pub(crate) fn value_tensors(spec: &BlockSpec) -> Vec<Tensor> {
    spec.levels().map(|level| block_tensor(spec, level, "")).collect()
}

/// First `level0.steps`…, `[n_blocks + 1]`, then `level0.m`, `level0.v`, `level1.m`…
pub(crate) fn optimizer_tensors(spec: &BlockSpec) -> Vec<Tensor> {
    let steps = |level| {
        let (name, shape) = (format!("level{level}.steps"), vec![spec.n_blocks(level) + 1]);
        Tensor { name, dtype: Dtype::U64, shape }
    };
    let moments = |level| [block_tensor(spec, level, ".m"), block_tensor(spec, level, ".v")];
    spec.levels().map(steps).chain(spec.levels().flat_map(moments)).collect()
}

fn block_tensor(spec: &BlockSpec, level: usize, suffix: &str) -> Tensor {
    let shape = vec![spec.n_blocks(level) + 1, spec.n_layers, 3, spec.width[level], spec.d_model];
    Tensor { name: format!("level{level}{suffix}"), dtype: Dtype::F32, shape }
}

impl Tensor {
    fn bytes(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product::<u64>() * self.dtype.bitsize() as u64 / 8
    }
}

/// The bytes before the data: the header's length, the header, and spaces up to the alignment.
fn header(tensors: &[Tensor]) -> Vec<u8> {
    let mut entries = Map::new();
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.bytes();
        let dtype = tensor.dtype.to_string();
        let entry = json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]});
        entries.insert(tensor.name.clone(), entry);
        start = end;
    }
    let text = Value::Object(entries).to_string();
    let padded = (text.len() + 8).next_multiple_of(ALIGNMENT) - 8;
    let mut bytes = (padded as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(format!("{text:padded$}").as_bytes());
    bytes
}

/// Writes a file from start to end, hashing its full content.
pub(crate) struct Writer {
    path: PathBuf,
    file: BufWriter<File>,
    hasher: Sha256,
    bytes: u64,
    /// Zeros counted and hashed but not written: a hole in the file.
    hole: u64,
}

impl Writer {
    /// Starts a file with the header of these tensors; their data follow, in this order.
    pub(crate) fn create(path: &Path, tensors: &[Tensor]) -> Result<Self> {
        let file = File::create(path).map_err(|source| io_error(path, source))?;
        let file = BufWriter::with_capacity(1 << 20, file);
        let mut writer = Self { path: path.to_owned(), file, hasher: Sha256::new(), bytes: 0, hole: 0 };
        writer.write(&header(tensors))?;
        Ok(writer)
    }

    pub(crate) fn write<T: NoUninit>(&mut self, values: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        if self.hole > 0 {
            let start = SeekFrom::Start(self.bytes);
            self.file.seek(start).map_err(|source| io_error(&self.path, source))?;
            self.hole = 0;
        }
        self.file.write_all(bytes).map_err(|source| io_error(&self.path, source))?;
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// `n_bytes` zeros that take no space where the file system knows holes.
    pub(crate) fn skip(&mut self, n_bytes: u64) {
        let mut left = n_bytes;
        while left > 0 {
            let part = left.min(ZEROS.len() as u64);
            self.hasher.update(&ZEROS[..part as usize]);
            left -= part;
        }
        self.bytes += n_bytes;
        self.hole += n_bytes;
    }

    /// Makes the file durable and says what it holds.
    pub(crate) fn finish(mut self) -> Result<FileRecord> {
        let synced = self.file.flush().and_then(|()| {
            let file = self.file.get_ref();
            if self.hole > 0 {
                file.set_len(self.bytes)?;
            }
            file.sync_all()
        });
        synced.map_err(|source| io_error(&self.path, source))?;
        Ok(FileRecord { bytes: self.bytes, sha256: hex(&self.hasher.finalize()) })
    }
}

/// A file that holds the tensors expected, open to read ranges of them.
pub(crate) struct Reader {
    path: PathBuf,
    file: File,
    /// Where each of the expected tensors starts in the file.
    starts: Vec<u64>,
}

impl Reader {
    /// Fails on a file whose header does not parse, whose size is not the header's, or that lacks a
    /// tensor or has it in another type or shape.
    pub(crate) fn open(path: &Path, tensors: &[Tensor]) -> Result<Self> {
        let mut file = File::open(path).map_err(|source| io_error(path, source))?;
        let (data_start, metadata) = read_header(path, &mut file)?;
        let found = |tensor: &Tensor| match metadata.info(&tensor.name) {
            Some(info) if info.dtype == tensor.dtype && info.shape == tensor.shape => {
                Ok(data_start + info.data_offsets.0 as u64)
            }
            info => {
                let found =
                    info.map_or("missing".to_owned(), |info| format!("{} {:?}", info.dtype, info.shape));
                let expected = format!("{} {:?}", tensor.dtype, tensor.shape);
                Err(mismatch(path, &format!("tensor {:?}", tensor.name), expected, found))
            }
        };
        let starts = tensors.iter().map(found).collect::<Result<_>>()?;
        Ok(Self { path: path.to_owned(), file, starts })
    }

    /// `len` values of the tensor at place `tensor` of those expected, from value `first` on.
    pub(crate) fn read<T>(&mut self, tensor: usize, first: usize, len: usize) -> Result<Vec<T>>
    where
        T: AnyBitPattern + NoUninit,
    {
        let mut values = vec![T::zeroed(); len];
        let start = self.starts[tensor] + first as u64 * size_of::<T>() as u64;
        let sought = self.file.seek(SeekFrom::Start(start));
        let read = sought.and_then(|_| self.file.read_exact(bytemuck::cast_slice_mut(&mut values)));
        read.map_err(|source| io_error(&self.path, source))?;
        Ok(values)
    }

    /// Maps the file. Fails on data that are not aligned to f32.
    pub(crate) fn map(self) -> Result<Mapped> {
        let map = map(&self.file).map_err(|source| io_error(&self.path, source))?;
        match self.starts.iter().find(|&&start| start % size_of::<f32>() as u64 != 0) {
            Some(start) => Err(mismatch(&self.path, "tensor offset", "a multiple of 4", start)),
            None => Ok(Mapped { map, starts: self.starts }),
        }
    }
}

/// A mapped file of f32 tensors.
pub(crate) struct Mapped {
    map: Mmap,
    starts: Vec<u64>,
}

impl Mapped {
    /// `len` values of the tensor at place `tensor` of those expected, from value `first` on.
    pub(crate) fn values(&self, tensor: usize, first: usize, len: usize) -> &[f32] {
        let start = self.starts[tensor] as usize + first * size_of::<f32>();
        bytemuck::cast_slice(&self.map[start..start + len * size_of::<f32>()])
    }
}

fn read_header(path: &Path, file: &mut File) -> Result<(u64, Metadata)> {
    let n_bytes = file.metadata().map_err(|source| io_error(path, source))?.len();
    let mut length = [0; 8];
    if n_bytes < 8 {
        return Err(mismatch(path, "size", "at least 8 bytes", format!("{n_bytes} bytes")));
    }
    file.read_exact(&mut length).map_err(|source| io_error(path, source))?;
    let length = u64::from_le_bytes(length);
    let max = (n_bytes - 8).min(MAX_HEADER_BYTES);
    if length > max {
        let expected = format!("at most {max} bytes");
        return Err(mismatch(path, "header length", expected, format!("{length} bytes")));
    }
    let mut text = vec![0; length as usize];
    file.read_exact(&mut text).map_err(|source| io_error(path, source))?;
    let metadata: Metadata = serde_json::from_slice(&text).map_err(|source| Error::Json {
        path: path.to_owned(),
        part: "header",
        source,
    })?;
    let expected = 8 + length + metadata.data_len() as u64;
    if n_bytes != expected {
        return Err(mismatch(path, "size", format!("{expected} bytes"), format!("{n_bytes} bytes")));
    }
    Ok((8 + length, metadata))
}

/// Maps a whole file to be read.
#[allow(unsafe_code)]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read-only, and the files of a bank are never changed in place: a save
    // writes new files in a new folder and renames it. Truncating a bank's file by other means
    // while it is open is outside of what this crate can guard against.
    unsafe { Mmap::map(file) }
}

pub(crate) fn io_error(path: &Path, source: std::io::Error) -> Error {
    Error::Io { path: path.to_owned(), source }
}

pub(crate) fn mismatch(path: &Path, what: &str, expected: impl ToString, found: impl ToString) -> Error {
    let (expected, found) = (expected.to_string(), found.to_string());
    Error::Mismatch { path: path.to_owned(), what: what.to_owned(), expected, found }
}
