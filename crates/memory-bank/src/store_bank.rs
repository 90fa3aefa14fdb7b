use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use cluster_tree::ClusterId;
use futures::future::try_join_all;
use futures::stream::TryStreamExt;
use rayon::prelude::*;

use crate::blocking::blocking;
use crate::checkpoint::{Column, Entry};
use crate::write::as_bytes;
use crate::{Block, BlockSpec, BlockStore, Checkpoint, Error, Result, Step, init_block};

/// A saved bank, fetched from where it lies by ranged reads, each block checked. A clone is another
/// handle. It keeps nothing: what is asked for twice is read twice.
#[derive(Clone)]
pub struct StoreBank(Checkpoint);

impl StoreBank {
    /// The bank of a checkpoint.
    pub fn new(checkpoint: Checkpoint) -> Self {
        Self(checkpoint)
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.0
    }

    /// The weights of these blocks, in their order, f32 in little-endian.
    pub async fn fetch_bytes(&self, ids: &[ClusterId]) -> Result<Vec<Bytes>> {
        let (mut stored, mut initial) = (BTreeMap::<usize, Vec<Entry>>::new(), Vec::new());
        for &id in ids.iter().collect::<BTreeSet<_>>() {
            match self.0.find(id)? {
                Some(entry) => stored.entry(usize::from(id.level)).or_default().push(entry),
                None => initial.push(id),
            }
        }
        let levels = stored.into_iter().map(|(level, entries)| self.clone().level(level, entries));
        let mut found: BTreeMap<ClusterId, Bytes> =
            try_join_all(levels.collect::<Vec<_>>()).await?.into_iter().flatten().collect();
        if !initial.is_empty() {
            let this = self.clone();
            found.extend(blocking(move || Ok(this.initial(&initial))).await?);
        }
        Ok(ids.iter().map(|id| found[id].clone()).collect())
    }

    /// Blocks of a level that are in the files.
    async fn level(self, level: usize, mut entries: Vec<Entry>) -> Result<Vec<(ClusterId, Bytes)>> {
        entries.sort_by_key(|entry| (entry.segment, entry.place));
        let column = Column { level, tensor: 0 };
        let read = self.0.read(Arc::clone(self.0.values()), column, entries.clone());
        let blocks = read.try_collect::<Vec<_>>().await?.into_iter().flatten();
        Ok(entries.iter().map(|entry| self.0.id(level, entry)).zip(blocks).collect())
    }

    /// Blocks that were never updated.
    fn initial(&self, ids: &[ClusterId]) -> Vec<(ClusterId, Bytes)> {
        let manifest = self.0.manifest();
        let block = |&id: &ClusterId| {
            let values = init_block(&manifest.spec, manifest.seed, id);
            (id, as_bytes(Arc::new(values)))
        };
        ids.par_iter().map(block).collect()
    }

    fn read_only(&self, action: &'static str, step: Step) -> Error {
        Error::ReadOnly { action, step, applied: self.0.step() }
    }
}

impl BlockStore for StoreBank {
    fn spec(&self) -> &BlockSpec {
        self.0.spec()
    }

    async fn fetch(&self, after: Step, ids: &[ClusterId]) -> Result<Vec<Block>> {
        ids.iter().try_for_each(|&id| self.spec().check(id))?;
        let applied = self.0.step();
        if after > applied {
            return Err(Error::NotReached { after, applied });
        }
        let found = self.fetch_bytes(ids).await?;
        let block =
            |(&id, bytes): (&ClusterId, Bytes)| Block { id, values: bytemuck::pod_collect_to_vec(&bytes) };
        Ok(ids.iter().zip(found).map(block).collect())
    }

    async fn push(&self, step: Step, _rank: usize, _grads: Vec<Block>) -> Result<()> {
        Err(self.read_only("push", step))
    }

    async fn save(&self, step: Step) -> Result<()> {
        Err(self.read_only("save", step))
    }
}
