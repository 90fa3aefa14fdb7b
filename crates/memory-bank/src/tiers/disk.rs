use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use cluster_tree::ClusterId;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::tensor_file::{io_error, mismatch};
use crate::tiers::slab::{ENTRY_BYTES, Read, Slab, SlabShape};
use crate::tiers::{BankVersion, BlockDtype, DiskOptions, Encoded};
use crate::{BlockSpec, Error, Result};

/// Changes whenever the files come to mean something else.
const FORMAT: &str = "anchorage.tier.v1";
const OWNER: &str = "bank.json";

/// Blocks in a folder on a local disk, of one bank and held by one process.
pub(crate) struct Disk {
    /// By level; none for a level without memory, or whose part of the folder fits no block.
    slabs: Vec<Option<Slab>>,
    _lock: File,
}

/// Whose blocks a folder holds, and how.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Owner {
    format: String,
    dtype: BlockDtype,
    /// What sets one bank apart from another: spec, seed, step and hashes.
    bank: BTreeMap<String, String>,
}

/// What a read of several blocks found.
#[derive(Default)]
pub(crate) struct DiskAnswer {
    pub(crate) found: Vec<(ClusterId, Arc<Encoded>)>,
    /// Blocks whose slots did not hold what they should.
    pub(crate) damaged: Vec<ClusterId>,
}

impl Disk {
    /// Opens a folder, made when it is not there, with the blocks that it holds. Fails on the folder
    /// of another bank, and on one that another process has open. Blocks of another dtype go.
    pub(crate) fn open(
        options: &DiskOptions,
        version: &BankVersion,
        spec: &BlockSpec,
        dtype: BlockDtype,
    ) -> Result<Self> {
        let folder = options.dir.as_path();
        let io = |source| io_error(folder, source);
        fs::create_dir_all(folder).map_err(io)?;
        let Some(lock) = atomic_file::lock(folder).map_err(io)? else {
            return Err(mismatch(folder, "holder", "this process alone", "another process"));
        };
        let owner = Owner { format: FORMAT.to_owned(), dtype, bank: identity(version, spec) };
        let path = folder.join(OWNER);
        let before = read_owner(&path)?;
        if let Some(before) = &before {
            check_same(&path, before, &owner)?;
        }
        let keep = before.as_ref() == Some(&owner);
        if !keep {
            let text = serde_json::to_vec_pretty(&owner).map_err(|source| json_error(&path, source))?;
            atomic_file::write(&path, &text).map_err(|source| io_error(&path, source))?;
        }
        let slabs = shapes(options.bytes(), spec, dtype).into_iter().map(|shape| match shape {
            Some(shape) => Slab::open(folder, shape, keep).map(Some).map_err(io),
            None => Ok(None),
        });
        Ok(Self { slabs: slabs.collect::<Result<_>>()?, _lock: lock })
    }

    /// Bytes of the blocks held.
    pub(crate) fn bytes(&self) -> u64 {
        self.slabs.iter().flatten().map(Slab::bytes).sum()
    }

    /// Those of these blocks that the folder holds.
    pub(crate) fn read(&self, ids: &[ClusterId]) -> Result<DiskAnswer> {
        let read = |&id: &ClusterId| match self.slab(id) {
            Some(slab) => slab.read(id.index).map_err(|source| io_error(slab.path(), source)),
            None => Ok(Read::Miss),
        };
        let reads: Vec<Read> = ids.par_iter().map(read).collect::<Result<_>>()?;
        let mut answer = DiskAnswer::default();
        for (&id, read) in ids.iter().zip(reads) {
            match read {
                Read::Hit(block) => answer.found.push((id, Arc::new(block))),
                Read::Damaged => answer.damaged.push(id),
                Read::Miss => {}
            }
        }
        Ok(answer)
    }

    /// Holds blocks, and returns those that had to go.
    pub(crate) fn write(&self, blocks: &[(ClusterId, Arc<Encoded>)]) -> Result<Vec<ClusterId>> {
        let write = |(id, block): &(ClusterId, Arc<Encoded>)| {
            let Some(slab) = self.slab(*id) else { return Ok(None) };
            let evicted = slab.write(id.index, block).map_err(|source| io_error(slab.path(), source))?;
            Ok(evicted.map(|index| ClusterId { level: id.level, index }))
        };
        let evicted: Vec<Option<ClusterId>> = blocks.par_iter().map(write).collect::<Result<_>>()?;
        Ok(evicted.into_iter().flatten().collect())
    }

    fn slab(&self, id: ClusterId) -> Option<&Slab> {
        self.slabs.get(usize::from(id.level))?.as_ref()
    }
}

fn identity(version: &BankVersion, spec: &BlockSpec) -> BTreeMap<String, String> {
    let hashes = version.hashes.iter().map(|(key, hash)| (format!("hash of {key}"), hash.clone()));
    let own = [("spec", spec.hash()), ("seed", version.seed.to_string()), ("step", version.step.to_string())];
    own.into_iter().map(|(key, value)| (key.to_owned(), value)).chain(hashes).collect()
}

fn read_owner(path: &Path) -> Result<Option<Owner>> {
    match fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|source| json_error(path, source)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(io_error(path, source)),
    }
}

fn check_same(path: &Path, found: &Owner, expected: &Owner) -> Result<()> {
    if found.format != expected.format {
        return Err(mismatch(path, "format", &expected.format, &found.format));
    }
    let keys: BTreeSet<&String> = found.bank.keys().chain(expected.bank.keys()).collect();
    for key in keys {
        let (expected, found) = (expected.bank.get(key), found.bank.get(key));
        if expected != found {
            let text = |value: Option<&String>| value.cloned().unwrap_or("missing".to_owned());
            return Err(mismatch(path, key, text(expected), text(found)));
        }
    }
    Ok(())
}

fn json_error(path: &Path, source: serde_json::Error) -> Error {
    Error::Json { path: path.to_owned(), part: "owner", source }
}

/// The slots of each level: an equal part of the bytes, and of what levels that fit whole leave.
/// So the few blocks of the coarse levels, which every other text needs, are all there.
fn shapes(limit: u64, spec: &BlockSpec, dtype: BlockDtype) -> Vec<Option<SlabShape>> {
    let slot_bytes = |level| dtype.block_bytes(spec, level);
    let needs = |level| (spec.n_blocks(level) as u64 + 1) * (slot_bytes(level) + ENTRY_BYTES);
    let mut levels: Vec<usize> = spec.levels().collect();
    levels.sort_by_key(|&level| needs(level));
    let (mut shapes, mut left, mut n_left) = (vec![None; spec.n_levels()], limit, levels.len() as u64);
    for level in levels {
        let slot_bytes = slot_bytes(level);
        let n_slots = needs(level).min(left / n_left) / (slot_bytes + ENTRY_BYTES);
        (left, n_left) = (left - n_slots * (slot_bytes + ENTRY_BYTES), n_left - 1);
        let (row_len, len, n_slots) = (spec.row_len(), spec.block_len(level), n_slots as u32);
        let shape = SlabShape { level: level as u8, dtype, row_len, len, slot_bytes, n_slots };
        shapes[level] = (n_slots > 0).then_some(shape);
    }
    shapes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_that_fit_leave_their_part_to_the_others() {
        let spec = BlockSpec::ffn(1, 4, vec![8, 0, 2, 1], vec![2, 2, 16, 2]);
        // Blocks of 384, 96 and 48 bytes: 3 of them, 65 and 129.
        let n_slots = |limit| -> Vec<u32> {
            let shapes = shapes(limit, &spec, BlockDtype::F32);
            let bytes = |shape: &SlabShape| u64::from(shape.n_slots) * (shape.slot_bytes + ENTRY_BYTES);
            assert!(shapes.iter().flatten().map(bytes).sum::<u64>() <= limit);
            shapes.iter().map(|shape| shape.map_or(0, |shape| shape.n_slots)).collect()
        };
        assert_eq!(n_slots(1 << 20), [3, 0, 65, 129]);
        // 1188 bytes go to level 0; 4406 are left for each of the other two.
        assert_eq!(n_slots(10_000), [3, 0, 40, 74]);
        assert_eq!(n_slots(1000), [0, 0, 4, 9]);
        assert_eq!(n_slots(100), [0, 0, 0, 1]);
    }
}
