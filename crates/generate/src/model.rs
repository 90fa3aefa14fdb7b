use anchor::{Anchor, FetchedMemory, unique_ids};
use cluster_tree::ClusterPath;
use memory_bank::{Block, BlockStore, Blocking, Step};

use crate::{Error, Result};

/// An anchor with the bank it was trained with.
pub struct Model<'a, S> {
    /// The decoder.
    pub anchor: &'a Anchor,
    /// Its memory bank, if it has one.
    pub bank: Option<&'a Blocking<S>>,
    /// The training step whose blocks are fetched.
    pub step: Step,
}

impl<S: BlockStore> Model<'_, S> {
    /// The unique blocks of `paths`; none without a bank.
    ///
    /// # Errors
    /// Those of the bank.
    pub fn fetch(&self, paths: &[ClusterPath]) -> Result<Vec<Block>> {
        match self.bank {
            Some(bank) => Ok(bank.fetch(self.step, &unique_ids(paths, bank.store().spec()))?),
            None => Ok(vec![]),
        }
    }

    /// Fetched blocks as the memory of sequences that follow `paths`; no memory without a bank.
    ///
    /// # Errors
    /// When a block that a path needs is not in `blocks`.
    pub fn place(&self, blocks: &[Block], paths: &[ClusterPath]) -> Result<FetchedMemory> {
        let Some(bank) = self.bank else { return Ok(FetchedMemory::none()) };
        let place = (self.anchor.device(), self.anchor.dtype());
        Ok(FetchedMemory::to_device(blocks, paths, bank.store().spec(), place)?)
    }

    /// The memory of a batch to be read, not trained: one path a sequence, or no path at all for the plain
    /// anchor.
    ///
    /// # Errors
    /// When only some sequences have a path, or there is no bank to fetch from.
    pub fn memory(&self, paths: &[Option<ClusterPath>]) -> Result<FetchedMemory> {
        let with: Vec<ClusterPath> = paths.iter().flatten().cloned().collect();
        match (with.len(), self.bank) {
            (0, _) => Ok(FetchedMemory::none()),
            (_, None) => Err(Error::NoBank { path: with[0].to_string() }),
            (n, _) if n < paths.len() => Err(Error::Mixed { with: n, without: paths.len() - n }),
            (_, Some(bank)) => {
                let blocks = bank.read(self.step, &unique_ids(&with, bank.store().spec()))?;
                Ok(self.place(&blocks, &with)?.freeze())
            }
        }
    }
}
