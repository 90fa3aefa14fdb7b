//! The tensors of a folder: one file or several, mapped and not read as a whole.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};

use crate::{Error, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A mapped file of tensors.
struct Shard {
    path: PathBuf,
    map: Mmap,
    /// Where the numbers begin.
    data: usize,
    metadata: Metadata,
}

/// All tensors of a folder by name.
pub(super) struct Tensors {
    shards: Vec<Shard>,
    /// The shard of each.
    names: BTreeMap<String, usize>,
    /// What lists them: the file, or the index of several.
    listed_in: PathBuf,
}

/// One tensor.
pub(super) struct Found<'a> {
    /// Its file.
    pub(super) path: &'a Path,
    pub(super) shape: &'a [usize],
    dtype: Dtype,
    bytes: &'a [u8],
}

impl Tensors {
    /// Maps the files of a folder.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let (single, index) = (folder.join(SINGLE), folder.join(INDEX));
        let (listed_in, files) = match single.exists() {
            true => (single, vec![SINGLE.to_string()]),
            false if index.exists() => (index.clone(), shards_of(&index)?),
            false => {
                let problem = format!("expected {SINGLE} or {INDEX}, found neither");
                return Err(Error::File { path: folder.into(), problem });
            }
        };
        let (mut shards, mut names) = (vec![], BTreeMap::new());
        for file in files {
            let shard = Shard::open(folder.join(file))?;
            for name in shard.metadata.offset_keys() {
                if let Some(other) = names.insert(name.clone(), shards.len()) {
                    let problem = format!("tensor {name} is in {}, too", path_of(&shards, other).display());
                    return Err(Error::File { path: shard.path, problem });
                }
            }
            shards.push(shard);
        }
        Ok(Self { shards, names, listed_in })
    }

    /// Every name, in order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// The file, or the index of several.
    pub(super) fn listed_in(&self) -> &Path {
        &self.listed_in
    }

    /// The tensor of this name.
    pub(super) fn get(&self, name: &str) -> Option<Found<'_>> {
        let shard = &self.shards[*self.names.get(name)?];
        let TensorInfo { dtype, shape, data_offsets: (start, end) } = shard.metadata.info(name)?;
        let bytes = &shard.map[shard.data + start..shard.data + end];
        Some(Found { path: &shard.path, shape, dtype: *dtype, bytes })
    }
}

fn path_of(shards: &[Shard], index: usize) -> &Path {
    shards.get(index).map_or(Path::new("it"), |shard| &shard.path)
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self> {
        let problem = |problem: String| Error::File { path: path.clone(), problem };
        let file = File::open(&path).map_err(|e| problem(e.to_string()))?;
        let map = map(&file).map_err(|e| problem(e.to_string()))?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| problem(e.to_string()))?;
        // Checks that the numbers are all there.
        SafeTensors::deserialize(&map).map_err(|e| problem(e.to_string()))?;
        Ok(Self { data: header + size_of::<u64>(), path, map, metadata })
    }
}

impl Found<'_> {
    /// Some of its numbers, as f32.
    pub(super) fn values(&self, name: &str, first: usize, len: usize) -> Result<Vec<f32>> {
        let part = |size: usize| &self.bytes[first * size..(first + len) * size];
        match self.dtype {
            Dtype::F32 => Ok(part(4).as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()),
            Dtype::BF16 => {
                let wide = |&b: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16);
                Ok(part(2).as_chunks().0.iter().map(wide).collect())
            }
            Dtype::F16 => {
                let wide = |&b: &[u8; 2]| half::f16::from_le_bytes(b).to_f32();
                Ok(part(2).as_chunks().0.iter().map(wide).collect())
            }
            other => {
                let problem = format!("tensor {name}: expected numbers in F32, BF16 or F16, found {other:?}");
                Err(Error::File { path: self.path.into(), problem })
            }
        }
    }

    /// Whether it has the same numbers, to the bit, as another.
    pub(super) fn equals(&self, other: &Found) -> bool {
        (self.shape, self.dtype, self.bytes) == (other.shape, other.dtype, other.bytes)
    }
}

/// The files that an index names, each once.
fn shards_of(index: &Path) -> Result<Vec<String>> {
    let error = |problem: String| Error::File { path: index.into(), problem };
    let bytes = std::fs::read(index).map_err(|e| error(e.to_string()))?;
    let index: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| error(e.to_string()))?;
    let Some(map) = index["weight_map"].as_object() else {
        return Err(error("weight_map: expected an object".into()));
    };
    let mut files = BTreeSet::new();
    for (tensor, file) in map {
        match file.as_str() {
            // Only files that lie beside it.
            Some(file) if Path::new(file).file_name().is_some_and(|name| name == file) => {
                files.insert(file.to_string());
            }
            _ => {
                return Err(error(format!(
                    "weight_map: tensor {tensor}: expected a file beside it, found {file}"
                )));
            }
        }
    }
    Ok(files.into_iter().collect())
}

/// Maps a whole file to be read.
#[allow(unsafe_code)]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read-only and lives as long as a checkpoint is read. Changing a checkpoint's file meanwhile
    // is outside of what this crate can guard against.
    unsafe { Mmap::map(file) }
}
