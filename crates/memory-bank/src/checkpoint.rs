//! One saved state of a bank, and blocks read from it.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use cluster_tree::ClusterId;
use futures::stream::{self, Stream, StreamExt, TryStreamExt};

use crate::files::Files;
use crate::manifest::{MANIFEST, MAX_MANIFEST_BYTES, sha256};
use crate::segment::{Index, Layout, Part, block_bytes};
use crate::tensor_file::mismatch;
use crate::{
    Array, BlockSpec, Identity, Manifest, Offload, Placement, Result, Row, Segment, Shard, ShardOptions,
    ShardRecord, Step,
};

/// Neighbouring blocks of at most so many bytes are read at once, and one larger block alone.
const READ_BYTES: u64 = 8 << 20;
/// Reads of blocks at the same time: what is not yet used of them is in memory.
const READS: usize = 8;
/// Reads of indices at the same time.
const INDEX_READS: usize = 16;

/// A saved step of a bank, opened to be read: its manifest and the indices of its files are known and
/// checked, blocks are read when they are asked for, and checked then.
#[derive(Clone)]
pub struct Checkpoint(Arc<Opened>);

struct Opened {
    files: Files,
    /// The manifest, for messages.
    place: PathBuf,
    manifest: Manifest,
    values: Arc<Indices>,
    blocks: Vec<Vec<Entry>>,
}

/// Where the newest content of a block is.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Entry {
    pub(crate) row: u32,
    /// Place of the segment in the manifest.
    pub(crate) segment: u32,
    /// Place of the row in the segment.
    pub(crate) place: u32,
}

/// What one of the two files of every segment says of itself.
pub(crate) struct Indices {
    pub(crate) part: Part,
    pub(crate) segments: Vec<(Layout, Index)>,
}

/// A tensor of blocks: the weights, or the moments of one order, of one level.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Column {
    pub(crate) level: usize,
    /// Place among those of the level in a file.
    pub(crate) tensor: usize,
}

impl Checkpoint {
    /// The checkpoint in a `memory` folder, as a [`crate::LocalBank`] writes it.
    ///
    /// # Errors
    /// On a folder that is none, and as every opening: on a manifest or an index that is damaged.
    pub async fn open_folder(memory_folder: &Path) -> Result<Self> {
        Self::open(Files::local(memory_folder)?, MANIFEST).await
    }

    /// The checkpoint of the manifest at `path`.
    pub(crate) async fn open(files: Files, path: &str) -> Result<Self> {
        let place = files.place(path);
        let bytes = files.read_small(path, MAX_MANIFEST_BYTES).await?;
        Self::of(files, place.clone(), Manifest::parse(&place, &bytes)?).await
    }

    /// The checkpoint of a manifest, which may not be written yet. Fails on files that are missing, of
    /// another size, or do not hold the blocks that the manifest counts.
    pub(crate) async fn of(files: Files, place: PathBuf, manifest: Manifest) -> Result<Self> {
        let values = Arc::new(indices(&files, &manifest, Part::Values).await?);
        let blocks = newest(&manifest, &place, &values)?;
        Ok(Self(Arc::new(Opened { files, place, manifest, values, blocks })))
    }

    /// What the files hold.
    pub fn manifest(&self) -> &Manifest {
        &self.0.manifest
    }

    /// The last step applied.
    pub fn step(&self) -> Step {
        self.0.manifest.step
    }

    /// What messages call it: where its manifest is.
    pub fn place(&self) -> &Path {
        &self.0.place
    }

    /// Fails when it is of a bank of another spec or seed, or belongs to other hashes.
    pub fn check_same(&self, identity: &Identity) -> Result<()> {
        self.manifest().check_same(self.place(), identity)
    }

    /// A shard of any placement as it was at this step, to continue to the bit. Only its blocks are
    /// read, each checked.
    ///
    /// # Errors
    /// When `identity`, or the seed of `options`, is not the checkpoint's, and on damaged files.
    pub async fn load(&self, identity: &Identity, options: ShardOptions) -> Result<Shard> {
        self.load_rest(identity, options, |_| true, (vec![], None)).await
    }

    /// As [`Checkpoint::load`], of some levels; the blocks of others are in their initial state.
    ///
    /// # Errors
    /// As [`Checkpoint::load`].
    pub async fn load_levels(
        &self,
        identity: &Identity,
        options: ShardOptions,
        takes: impl Fn(usize) -> bool + Send,
    ) -> Result<Shard> {
        self.load_rest(identity, options, takes, (vec![], None)).await
    }

    /// As [`Checkpoint::load`], for a shard that saved this checkpoint or began with it: it still holds the
    /// blocks `held`, those that were not updated since, and only the others are read; those that do not fit
    /// into its part of memory go to `offload`.
    ///
    /// # Errors
    /// As [`Checkpoint::load`], when a block of `held` is not the checkpoint's, and when a disk is full.
    pub async fn load_onto(
        &self,
        identity: &Identity,
        options: ShardOptions,
        held: Vec<(ClusterId, Row)>,
        offload: Option<&Offload>,
    ) -> Result<Shard> {
        self.load_rest(identity, options, |_| true, (held, offload)).await
    }

    async fn load_rest(
        &self,
        identity: &Identity,
        options: ShardOptions,
        takes: impl Fn(usize) -> bool + Send,
        (held, offload): (Vec<(ClusterId, Row)>, Option<&Offload>),
    ) -> Result<Shard> {
        self.check_same(identity)?;
        if options.seed != identity.seed {
            return Err(mismatch(self.place(), "seed", options.seed, identity.seed));
        }
        options.placement.validate()?;
        let optimizer = self.optimizer().await?;
        for (id, row) in &held {
            let found = self.find(*id)?.map_or(0, |entry| optimizer.steps(&entry, usize::from(id.level)));
            if found != row.steps {
                return Err(mismatch(self.place(), &format!("updates of block {id}"), row.steps, found));
            }
        }
        let held_ids: HashSet<ClusterId> = held.iter().map(|&(id, _)| id).collect();
        let mut room = offload.map_or(0, |offload| offload.room_beside(&held));
        let mut rows = held;
        for level in self.spec().levels().filter(|&level| takes(level)) {
            let owned = |entry: &&Entry| {
                let id = self.id(level, entry);
                options.placement.owns(id) && !held_ids.contains(&id)
            };
            let mut entries: Vec<Entry> = self.entries(level).iter().filter(owned).copied().collect();
            // In the order of the files, so that neighbours are read together.
            entries.sort_by_key(|entry| (entry.segment, entry.place));
            let mut pieces = std::pin::pin!(self.read_rows(level, &optimizer, entries));
            while let Some(piece) = pieces.try_next().await? {
                rows.extend(match offload {
                    Some(offload) => offload.clone().admit(piece, &mut room).await?,
                    None => piece,
                });
            }
        }
        Shard::with_rows(identity.spec.clone(), options, self.step(), rows)
    }

    /// Whether it holds the same blocks as another one: their weights, by their checksums.
    pub fn is_same(&self, other: &Self) -> bool {
        let sums = |checkpoint: &Self| -> Vec<(u32, u32)> {
            let of_level = |level: usize| {
                let sum = move |entry: &Entry| {
                    let index = checkpoint.values().level(entry, level);
                    (entry.row, index.checksums[0][entry.place as usize])
                };
                checkpoint.entries(level).iter().map(sum)
            };
            checkpoint.spec().levels().flat_map(of_level).collect()
        };
        self.manifest().identity() == other.manifest().identity()
            && self.step() == other.step()
            && sums(self) == sums(other)
    }

    /// Steps that updated each touched block, the generic ones too; of all others there are none.
    ///
    /// # Errors
    /// On an index of optimizer state that is missing or damaged.
    pub async fn updates(&self) -> Result<Vec<(ClusterId, u64)>> {
        let optimizer = self.optimizer().await?;
        let of_level = |level: usize| {
            let updates = {
                let optimizer = Arc::clone(&optimizer);
                move |entry: &Entry| (self.id(level, entry), optimizer.steps(entry, level))
            };
            self.entries(level).iter().map(updates)
        };
        Ok(self.spec().levels().flat_map(of_level).collect())
    }

    /// What the next save of a shard restored from this may build on: `None` when the bank was saved by
    /// another number of shards.
    pub fn record(&self, placement: Placement) -> Option<ShardRecord> {
        let (manifest, Placement { shard, n_shards }) = (self.manifest(), placement);
        let owned = |level: usize| {
            let entries = self.entries(level).iter();
            entries.filter(|entry| placement.owns(self.id(level, entry))).count() as u64
        };
        (manifest.n_shards == n_shards).then(|| ShardRecord {
            identity: manifest.identity(),
            step: manifest.step,
            shard,
            n_shards,
            touched: (0..self.spec().n_levels()).map(owned).collect(),
            segments: manifest.segments_of(shard).cloned().collect(),
        })
    }

    pub(crate) fn spec(&self) -> &BlockSpec {
        &self.0.manifest.spec
    }

    pub(crate) fn files(&self) -> &Files {
        &self.0.files
    }

    pub(crate) fn values(&self) -> &Arc<Indices> {
        &self.0.values
    }

    /// The touched blocks of a level, by row.
    pub(crate) fn entries(&self, level: usize) -> &[Entry] {
        &self.0.blocks[level]
    }

    /// Where a block is; `None` if it was never touched. Fails on a block that the spec does not have.
    pub(crate) fn find(&self, id: ClusterId) -> Result<Option<Entry>> {
        find(self.spec(), &self.0.blocks, id)
    }

    pub(crate) fn id(&self, level: usize, entry: &Entry) -> ClusterId {
        self.spec().id_of_row(level, entry.row as usize)
    }

    /// The indices of the files of optimizer state. Fails when they do not hold the blocks of the files
    /// of weights beside them.
    pub(crate) async fn optimizer(&self) -> Result<Arc<Indices>> {
        let found = indices(self.files(), self.manifest(), Part::Optimizer).await?;
        for (place, segment) in self.manifest().segments.iter().enumerate() {
            let rows = |indices: &Indices| -> Vec<Vec<u32>> {
                indices.segments[place].1.iter().map(|level| level.rows.clone()).collect()
            };
            if rows(&found) != rows(self.values()) {
                let path = self.files().place(&segment.optimizer.path);
                return Err(mismatch(&path, "rows", format!("those of {}", segment.values.path), "others"));
            }
        }
        Ok(Arc::new(found))
    }

    /// Blocks of one tensor, in the order of `entries`, which are of one level; neighbours in a file
    /// come together. Every block is checked.
    pub(crate) fn read(
        &self,
        indices: Arc<Indices>,
        column: Column,
        entries: Vec<Entry>,
    ) -> impl Stream<Item = Result<Vec<Bytes>>> + Send + use<> {
        let block_bytes = block_bytes(self.spec(), column.level);
        let pieces = coalesce(&entries, (READ_BYTES / block_bytes.max(1)).max(1) as usize);
        let this = self.clone();
        let read = move |piece| this.clone().read_piece(Arc::clone(&indices), column, piece);
        stream::iter(pieces).map(read).buffered(READS)
    }

    /// As [`Checkpoint::read`], block by block.
    pub(crate) fn read_each(
        &self,
        indices: Arc<Indices>,
        column: Column,
        entries: Vec<Entry>,
    ) -> impl Stream<Item = Result<Bytes>> + Send + use<> {
        let pieces = self.read(indices, column, entries);
        pieces.map_ok(|piece| stream::iter(piece.into_iter().map(Ok))).try_flatten()
    }

    /// Reads neighbouring rows of one file.
    async fn read_piece(
        self,
        indices: Arc<Indices>,
        column: Column,
        piece: Vec<Entry>,
    ) -> Result<Vec<Bytes>> {
        let (Column { level, tensor }, first) = (column, piece[0]);
        let segment = &self.manifest().segments[first.segment as usize];
        let (layout, index) = &indices.segments[first.segment as usize];
        let places = first.place as usize..first.place as usize + piece.len();
        let file = segment.file(indices.part);
        let mut bytes = self.files().read(file, layout.range(level, tensor, places)).await?;
        let block_bytes = bytes.len() / piece.len();
        let checked = |entry: &Entry| {
            let block = bytes.split_to(block_bytes);
            let expected = index[level].checksums[tensor][entry.place as usize];
            self.check_block(file.path.as_str(), self.id(level, entry), expected, &block)?;
            Ok(block)
        };
        piece.iter().map(checked).collect()
    }

    fn check_block(&self, path: &str, id: ClusterId, expected: u32, block: &[u8]) -> Result<()> {
        check_block(&self.files().place(path), id, expected, block)
    }

    /// Rows of a level, in the order of `entries`, some at a time.
    fn read_rows(
        &self,
        level: usize,
        optimizer: &Arc<Indices>,
        entries: Vec<Entry>,
    ) -> impl Stream<Item = Result<Vec<(ClusterId, Row)>>> + Send + use<> {
        let read = |indices: &Arc<Indices>, tensor| {
            self.read(Arc::clone(indices), Column { level, tensor }, entries.clone())
        };
        // Of all three the same neighbours come together.
        let arrays = read(self.values(), 0).zip(read(optimizer, 0)).zip(read(optimizer, 1));
        let (this, optimizer, mut entries) = (self.clone(), Arc::clone(optimizer), entries.into_iter());
        arrays.map(move |((values, m), v)| {
            let arrays = values?.into_iter().zip(m?).zip(v?);
            let row = |(((values, m), v), entry): (((Bytes, Bytes), Bytes), Entry)| {
                let [values, m, v] =
                    [values, m, v].map(|block| Array::from(bytemuck::pod_collect_to_vec::<u8, f32>(&block)));
                let steps = optimizer.steps(&entry, level);
                (this.id(level, &entry), Row { values, m, v, steps, last: this.step() })
            };
            Ok(arrays.zip(&mut entries).map(row).collect())
        })
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Checkpoint").field(&self.0.place).finish()
    }
}

impl Indices {
    pub(crate) fn level(&self, entry: &Entry, level: usize) -> &crate::segment::LevelIndex {
        &self.segments[entry.segment as usize].1[level]
    }

    /// Updates of a block of a level.
    pub(crate) fn steps(&self, entry: &Entry, level: usize) -> u64 {
        self.level(entry, level).steps[entry.place as usize]
    }
}

/// Fails on a block that is not what its index says.
pub(crate) fn check_block(path: &Path, id: ClusterId, expected: u32, block: &[u8]) -> Result<()> {
    let found = crc32c::crc32c(block);
    if found == expected {
        return Ok(());
    }
    let what = format!("crc32c of block {id}");
    Err(mismatch(path, &what, format!("{expected:08x}"), format!("{found:08x}")))
}

/// Reads and checks the indices of all files of one kind.
async fn indices(files: &Files, manifest: &Manifest, part: Part) -> Result<Indices> {
    let spec = Arc::new(manifest.spec.clone());
    let reads = manifest.segments.iter().cloned().map(|segment| {
        let placement = Placement { shard: segment.shard, n_shards: manifest.n_shards };
        index(files.clone(), Arc::clone(&spec), placement, segment, part)
    });
    let reads: Vec<_> = reads.collect();
    let segments = stream::iter(reads).buffered(INDEX_READS).try_collect().await?;
    Ok(Indices { part, segments })
}

async fn index(
    files: Files,
    spec: Arc<BlockSpec>,
    placement: Placement,
    segment: Segment,
    part: Part,
) -> Result<(Layout, Index)> {
    let (file, layout) = (segment.file(part), Layout::new(&spec, part, &segment.rows));
    let start = files.read(file, 0..layout.index_bytes).await?;
    let path = files.place(&file.path);
    let index = check_index(&layout, &spec, placement, (&path, &file.index_sha256), &start)?;
    Ok((layout, index))
}

/// The index of a file, from its start.
pub(crate) fn check_index(
    layout: &Layout,
    spec: &BlockSpec,
    placement: Placement,
    (path, expected): (&Path, &str),
    start: &[u8],
) -> Result<Index> {
    let found = sha256(start);
    // What is wrong with a damaged header says more than two hashes.
    let index = layout.read(spec, placement, path, start)?;
    if found != expected {
        return Err(mismatch(path, "sha256 of the index", expected, found));
    }
    Ok(index)
}

/// Where the newest content of every touched block is, by level and row. Fails when they are not as
/// many as the manifest counts.
pub(crate) fn newest(manifest: &Manifest, place: &Path, values: &Indices) -> Result<Vec<Vec<Entry>>> {
    let mut blocks = vec![Vec::new(); manifest.spec.n_levels()];
    for (segment, (_, index)) in values.segments.iter().enumerate() {
        for (entries, level) in blocks.iter_mut().zip(index) {
            let entry = |(place, &row)| Entry { row, segment: segment as u32, place: place as u32 };
            entries.extend(level.rows.iter().enumerate().map(entry));
        }
    }
    for (level, entries) in blocks.iter_mut().enumerate() {
        entries.sort_by_key(|entry| (entry.row, Reverse(entry.segment)));
        entries.dedup_by_key(|entry| entry.row);
        if entries.len() as u64 != manifest.touched[level] {
            let what = format!("number of touched blocks of level {level}");
            return Err(mismatch(place, &what, manifest.touched[level], entries.len()));
        }
    }
    Ok(blocks)
}

/// Looks a block up among those touched.
pub(crate) fn find(spec: &BlockSpec, blocks: &[Vec<Entry>], id: ClusterId) -> Result<Option<Entry>> {
    let (row, entries) = (spec.row(id)? as u32, &blocks[usize::from(id.level)]);
    Ok(entries.binary_search_by_key(&row, |entry| entry.row).ok().map(|place| entries[place]))
}

/// Divides entries where they are not neighbours in a file, or are more than `most`.
fn coalesce(entries: &[Entry], most: usize) -> Vec<Vec<Entry>> {
    let mut pieces: Vec<Vec<Entry>> = Vec::new();
    for &entry in entries {
        let follows = |last: &Entry| last.segment == entry.segment && last.place + 1 == entry.place;
        match pieces.last_mut() {
            Some(piece) if piece.len() < most && piece.last().is_some_and(follows) => piece.push(entry),
            _ => pieces.push(vec![entry]),
        }
    }
    pieces
}
