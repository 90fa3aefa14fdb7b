use std::collections::BTreeMap;
use std::future::ready;
use std::sync::Arc;

use bytes::Bytes;
use cluster_tree::ClusterId;
use futures::stream::{self, Stream, StreamExt};

use crate::bank_store::unique;
use crate::checkpoint::{Column, Entry, Indices};
use crate::schedule::setting;
use crate::segment::{Index, LevelIndex, Part, block_bytes};
use crate::tensor_file::mismatch;
use crate::write::{Content, divide, stem, write_segment};
use crate::{BankStore, Checkpoint, Error, Placement, Result, Segment, ShardRecord, Step};

/// What to do with a block that several banks hold with different contents.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum OnConflict {
    /// Fail, and name it.
    Refuse,
    /// Take it from the first bank that has it.
    PreferFirst,
}

/// How banks are merged.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct MergeOptions {
    /// Shards that the result is written as; it is restored to any number.
    pub n_shards: usize,
    /// Of a block that differs.
    pub on_conflict: OnConflict,
}

/// What a merge has made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Merged {
    /// Step of the result, the largest of those merged.
    pub step: Step,
    /// Blocks of the result.
    pub n_blocks: u64,
    /// Blocks that several banks held, all the same.
    pub n_same: u64,
    /// Blocks that several banks held with different contents.
    pub n_conflicts: u64,
}

/// A bank that is read from, with all of its indices.
#[derive(Clone)]
struct Source {
    checkpoint: Checkpoint,
    optimizer: Arc<Indices>,
}

/// A block of the result: its bank, and where it is there.
#[derive(Copy, Clone)]
struct Origin {
    source: usize,
    entry: Entry,
}

/// Joins the banks of jobs that each trained a part of the tree: every updated block of each, with its
/// optimizer state, in a new save of `to`. Blocks are the same when their numbers of updates and the
/// checksums of their weights and moments are.
///
/// # Errors
/// On banks of different specs, seeds or hashes, and on a block that differs unless `options` choose.
pub async fn merge(
    banks: &[Checkpoint],
    to: &BankStore,
    options: MergeOptions,
) -> Result<(Checkpoint, Merged)> {
    to.check_access()?;
    let Some(first) = banks.first() else {
        return Err(setting("banks to merge", "at least 1", 0));
    };
    Placement { shard: 0, n_shards: options.n_shards }.validate()?;
    let identity = first.manifest().identity();
    let mut sources = Vec::new();
    for checkpoint in banks {
        checkpoint.check_same(&identity)?;
        let (checkpoint, optimizer) = (checkpoint.clone(), checkpoint.optimizer().await?);
        sources.push(Source { checkpoint, optimizer });
    }
    let step = banks.iter().map(Checkpoint::step).max().unwrap_or(first.step());
    let mut merged = Merged { step, n_blocks: 0, n_same: 0, n_conflicts: 0 };
    let blocks = union(&sources, options.on_conflict, &mut merged)?;
    let mut records = Vec::new();
    for shard in 0..options.n_shards {
        let placement = Placement { shard, n_shards: options.n_shards };
        let owned: Vec<(ClusterId, Origin)> =
            blocks.iter().filter(|(id, _)| placement.owns(**id)).map(|(id, origin)| (*id, *origin)).collect();
        let mut touched = vec![0; identity.spec.n_levels()];
        owned.iter().for_each(|(id, _)| touched[usize::from(id.level)] += 1);
        let segments = write(&sources, to, (step, placement), &owned).await?;
        let (identity, n_shards) = (identity.clone(), options.n_shards);
        records.push(ShardRecord { identity, step, shard, n_shards, touched, segments });
    }
    Ok((to.commit(step, &records).await?, merged))
}

/// Writes a bank anew for a number of shards, without what was overwritten since. No bank needs it to be
/// restored; it makes one of many small files into one of few. `to` must be another bank, as a step has
/// one save.
pub async fn reshard(bank: &Checkpoint, to: &BankStore, n_shards: usize) -> Result<Checkpoint> {
    let options = MergeOptions { n_shards, on_conflict: OnConflict::Refuse };
    merge(std::slice::from_ref(bank), to, options).await.map(|(checkpoint, _)| checkpoint)
}

/// Every block of the banks, from the first that has it.
fn union(
    sources: &[Source],
    on_conflict: OnConflict,
    merged: &mut Merged,
) -> Result<BTreeMap<ClusterId, Origin>> {
    let mut blocks = BTreeMap::<ClusterId, Origin>::new();
    for (place, source) in sources.iter().enumerate() {
        let checkpoint = &source.checkpoint;
        for level in checkpoint.spec().levels() {
            for &entry in checkpoint.entries(level) {
                let (id, origin) = (checkpoint.id(level, &entry), Origin { source: place, entry });
                let Some(found) = blocks.get(&id) else {
                    blocks.insert(id, origin);
                    continue;
                };
                let held = &sources[found.source];
                if held.content(level, &found.entry) == source.content(level, &entry) {
                    merged.n_same += 1;
                } else if on_conflict == OnConflict::PreferFirst {
                    merged.n_conflicts += 1;
                } else {
                    let (first, second) = (held.checkpoint.place().to_owned(), checkpoint.place().to_owned());
                    return Err(Error::Conflict { id, first, second });
                }
            }
        }
    }
    merged.n_blocks = blocks.len() as u64;
    Ok(blocks)
}

impl Source {
    fn indices(&self, part: Part) -> &Arc<Indices> {
        match part {
            Part::Values => self.checkpoint.values(),
            Part::Optimizer => &self.optimizer,
        }
    }

    /// Updates of a block, and the checksums of its weights and moments.
    fn content(&self, level: usize, entry: &Entry) -> (u64, Vec<u32>) {
        let place = entry.place as usize;
        let sums = [Part::Values, Part::Optimizer]
            .into_iter()
            .flat_map(|part| self.indices(part).level(entry, level).checksums.iter().map(|sums| sums[place]));
        (self.optimizer.level(entry, level).steps[place], sums.collect())
    }
}

/// Writes the blocks of one shard, in the order of ids. Their checksums stay those that they had.
async fn write(
    sources: &[Source],
    to: &BankStore,
    (step, placement): (Step, Placement),
    blocks: &[(ClusterId, Origin)],
) -> Result<Vec<Segment>> {
    let Some(first) = sources.first() else {
        return Err(mismatch(to.files.place("").as_path(), "banks to merge", "at least 1", 0));
    };
    let (spec, unique) = (first.checkpoint.spec(), unique());
    let sizes = blocks.iter().map(|(id, _)| block_bytes(spec, usize::from(id.level)));
    let mut segments = Vec::new();
    for (part, range) in divide(sizes, to.options.max_segment_bytes).into_iter().enumerate() {
        let mut by_level = vec![Vec::new(); spec.n_levels()];
        for (id, origin) in &blocks[range] {
            by_level[usize::from(id.level)].push(*origin);
        }
        let target = to.target(stem(step, placement, &unique, part), placement.shard, step);
        let values = content(sources, Part::Values, &by_level);
        let optimizer = content(sources, Part::Optimizer, &by_level);
        segments.push(write_segment(spec, target, ready(Ok(values)), ready(Ok(optimizer))).await?);
    }
    Ok(segments)
}

fn content(
    sources: &[Source],
    part: Part,
    by_level: &[Vec<Origin>],
) -> Content<impl Stream<Item = Result<Bytes>> + use<>> {
    let n_tensors = match part {
        Part::Values => 1,
        Part::Optimizer => 2,
    };
    let (mut index, mut reads) = (Index::new(), Vec::new());
    for (level, origins) in by_level.iter().enumerate() {
        let of = |origin: &Origin| sources[origin.source].indices(part).level(&origin.entry, level);
        let sums = |tensor: usize| {
            origins.iter().map(|origin| of(origin).checksums[tensor][origin.entry.place as usize]).collect()
        };
        let steps = |origin: &Origin| of(origin).steps[origin.entry.place as usize];
        index.push(LevelIndex {
            rows: origins.iter().map(|origin| origin.entry.row).collect(),
            steps: if part == Part::Optimizer { origins.iter().map(steps).collect() } else { Vec::new() },
            checksums: (0..n_tensors).map(sums).collect(),
        });
        for tensor in 0..n_tensors {
            for origins in origins.chunk_by(|a, b| a.source == b.source) {
                let source = sources[origins[0].source].clone();
                let entries: Vec<Entry> = origins.iter().map(|origin| origin.entry).collect();
                reads.push((source, Column { level, tensor }, entries));
            }
        }
    }
    let blocks = stream::iter(reads).flat_map(move |(source, column, entries)| {
        source.checkpoint.read_each(Arc::clone(source.indices(part)), column, entries)
    });
    Content { index, blocks }
}
