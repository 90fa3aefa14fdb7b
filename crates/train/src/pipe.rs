use std::collections::{BTreeMap, VecDeque};

use cluster_tree::ClusterId;
use memory_bank::{Block, BlockStore, Blocking, Pending, Step};

use crate::Result;

/// Blocks on their way from and to the bank while the worker computes: those of the next step are fetched
/// ahead, since data says which they are, and gradients are pushed behind.
///
/// The blocks of step t are those after step t - 1 - `staleness`, or later: 0 is exactly synchronous, and
/// leaves the time of the anchor's update to hide a fetch in; 1 hides it behind a whole step.
pub struct MemoryPipe<S> {
    bank: Blocking<S>,
    staleness: u64,
    /// By step.
    fetching: BTreeMap<u64, Pending<Vec<Block>>>,
    pushing: VecDeque<Pending<()>>,
}

impl<S: BlockStore> MemoryPipe<S> {
    /// Of a bank from which nothing has been asked yet.
    pub fn new(bank: Blocking<S>, staleness: u64) -> Self {
        Self { bank, staleness, fetching: BTreeMap::new(), pushing: VecDeque::new() }
    }

    /// The bank itself.
    pub fn bank(&self) -> &Blocking<S> {
        &self.bank
    }

    /// Steps by which blocks may be behind.
    pub fn staleness(&self) -> u64 {
        self.staleness
    }

    /// Begins to fetch the blocks of a step, unless they are on their way. Their gradients up to step - 1 -
    /// staleness are pushed, or on their way too.
    pub fn begin_fetch(&mut self, step: u64, ids: impl FnOnce() -> Vec<ClusterId>) {
        let after = Step(step.saturating_sub(1 + self.staleness));
        self.fetching.entry(step).or_insert_with(|| self.bank.begin_fetch(after, ids()));
    }

    /// The blocks of a step, fetched now unless they are on their way; `check` is asked whether they may still
    /// come.
    ///
    /// # Errors
    /// Those of the bank, also for an earlier push, and that of `check`.
    pub fn blocks(
        &mut self,
        step: u64,
        ids: impl FnOnce() -> Vec<ClusterId>,
        mut check: impl FnMut() -> Result<()>,
    ) -> Result<Vec<Block>> {
        self.begin_fetch(step, ids);
        let Some(pending) = self.fetching.remove(&step) else { return Ok(vec![]) };
        self.bank.finish(pending, || {
            // The fetch would wait for the step of a push that has failed.
            while let Some(ended) = self.pushing.front_mut().and_then(Pending::ended) {
                self.pushing.pop_front();
                ended?;
            }
            check()
        })
    }

    /// Begins to push the gradients of a step; waits for those of earlier ones, so that at most `staleness`
    /// and this one are under way.
    ///
    /// # Errors
    /// Those of the bank, also for an earlier push, and that of `check`.
    pub fn push(
        &mut self,
        step: u64,
        rank: usize,
        gradients: Vec<Block>,
        mut check: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        while self.pushing.len() > self.staleness as usize {
            self.one_is_pushed(&mut check)?;
        }
        self.pushing.push_back(self.bank.begin_push(Step(step), rank, gradients));
        Ok(())
    }

    /// Waits until everything pushed has arrived.
    ///
    /// # Errors
    /// Those of the bank, and that of `check`.
    pub fn settle(&mut self, mut check: impl FnMut() -> Result<()>) -> Result<()> {
        while !self.pushing.is_empty() {
            self.one_is_pushed(&mut check)?;
        }
        Ok(())
    }

    /// Waits until the bank has applied a step, of all workers: what is fetched after it comes at once.
    ///
    /// # Errors
    /// Those of the bank, and that of `check`.
    pub fn reach(&mut self, step: u64, mut check: impl FnMut() -> Result<()>) -> Result<()> {
        self.settle(&mut check)?;
        self.bank.finish(self.bank.begin_fetch(Step(step), vec![]), check).map(|_| ())
    }

    /// Saves the bank as it is after a step.
    ///
    /// # Errors
    /// Those of the bank, and that of `check`.
    pub fn save(&mut self, step: u64, check: impl FnMut() -> Result<()>) -> Result<()> {
        self.bank.finish(self.bank.begin_save(Step(step)), check)
    }

    fn one_is_pushed(&mut self, check: impl FnMut() -> Result<()>) -> Result<()> {
        match self.pushing.pop_front() {
            Some(pending) => self.bank.finish(pending, check),
            None => Ok(()),
        }
    }
}
