//! A step shared among workers, and its gradients summed over all of them.
//!
//! Every worker knows the whole batch, so it knows which micro-batches each worker has, which blocks these
//! touch, and what each worker sends to whom: nothing but numbers is sent. The gradient of a block is added
//! up by one of the workers that have a part of it, who pushes it, once.

use std::collections::BTreeMap;
use std::ops::Range;

use anchor::{Gradients, unique_ids};
use bytes::Bytes;
use cluster_tree::ClusterId;
use collective::{Call, Leaves, Mesh, TreeSum};
use corpus::Batch;
use memory_bank::{Block, BlockSpec, squared_norm};
use rayon::prelude::*;

use crate::Result;

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
    spec: Option<BlockSpec>,
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
        micro_batch: usize,
        spec: Option<&BlockSpec>,
        (rank, world_size): (usize, usize),
    ) -> Self {
        let leaves = Leaves { n: batch.n_sequences().div_ceil(micro_batch), world_size };
        let mut by_block: BTreeMap<ClusterId, Vec<usize>> = BTreeMap::new();
        if let Some(spec) = spec {
            for (leaf, paths) in batch.paths.chunks(micro_batch).enumerate() {
                unique_ids(paths, spec).into_iter().for_each(|id| by_block.entry(id).or_default().push(leaf));
            }
        }
        let touched = |(id, of_block): (ClusterId, Vec<usize>)| {
            let mut ranks: Vec<usize> = of_block.iter().map(|&leaf| leaves.rank_of(leaf)).collect();
            ranks.dedup();
            let owner = ranks[(id.index as usize + usize::from(id.level)) % ranks.len()];
            (id, Touched { leaves: of_block, ranks, owner })
        };
        let touched = by_block.into_iter().map(touched).collect();
        Self { leaves, rank, micro_batch, spec: spec.cloned(), touched }
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
            Some(spec) => unique_ids(&batch.paths[self.sequences(batch)], spec),
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
        let mut messages: Vec<Vec<f32>> = vec![vec![]; mesh.world_size()];
        for (&id, touched) in self.touched.iter().filter(|(_, touched)| touched.owner != self.rank) {
            messages[touched.owner].extend(parts.get(&id).into_iter().flatten().flatten());
        }
        let call = Call::new("block gradients", step);
        let messages = messages.iter().map(|values| bytes_of(values)).collect();
        let received = mesh.exchange(&call, messages)?;
        let mut received = Numbers::of(&call, &received);
        let mut own = vec![];
        for (&id, touched) in self.touched.iter().filter(|(_, touched)| touched.owner == self.rank) {
            let mut mine = parts.remove(&id).unwrap_or_default().into_iter();
            let mut sum = TreeSum::new(self.leaves.n, 0..self.leaves.n);
            for &rank in &touched.ranks {
                for range in self.part_ranges(rank, &touched.leaves) {
                    let values = match rank == self.rank {
                        true => mine.next().unwrap_or_default(),
                        false => received[rank].take(self.len(id))?,
                    };
                    sum.push_array(range, values);
                }
            }
            own.extend(sum.finish_arrays().into_iter().map(|(_, values)| Block { id, values }));
        }
        Ok(own)
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
        if mesh.world_size() == 1 || !self.touched.keys().any(|&id| is_replicated(id)) {
            return Ok(own);
        }
        let mine = own.iter().filter(|block| is_replicated(block.id));
        let mine: Vec<f32> = mine.flat_map(|block| &block.values).copied().collect();
        let call = Call::new("replicated blocks", step);
        let gathered = mesh.all_gather(&call, bytes_of(&mine))?;
        let mut gathered = Numbers::of(&call, &gathered);
        let mut all = own;
        for (&id, touched) in self.touched.iter().filter(|&(&id, _)| is_replicated(id)) {
            if touched.owner != self.rank {
                all.push(Block { id, values: gathered[touched.owner].take(self.len(id))? });
            }
        }
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
