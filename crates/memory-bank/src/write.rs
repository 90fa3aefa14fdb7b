//! Blocks into the files of a segment.

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use cluster_tree::ClusterId;
use futures::future::{TryFutureExt, join};
use futures::stream::{self, Stream, StreamExt};
use rayon::prelude::*;

use crate::blocking::blocking;
use crate::files::{Files, Parts};
use crate::segment::{Index, Layout, LevelIndex, Part};
use crate::{Array, BlockSpec, Placement, Result, Row, Segment, Step};

/// Where a segment goes, and as what.
pub(crate) struct Target<'a> {
    pub(crate) files: &'a Files,
    /// What its files' names start with, paths included.
    pub(crate) stem: String,
    pub(crate) shard: usize,
    pub(crate) step: Step,
    pub(crate) parts: Parts,
}

/// The content of one file: its index, and the blocks level by level, tensor by tensor, row by row.
pub(crate) struct Content<S> {
    pub(crate) index: Index,
    pub(crate) blocks: S,
}

/// Writes a segment's two files beside each other, each once its content is there.
pub(crate) async fn write_segment<V, O>(
    spec: &BlockSpec,
    target: Target<'_>,
    values: impl Future<Output = Result<Content<V>>>,
    optimizer: impl Future<Output = Result<Content<O>>>,
) -> Result<Segment>
where
    V: Stream<Item = Result<Bytes>>,
    O: Stream<Item = Result<Bytes>>,
{
    let Target { files, stem, shard, step, parts } = target;
    let start = |part, index: &Index| {
        let rows: Vec<u64> = index.iter().map(|level| level.rows.len() as u64).collect();
        (Bytes::from(Layout::new(spec, part, &rows).write(index)), rows)
    };
    let values = async {
        let Content { index, blocks } = values.await?;
        let (start, rows) = start(Part::Values, &index);
        let path = format!("{stem}values.safetensors");
        Ok((files.write(&path, start, blocks, parts).await?, rows))
    };
    let optimizer = async {
        let Content { index, blocks } = optimizer.await?;
        let (start, _) = start(Part::Optimizer, &index);
        files.write(&format!("{stem}optimizer.safetensors"), start, blocks, parts).await
    };
    let (values, optimizer) = join(values, optimizer).await;
    let (values, rows) = values?;
    Ok(Segment { shard, step, rows, values, optimizer: optimizer? })
}

/// Writes a shard's blocks, in the order of ids, as one segment. They are shared until they are
/// written, and not copied; those on disk are read one at a time.
pub(crate) async fn write_rows(
    spec: &BlockSpec,
    target: Target<'_>,
    rows: Vec<(ClusterId, Row)>,
) -> Result<Segment> {
    let mut by_level: Vec<Vec<(u32, Row)>> = vec![Vec::new(); spec.n_levels()];
    for (id, row) in rows {
        by_level[usize::from(id.level)].push((spec.row(id)? as u32, row));
    }
    let by_level = Arc::new(by_level);
    let levels = Arc::clone(&by_level);
    let steps = |rows: &[(u32, Row)]| rows.iter().map(|(_, row)| row.steps).collect();
    let values = blocking(move || Ok(content(&levels, &[|row| &row.values], |_| Vec::new())));
    let optimizer = blocking(move || Ok(content(&by_level, &[|row| &row.m, |row| &row.v], steps)));
    let read = |content: Content<Vec<Array>>| Content {
        index: content.index,
        blocks: stream::iter(content.blocks).then(array_bytes),
    };
    write_segment(spec, target, values.map_ok(read), optimizer.map_ok(read)).await
}

/// The weights or moments of a row.
type Tensor = fn(&Row) -> &Array;

fn content(
    by_level: &[Vec<(u32, Row)>],
    tensors: &[Tensor],
    steps: impl Fn(&[(u32, Row)]) -> Vec<u64>,
) -> Content<Vec<Array>> {
    let mut blocks = Vec::new();
    let mut level_index = |rows: &Vec<(u32, Row)>| {
        let mut checksums = Vec::new();
        for tensor in tensors {
            checksums.push(rows.par_iter().map(|(_, row)| tensor(row).crc32c()).collect());
            blocks.extend(rows.iter().map(|(_, row)| tensor(row).clone()));
        }
        LevelIndex { rows: rows.iter().map(|(row, _)| *row).collect(), steps: steps(rows), checksums }
    };
    let index = by_level.iter().map(&mut level_index).collect();
    Content { index, blocks }
}

async fn array_bytes(array: Array) -> Result<Bytes> {
    match array.in_memory() {
        Some(values) => Ok(as_bytes(Arc::clone(values))),
        None => blocking(move || array.read()).await.map(as_bytes),
    }
}

/// Numbers as the bytes that they are, in little-endian; they are not copied.
pub(crate) fn as_bytes(values: Arc<Vec<f32>>) -> Bytes {
    Bytes::from_owner(Shared(values))
}

struct Shared(Arc<Vec<f32>>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// The segments that hold rows of some sizes, none of more than `most` bytes unless by one row, as
/// ranges of them.
pub(crate) fn divide(sizes: impl IntoIterator<Item = u64>, most: u64) -> Vec<std::ops::Range<usize>> {
    let mut ranges: Vec<std::ops::Range<usize>> = Vec::new();
    let mut bytes = 0;
    for (place, size) in sizes.into_iter().enumerate() {
        match ranges.last_mut() {
            Some(range) if bytes + size <= most => range.end = place + 1,
            _ => {
                ranges.push(place..place + 1);
                bytes = 0;
            }
        }
        bytes += size;
    }
    ranges
}

/// What the names of a shard's files of a step start with; `unique` makes them its own, so that no
/// repeated or late writer touches a file that a manifest names.
pub(crate) fn stem(
    step: Step,
    Placement { shard, n_shards }: Placement,
    unique: &str,
    part: usize,
) -> String {
    format!("{:08}/shard-{shard:04}-of-{n_shards:04}-{unique}-{part:02}.", step.0)
}
