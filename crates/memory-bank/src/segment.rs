//! The layout of a segment: the blocks that one shard wrote in one save, in two safetensors files.
//!
//! A file begins with its *index*: the header, then for each level with rows which rows it has and the
//! CRC-32C of each, then padding. The manifest holds the SHA-256 of the index, so a block read by its
//! range alone is as sure as one from a file read in full.

use std::ops::Range;
use std::path::Path;

use bytemuck::pod_collect_to_vec;
use safetensors::Dtype;

use crate::tensor_file::{ALIGNMENT, Tensor, check_header, header, mismatch};
use crate::{BlockSpec, Placement, Result};

/// One of a segment's two files.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Part {
    /// `level0.rows`…, `level0.crc32c`…, `padding`, then `level0`… `[n, …]`, … being the shape of a block.
    Values,
    /// `level0.steps`…, `level0.rows`…, `level0.m.crc32c`…, `level0.v.crc32c`…, `padding`, then
    /// `level0.m`, `level0.v`, `level1.m`…
    Optimizer,
}

impl Part {
    /// What follows the level in the names of its tensors of blocks.
    fn suffixes(self) -> &'static [&'static str] {
        match self {
            Self::Values => &[""],
            Self::Optimizer => &[".m", ".v"],
        }
    }
}

/// What an index says of one level.
#[derive(Clone, PartialEq, Default, Debug)]
pub(crate) struct LevelIndex {
    /// Rows as [`BlockSpec::row`] gives them, ascending.
    pub(crate) rows: Vec<u32>,
    /// Updates of each; empty in a file of values.
    pub(crate) steps: Vec<u64>,
    /// For each tensor of blocks, the checksum of each row.
    pub(crate) checksums: Vec<Vec<u32>>,
}

/// By level of the spec, those without rows too.
pub(crate) type Index = Vec<LevelIndex>;

/// Where everything is in a file, from its numbers of rows alone.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Layout {
    part: Part,
    pub(crate) header: Vec<u8>,
    /// Bytes of header, index and padding.
    pub(crate) index_bytes: u64,
    /// Bytes of the file.
    pub(crate) bytes: u64,
    /// By level: rows, bytes of a block, and where each tensor of blocks starts.
    levels: Vec<(u64, u64, Vec<u64>)>,
}

impl Layout {
    /// `n_rows` by level, at most the blocks of each.
    pub(crate) fn new(spec: &BlockSpec, part: Part, n_rows: &[u64]) -> Self {
        let with_rows = || n_rows.iter().copied().enumerate().filter(|&(_, n)| n > 0);
        let column = |suffix: &'static str, dtype| {
            with_rows().map(move |(level, n)| Tensor {
                name: format!("level{level}{suffix}"),
                dtype,
                shape: vec![n],
            })
        };
        let mut tensors: Vec<Tensor> = Vec::new();
        // The wider numbers come first, so that all are aligned.
        if part == Part::Optimizer {
            tensors.extend(column(".steps", Dtype::U64));
        }
        tensors.extend(column(".rows", Dtype::U32));
        match part {
            Part::Values => tensors.extend(column(".crc32c", Dtype::U32)),
            Part::Optimizer => {
                tensors.extend(column(".m.crc32c", Dtype::U32));
                tensors.extend(column(".v.crc32c", Dtype::U32));
            }
        }
        let columns: u64 = tensors.iter().map(Tensor::bytes).sum();
        let padding = columns.next_multiple_of(ALIGNMENT) - columns;
        if padding > 0 {
            tensors.push(Tensor { name: "padding".to_owned(), dtype: Dtype::U8, shape: vec![padding] });
        }
        let mut end = columns + padding;
        let mut levels = vec![(0, 0, Vec::new()); n_rows.len()];
        for (level, n) in with_rows() {
            let mut starts = Vec::new();
            let sizes: Vec<u64> = spec.block_shape(level).iter().map(|&size| size as u64).collect();
            for suffix in part.suffixes() {
                let shape = [&[n], &sizes[..]].concat();
                let tensor = Tensor { name: format!("level{level}{suffix}"), dtype: Dtype::F32, shape };
                starts.push(end);
                end += tensor.bytes();
                tensors.push(tensor);
            }
            levels[level] = (n, block_bytes(spec, level), starts);
        }
        let header = header(&tensors);
        let start = header.len() as u64;
        levels.iter_mut().flat_map(|(_, _, starts)| starts).for_each(|at| *at += start);
        Self { part, header, index_bytes: start + columns + padding, bytes: start + end, levels }
    }

    /// Tensors of blocks of a level.
    pub(crate) fn n_tensors(&self) -> usize {
        self.part.suffixes().len()
    }

    /// The bytes of some neighbouring rows of a tensor of blocks.
    pub(crate) fn range(&self, level: usize, tensor: usize, places: Range<usize>) -> Range<u64> {
        let (_, block_bytes, starts) = &self.levels[level];
        let at = |place: usize| starts[tensor] + place as u64 * block_bytes;
        at(places.start)..at(places.end)
    }

    /// The start of the file, up to its data.
    pub(crate) fn write(&self, index: &Index) -> Vec<u8> {
        let mut bytes = self.header.clone();
        let levels = || index.iter().filter(|level| !level.rows.is_empty());
        levels().for_each(|level| bytes.extend_from_slice(bytemuck::cast_slice(&level.steps)));
        levels().for_each(|level| bytes.extend_from_slice(bytemuck::cast_slice(&level.rows)));
        for tensor in 0..self.n_tensors() {
            let checksums = levels().map(|level| &level.checksums[tensor]);
            checksums.for_each(|sums| bytes.extend_from_slice(bytemuck::cast_slice(sums)));
        }
        bytes.resize(self.index_bytes as usize, 0);
        bytes
    }

    /// The index, from the bytes up to the data. Fails on another header than this layout's, and on
    /// rows that do not ascend, or that `placement` does not own.
    pub(crate) fn read(
        &self,
        spec: &BlockSpec,
        placement: Placement,
        path: &Path,
        start: &[u8],
    ) -> Result<Index> {
        check_header(path, &self.header, start)?;
        if start.len() as u64 != self.index_bytes {
            return Err(mismatch(path, "bytes of the index", self.index_bytes, start.len()));
        }
        let mut rest = &start[self.header.len()..];
        let mut take = |n: u64, width: usize| {
            let (taken, left) = rest.split_at(n as usize * width);
            rest = left;
            taken
        };
        let mut index = vec![LevelIndex::default(); self.levels.len()];
        let columns = || self.levels.iter().map(|&(n, ..)| n);
        if self.part == Part::Optimizer {
            index.iter_mut().zip(columns()).for_each(|(to, n)| to.steps = pod_collect_to_vec(take(n, 8)));
        }
        index.iter_mut().zip(columns()).for_each(|(to, n)| to.rows = pod_collect_to_vec(take(n, 4)));
        for _ in self.part.suffixes() {
            let sums = |(to, n): (&mut LevelIndex, u64)| to.checksums.push(pod_collect_to_vec(take(n, 4)));
            index.iter_mut().zip(columns()).for_each(sums);
        }
        for (level, found) in index.iter().enumerate() {
            check_rows(spec, placement, path, level, &found.rows)?;
            if let Some(place) = found.steps.iter().position(|&steps| steps == 0) {
                let what = format!("updates of row {} of level {level}", found.rows[place]);
                return Err(mismatch(path, &what, "at least 1", 0));
            }
        }
        Ok(index)
    }
}

pub(crate) fn block_bytes(spec: &BlockSpec, level: usize) -> u64 {
    spec.block_len(level) as u64 * size_of::<f32>() as u64
}

fn check_rows(spec: &BlockSpec, placement: Placement, path: &Path, level: usize, rows: &[u32]) -> Result<()> {
    if let Some(pair) = rows.windows(2).find(|pair| pair[0] >= pair[1]) {
        let what = format!("row of level {level} after {}", pair[0]);
        return Err(mismatch(path, &what, format!("at least {}", u64::from(pair[0]) + 1), pair[1]));
    }
    if let Some(&last) = rows.last().filter(|&&last| last as usize > spec.n_blocks(level)) {
        let what = format!("last row of level {level}");
        return Err(mismatch(path, &what, format!("at most {}", spec.n_blocks(level)), last));
    }
    for &row in rows {
        let id = spec.id_of_row(level, row as usize);
        if !placement.owns(id) {
            let owner = crate::owner(id, placement.n_shards);
            return Err(mismatch(path, &format!("shard of block {id}"), owner, placement.shard));
        }
    }
    Ok(())
}
