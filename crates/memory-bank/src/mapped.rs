use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use cluster_tree::ClusterId;
use memmap2::Mmap;
use rayon::prelude::*;

use crate::bank_store::manifest_path;
use crate::checkpoint::{Entry, Indices, check_block, check_index, find, newest};
use crate::manifest::{MANIFEST, MAX_MANIFEST_BYTES};
use crate::segment::{Layout, Part};
use crate::tensor_file::{io_error, map, mismatch};
use crate::write::as_bytes;
use crate::{Block, BlockSpec, BlockStore, Error, Manifest, Placement, Result, Segment, Step, init_block};

/// A saved bank on this machine, mapped to be fetched from only. A clone is another handle.
///
/// Opening reads the manifest and the starts of the files, and checks those and the files' sizes; a block
/// is checked when it is first asked for.
#[derive(Clone)]
pub struct MappedBank(Arc<Mapped>);

struct Mapped {
    manifest: Manifest,
    /// Where the paths of the manifest start.
    folder: PathBuf,
    values: Indices,
    blocks: Vec<Vec<Entry>>,
    maps: Vec<Arc<Mmap>>,
    /// By segment and level: which rows were found to be what the index says.
    checked: Vec<Vec<Vec<AtomicBool>>>,
}

/// A range of a map, which it keeps.
struct Mapping {
    map: Arc<Mmap>,
    start: usize,
    end: usize,
}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        &self.map[self.start..self.end]
    }
}

impl MappedBank {
    /// The bank in a `memory` folder, as a [`crate::LocalBank`] writes it.
    pub fn open(memory_folder: &Path) -> Result<Self> {
        Self::open_manifest(memory_folder, MANIFEST)
    }

    /// A step of a bank that a [`crate::BankStore`] keeps on this machine in `<root>/<bank>`.
    pub fn open_step(bank_folder: &Path, step: Step) -> Result<Self> {
        Self::open_manifest(bank_folder, &manifest_path(step))
    }

    fn open_manifest(folder: &Path, manifest: &str) -> Result<Self> {
        let path = folder.join(manifest);
        let n_bytes = std::fs::metadata(&path).map_err(|source| io_error(&path, source))?.len();
        if n_bytes > MAX_MANIFEST_BYTES {
            let expected = format!("at most {MAX_MANIFEST_BYTES} bytes");
            return Err(mismatch(&path, "size", expected, format!("{n_bytes} bytes")));
        }
        let bytes = std::fs::read(&path).map_err(|source| io_error(&path, source))?;
        let manifest = Manifest::parse(&path, &bytes)?;
        let (mut maps, mut segments, mut checked) = (Vec::new(), Vec::new(), Vec::new());
        for segment in &manifest.segments {
            let map = map_values(folder, segment)?;
            let layout = Layout::new(&manifest.spec, Part::Values, &segment.rows);
            let placement = Placement { shard: segment.shard, n_shards: manifest.n_shards };
            let start = &map[..layout.index_bytes as usize];
            let named = (folder.join(&segment.values.path), segment.values.index_sha256.as_str());
            let index = check_index(&layout, &manifest.spec, placement, (&named.0, named.1), start)?;
            let none = |level: &crate::segment::LevelIndex| {
                level.rows.iter().map(|_| AtomicBool::new(false)).collect()
            };
            checked.push(index.iter().map(none).collect());
            maps.push(Arc::new(map));
            segments.push((layout, index));
        }
        let values = Indices { part: Part::Values, segments };
        let blocks = newest(&manifest, &path, &values)?;
        let folder = folder.to_owned();
        Ok(Self(Arc::new(Mapped { manifest, folder, values, blocks, maps, checked })))
    }

    /// What the files hold.
    pub fn manifest(&self) -> &Manifest {
        &self.0.manifest
    }

    /// The weights of a block, f32 in little-endian: those of the file as they are mapped, if it was ever
    /// updated. They start at a multiple of 4 bytes, and stay valid when the bank is dropped.
    pub fn block_bytes(&self, id: ClusterId) -> Result<Bytes> {
        let bank = &*self.0;
        match find(&bank.manifest.spec, &bank.blocks, id)? {
            Some(entry) => Ok(Bytes::from_owner(bank.mapping(id, entry)?)),
            None => {
                let values = init_block(&bank.manifest.spec, bank.manifest.seed, id);
                Ok(as_bytes(Arc::new(values)))
            }
        }
    }

    /// The weights of these blocks, in their order.
    pub(crate) fn blocks(&self, ids: &[ClusterId]) -> Result<Vec<Block>> {
        let bank = &*self.0;
        let block = |&id: &ClusterId| {
            let values = match find(&bank.manifest.spec, &bank.blocks, id)? {
                Some(entry) => bytemuck::cast_slice(bank.mapping(id, entry)?.as_ref()).to_vec(),
                None => init_block(&bank.manifest.spec, bank.manifest.seed, id),
            };
            Ok(Block { id, values })
        };
        ids.par_iter().map(block).collect()
    }

    /// Fails on a step that the files do not reach.
    pub(crate) fn check_step(&self, after: Step) -> Result<()> {
        let applied = self.manifest().step;
        if after > applied { Err(Error::NotReached { after, applied }) } else { Ok(()) }
    }
}

impl BlockStore for MappedBank {
    fn spec(&self) -> &BlockSpec {
        &self.0.manifest.spec
    }

    async fn fetch(&self, after: Step, ids: &[ClusterId]) -> Result<Vec<Block>> {
        ids.iter().try_for_each(|&id| self.spec().check(id))?;
        self.check_step(after)?;
        let (bank, ids) = (self.clone(), ids.to_vec());
        crate::blocking::blocking(move || bank.blocks(&ids)).await
    }

    async fn push(&self, step: Step, _rank: usize, _grads: Vec<Block>) -> Result<()> {
        Err(Error::ReadOnly { action: "push", step, applied: self.manifest().step })
    }

    async fn save(&self, step: Step) -> Result<()> {
        Err(Error::ReadOnly { action: "save", step, applied: self.manifest().step })
    }
}

impl Mapped {
    fn mapping(&self, id: ClusterId, entry: Entry) -> Result<Mapping> {
        let (segment, level, place) = (entry.segment as usize, usize::from(id.level), entry.place as usize);
        let (layout, index) = &self.values.segments[segment];
        let range = layout.range(level, 0, place..place + 1);
        let (start, end) = (range.start as usize, range.end as usize);
        let mapping = Mapping { map: Arc::clone(&self.maps[segment]), start, end };
        let checked = &self.checked[segment][level][place];
        // Two that ask at once both check: the flag guards no memory.
        if !checked.load(Ordering::Relaxed) {
            let path = self.folder.join(&self.manifest.segments[segment].values.path);
            check_block(&path, id, index[level].checksums[0][place], mapping.as_ref())?;
            checked.store(true, Ordering::Relaxed);
        }
        Ok(mapping)
    }
}

/// Maps a segment's file of weights, if it has its size.
fn map_values(folder: &Path, segment: &Segment) -> Result<Mmap> {
    let path = folder.join(&segment.values.path);
    let map = File::open(&path).and_then(|file| map(&file)).map_err(|source| io_error(&path, source))?;
    match (segment.values.bytes, map.len() as u64) {
        (expected, found) if expected == found => Ok(map),
        (expected, found) => {
            Err(mismatch(&path, "size", format!("{expected} bytes"), format!("{found} bytes")))
        }
    }
}
