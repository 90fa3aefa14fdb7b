//! A step shared among workers, and its gradients summed over all of them.
//!
//! Every worker knows the whole batch, so it knows which micro-batches each worker has, which blocks these
//! touch, and what each worker sends to whom: nothing but numbers is sent. The gradient of a block is added
//! up by one of the workers that have a part of it, who pushes it, once.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use anchor::{Gradients, unique_ids};
use bytes::Bytes;
use cluster_tree::{ClusterId, ClusterPath};
use collective::{Call, Leaves, Mesh, TreeSum};
use corpus::Batch;
use memory_bank::{Block, BlockSpec, squared_norm};
use rayon::prelude::*;

use crate::{Result, Subtree, TrainConfig};

/// What is sent of blocks at once is bounded: a batch of a large model touches gigabytes.
const AT_ONCE: usize = 1 << 24;

/// Sums of a worker's micro-batches, as [`TreeSum`] leaves them.
pub(crate) struct Sums {
    /// Of each micro-batch.
    pub(crate) losses: Vec<f64>,
    /// Of the anchor's parameters, over all workers.
    pub(crate) anchor: Gradients,
    /// Of each block, in the order of ids.
    pub(crate) blocks: BTreeMap<ClusterId, Vec<Vec<f32>>>,
}

/// Who computes what of a step.
pub(crate) struct Share {
    leaves: Leaves,
    rank: usize,
    micro_batch: usize,
    subtree: Option<Subtree>,
    spec: Option<BlockSpec>,
    /// Numbers of blocks that are sent at once, or those of a block that has more.
    most_at_once: usize,
    touched: BTreeMap<ClusterId, Touched>,
}

/// Who has a part of a block's gradient.
struct Touched {
    /// Micro-batches, in order.
    leaves: Vec<usize>,
    /// Workers, ascending.
    ranks: Vec<usize>,
    /// The one that adds it up: one that has a part of it, and not always the first.
    owner: usize,
}

impl Share {
    /// Of `batch`, in the micro-batches that all workers together make of it.
    pub(crate) fn new(
        batch: &Batch,
        config: &TrainConfig,
        spec: Option<&BlockSpec>,
        (rank, world_size): (usize, usize),
    ) -> Self {
        let TrainConfig { micro_batch, subtree, .. } = *config;
        let leaves = Leaves { n: batch.n_sequences().div_ceil(micro_batch), world_size };
        let mut by_block: BTreeMap<ClusterId, Vec<usize>> = BTreeMap::new();
        if let Some(spec) = spec {
            for (leaf, paths) in batch.paths.chunks(micro_batch).enumerate() {
                let ids = unique_ids(&taken(paths, subtree), spec);
                ids.into_iter().for_each(|id| by_block.entry(id).or_default().push(leaf));
            }
        }
        let touched = |(id, of_block): (ClusterId, Vec<usize>)| {
            let mut ranks: Vec<usize> = of_block.iter().map(|&leaf| leaves.rank_of(leaf)).collect();
            ranks.dedup();
            let owner = ranks[(id.index as usize + usize::from(id.level)) % ranks.len()];
            (id, Touched { leaves: of_block, ranks, owner })
        };
        let touched = by_block.into_iter().map(touched).collect();
        Self { leaves, rank, micro_batch, subtree, spec: spec.cloned(), most_at_once: AT_ONCE, touched }
    }

    /// All micro-batches.
    pub(crate) fn all_leaves(&self) -> Leaves {
        self.leaves
    }

    /// This worker's micro-batches.
    pub(crate) fn leaves(&self) -> Range<usize> {
        self.leaves.of(self.rank)
    }

    /// This worker's sequences.
    pub(crate) fn sequences(&self, batch: &Batch) -> Range<usize> {
        let leaves = self.leaves();
        let n = batch.n_sequences();
        (leaves.start * self.micro_batch).min(n)..(leaves.end * self.micro_batch).min(n)
    }

    /// The blocks that this worker's sequences fetch.
    pub(crate) fn ids(&self, batch: &Batch) -> Vec<ClusterId> {
        match &self.spec {
            Some(spec) => unique_ids(&taken(&batch.paths[self.sequences(batch)], self.subtree), spec),
            None => vec![],
        }
    }

    /// The blocks that the step touches, each with the number of workers that do.
    pub(crate) fn touched(&self) -> impl Iterator<Item = (ClusterId, usize)> {
        self.touched.iter().map(|(&id, touched)| (id, touched.ranks.len()))
    }

    /// Blocks that the step touches, on all workers.
    pub(crate) fn n_blocks(&self) -> usize {
        self.touched.len()
    }

    /// A sum over micro-batches, to be fed with this worker's.
    pub(crate) fn sum<T>(&self) -> TreeSum<T> {
        TreeSum::new(self.leaves.n, self.leaves())
    }

    /// The loss of the step, and whether any worker is told to stop: all stop after the same step.
    pub(crate) fn reduce_loss(
        &self,
        mesh: &mut Mesh,
        step: u64,
        losses: &[f64],
        stop: bool,
    ) -> Result<(f64, bool)> {
        let told = [&[f64::from(u8::from(stop))], losses].concat();
        let gathered = mesh.all_gather(&Call::new("losses", step), bytes_of(&told))?;
        let stop = gathered.iter().any(|bytes| f64s(bytes).first() != Some(&0.0));
        // In the order of micro-batches, which is that of ranks.
        let losses = gathered.iter().flat_map(|bytes| f64s(bytes).into_iter().skip(1));
        Ok((losses.fold(0.0, |sum, loss| sum + loss), stop))
    }

    /// The gradients of the step's blocks that this worker hands to the bank: those that it adds up, and all
    /// of those whose level is `replicated`, which every worker keeps itself. And the L2 norm of all of them.
    pub(crate) fn reduce_blocks(
        &self,
        mesh: &mut Mesh,
        step: u64,
        parts: BTreeMap<ClusterId, Vec<Vec<f32>>>,
        replicated: &[bool],
    ) -> Result<(Vec<Block>, f64)> {
        let own = self.add_up_blocks(mesh, step, parts)?;
        let norm = self.norm(mesh, step, &own)?;
        Ok((self.share_replicated(mesh, step, own, replicated)?, norm))
    }

    /// The blocks that this worker adds up, of its own parts and those that others send it.
    fn add_up_blocks(
        &self,
        mesh: &mut Mesh,
        step: u64,
        mut parts: BTreeMap<ClusterId, Vec<Vec<f32>>>,
    ) -> Result<Vec<Block>> {
        let call = Call::new("block gradients", step);
        let mut own = vec![];
        for ids in self.pieces(|_, touched| Some(touched.ranks.len() - 1)) {
            let mut messages: Vec<Vec<f32>> = vec![vec![]; mesh.world_size()];
            for id in ids.iter().filter(|id| self.touched[id].owner != self.rank) {
                let mine = parts.remove(id).unwrap_or_default();
                messages[self.touched[id].owner].extend(mine.into_iter().flatten());
            }
            let messages = messages.iter().map(|values| bytes_of(values)).collect();
            let received = mesh.exchange(&call, messages)?;
            let mut received = Numbers::of(&call, &received);
            for id in ids.into_iter().filter(|id| self.touched[id].owner == self.rank) {
                let mine = parts.remove(&id).unwrap_or_default();
                own.extend(self.add_up(id, mine, &mut received)?);
            }
        }
        Ok(own)
    }

    /// One block, of this worker's parts and those that others have sent.
    fn add_up(&self, id: ClusterId, mine: Vec<Vec<f32>>, received: &mut [Numbers]) -> Result<Option<Block>> {
        let Touched { leaves, ranks, .. } = &self.touched[&id];
        let mut mine = mine.into_iter();
        let mut sum = TreeSum::new(self.leaves.n, 0..self.leaves.n);
        for &rank in ranks {
            for range in self.part_ranges(rank, leaves) {
                let values = match rank == self.rank {
                    true => mine.next().unwrap_or_default(),
                    false => received[rank].take(self.len(id))?,
                };
                sum.push_array(range, values);
            }
        }
        Ok(sum.finish_arrays().pop().map(|(_, values)| Block { id, values }))
    }

    /// The step's blocks in the order of ids, as many at a time as may be sent at once; all workers know the same
    /// pieces. `sent` tells how often a block is sent, or that it is none of them.
    fn pieces(&self, sent: impl Fn(ClusterId, &Touched) -> Option<usize>) -> Vec<Vec<ClusterId>> {
        let (mut pieces, mut piece, mut len) = (vec![], vec![], 0);
        for (&id, touched) in &self.touched {
            let Some(times) = sent(id, touched) else { continue };
            piece.push(id);
            len += times * self.len(id);
            if len >= self.most_at_once {
                pieces.push(std::mem::take(&mut piece));
                len = 0;
            }
        }
        pieces.extend((!piece.is_empty()).then_some(piece));
        pieces
    }

    /// √Σ g² over all blocks, added up in the order of ids.
    fn norm(&self, mesh: &mut Mesh, step: u64, own: &[Block]) -> Result<f64> {
        let squares: Vec<f64> = own.par_iter().map(|block| squared_norm(&block.values)).collect();
        let gathered = mesh.all_gather(&Call::new("block norms", step), bytes_of(&squares))?;
        let mut by_rank: Vec<_> = gathered.iter().map(|bytes| f64s(bytes).into_iter()).collect();
        let in_order = self.touched.values().filter_map(|touched| by_rank[touched.owner].next());
        // `sum` of nothing is -0.
        Ok(in_order.fold(0.0, |sum, x| sum + x).sqrt())
    }

    /// Adds to a worker's blocks those of replicated levels that others have added up.
    fn share_replicated(
        &self,
        mesh: &mut Mesh,
        step: u64,
        own: Vec<Block>,
        replicated: &[bool],
    ) -> Result<Vec<Block>> {
        let is_replicated = |id: ClusterId| replicated.get(usize::from(id.level)) == Some(&true);
        if mesh.world_size() == 1 {
            return Ok(own);
        }
        let call = Call::new("replicated blocks", step);
        let mut all = vec![];
        for ids in self.pieces(|id, _| is_replicated(id).then_some(1)) {
            let is_mine = |id: &&ClusterId| self.touched[id].owner == self.rank;
            let find = |id: &ClusterId| own.binary_search_by_key(id, |block| block.id).ok();
            let mine = ids.iter().filter(is_mine).filter_map(find).flat_map(|place| &own[place].values);
            let gathered = mesh.all_gather(&call, bytes_of(&mine.copied().collect::<Vec<f32>>()))?;
            let mut gathered = Numbers::of(&call, &gathered);
            for id in ids {
                let owner = self.touched[&id].owner;
                if owner != self.rank {
                    all.push(Block { id, values: gathered[owner].take(self.len(id))? });
                }
            }
        }
        all.extend(own);
        all.sort_unstable_by_key(|block| block.id);
        Ok(all)
    }

    /// Numbers of a block.
    fn len(&self, id: ClusterId) -> usize {
        self.spec.as_ref().map_or(0, |spec| spec.block_len(usize::from(id.level)))
    }

    /// The leaves of each part that a worker has of a block's gradient.
    fn part_ranges(&self, rank: usize, touched: &[usize]) -> Vec<Range<usize>> {
        let own = self.leaves.of(rank);
        let leaves = touched.iter().copied().filter(|leaf| own.contains(leaf));
        TreeSum::<()>::ranges(self.leaves.n, own.clone(), leaves)
    }
}

/// The paths of a subtree.
fn taken(paths: &[ClusterPath], subtree: Option<Subtree>) -> Cow<'_, [ClusterPath]> {
    match subtree {
        Some(subtree) => paths.iter().filter(|path| subtree.has(path)).cloned().collect(),
        None => paths.into(),
    }
}

/// What a worker sent, to be taken apart.
struct Numbers<'a> {
    rank: usize,
    call: &'a Call,
    whole: &'a [u8],
    rest: &'a [u8],
}

impl<'a> Numbers<'a> {
    /// Of each rank.
    fn of(call: &'a Call, messages: &'a [Bytes]) -> Vec<Self> {
        let numbers = |(rank, bytes): (usize, &'a Bytes)| Self { rank, call, whole: bytes, rest: bytes };
        messages.iter().enumerate().map(numbers).collect()
    }

    fn take(&mut self, n: usize) -> collective::Result<Vec<f32>> {
        let n_bytes = n * size_of::<f32>();
        let Some((values, rest)) = self.rest.split_at_checked(n_bytes) else {
            let expected = self.whole.len() - self.rest.len() + n_bytes;
            let (rank, call, found) = (self.rank, self.call.clone(), self.whole.len());
            return Err(collective::Error::Length { rank, call, expected, found });
        };
        self.rest = rest;
        Ok(bytemuck::pod_collect_to_vec(values))
    }
}

fn f64s(bytes: &[u8]) -> Vec<f64> {
    bytemuck::pod_collect_to_vec(bytes)
}

/// Numbers as they are in memory, in little-endian.
fn bytes_of(values: &[impl bytemuck::NoUninit]) -> Bytes {
    Bytes::copy_from_slice(bytemuck::cast_slice(values))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use cluster_tree::ClusterPath;
    use collective::local;

    use super::*;

    /// What each worker hands to its bank and the norm, of blocks sent `most_at_once` numbers at a time.
    fn reduced(world_size: usize, most_at_once: usize, replicated: [bool; 2]) -> Vec<(Vec<Block>, f64)> {
        let spec = BlockSpec::ffn(1, 2, vec![2, 1], vec![2, 2]);
        let path = |leaf: u32| ClusterPath::new(vec![leaf / 2, leaf]).unwrap();
        let paths = [0, 0, 0, 1, 1, 2, 3, 3].map(path).to_vec();
        let batch = Batch { paths, ..Batch::default() };
        let config = TrainConfig { micro_batch: 1, ..TrainConfig::default() };
        let work = |mut mesh: Mesh| {
            let place = (mesh.rank(), world_size);
            let share = Share { most_at_once, ..Share::new(&batch, &config, Some(&spec), place) };
            let mut parts = BTreeMap::new();
            for leaf in share.leaves() {
                for id in batch.paths[leaf].ids() {
                    let value = |i: usize| ((leaf * 31 + i * 17 + id.index as usize) % 23) as f32 / 7.0;
                    let values = (0..share.len(id)).map(value).collect();
                    let sum: &mut TreeSum<Vec<f32>> = parts.entry(id).or_insert_with(|| share.sum());
                    sum.push_array(leaf..leaf + 1, values);
                }
            }
            let arrays = |sum: TreeSum<Vec<f32>>| sum.finish_arrays().into_iter().map(|(_, values)| values);
            let parts = parts.into_iter().map(|(id, sum)| (id, arrays(sum).collect())).collect();
            share.reduce_blocks(&mut mesh, 1, parts, &replicated).unwrap()
        };
        std::thread::scope(|scope| {
            let meshes = local(world_size, Duration::from_secs(60));
            let threads: Vec<_> = meshes.into_iter().map(|mesh| scope.spawn(|| work(mesh))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn blocks_are_the_same_however_many_are_sent_at_once() {
        let (one, norm) = reduced(1, usize::MAX, [true; 2]).pop().unwrap();
        assert_eq!(one.len(), 6);
        for most_at_once in [1, 13, usize::MAX] {
            for (blocks, found) in reduced(3, most_at_once, [true; 2]) {
                assert_eq!((&blocks, found), (&one, norm), "{most_at_once}");
            }
            let mut all: Vec<Block> =
                reduced(3, most_at_once, [false; 2]).into_iter().flat_map(|(blocks, _)| blocks).collect();
            all.sort_by_key(|block| block.id);
            assert_eq!(all, one, "{most_at_once}");
        }
    }
}
