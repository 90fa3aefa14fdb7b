use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};
use std::time::{Duration, Instant};

use cluster_tree::ClusterId;
use rayon::prelude::*;
use tokio::sync::watch;

use crate::{
    Array, BlockSpec, Error, Gradients, Offload, Placement, Result, Shard, Snapshot, Step, Update, init_block,
};

/// A shard that many requests share: readers beside each other, one push at a time, and those who
/// wait for a step woken by the push that completes it.
///
/// Its functions run on the calling thread, some for long: a runtime calls them on its threads for
/// blocking work.
pub struct Live {
    spec: Arc<BlockSpec>,
    placement: Placement,
    shard: RwLock<Shard>,
    /// Where rows go beyond a part of memory.
    offload: Option<Offload>,
    /// Follows the shard's applied step, for those who wait for it.
    applied: watch::Sender<Step>,
}

/// What a push has set off.
#[derive(Copy, Clone, PartialEq, Debug)]
pub struct Pushed {
    /// The last step applied.
    pub applied: Step,
    /// Blocks that were updated by it: none until a step is complete.
    pub n_updates: usize,
    /// How long the updates took, with the reading and writing of rows that are offloaded.
    pub updating: Duration,
}

/// A block's weights, shared, with the number of its updates; none when they were not asked for.
pub type Versioned = (u64, Option<Arc<Vec<f32>>>);

impl Live {
    /// Takes over a shard, whose rows stay in memory.
    pub fn new(shard: Shard) -> Self {
        Self::offloaded(shard, None)
    }

    /// Takes over a shard, whose rows are in memory as far as `offload` lets them.
    pub fn offloaded(shard: Shard, offload: Option<Offload>) -> Self {
        let (spec, placement) = (Arc::new(shard.spec().clone()), shard.options().placement);
        let applied = watch::Sender::new(shard.applied());
        Self { spec, placement, shard: RwLock::new(shard), offload, applied }
    }

    /// Where rows go that are not in memory.
    pub fn offload(&self) -> Option<&Offload> {
        self.offload.as_ref()
    }

    /// The sizes of the blocks.
    pub fn spec(&self) -> &Arc<BlockSpec> {
        &self.spec
    }

    /// The part of the bank that the shard owns.
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// The last step applied.
    pub fn applied(&self) -> Step {
        *self.applied.borrow()
    }

    /// Waits until a step has been applied.
    pub async fn reached(&self, after: Step) -> Result<()> {
        let mut applied = self.applied.subscribe();
        applied.wait_for(|&applied| applied >= after).await.map(|_| ()).map_err(|_| Error::Unfinished)
    }

    /// The weights of these blocks, shared with the shard where they are in memory. Fails on a block that it
    /// does not own, and as [`Array::read`].
    pub fn fetch(&self, ids: &[ClusterId]) -> Result<Vec<Arc<Vec<f32>>>> {
        let (seed, found) = {
            let shard = self.read()?;
            let found = ids.iter().map(|&id| shard.values(id)).collect::<Result<Vec<_>>>()?;
            (shard.options().seed, found)
        };
        let values = |(&id, found): (&ClusterId, Option<Array>)| match found {
            Some(values) => values.read(),
            None => Ok(Arc::new(init_block(&self.spec, seed, id))),
        };
        ids.par_iter().zip(found).map(values).collect()
    }

    /// As [`Live::fetch`], with the number of each block's updates; of a block of which the caller holds what it
    /// was after as many (`held`, in the order of `ids`) nothing but the number.
    pub fn fetch_changed(&self, ids: &[ClusterId], held: &[Option<u64>]) -> Result<Vec<Versioned>> {
        let (seed, found) = {
            let shard = self.read()?;
            let found = ids.iter().map(|&id| shard.versioned(id)).collect::<Result<Vec<_>>>()?;
            (shard.options().seed, found)
        };
        let values = |id: ClusterId, held: Option<u64>, version: u64, found: Option<Array>| {
            let values = match found {
                _ if held == Some(version) => None,
                Some(values) => Some(values.read()?),
                None => Some(Arc::new(init_block(&self.spec, seed, id))),
            };
            Ok((version, values))
        };
        let asked = ids.par_iter().zip(held).zip(found);
        asked.map(|((&id, &held), (version, found))| values(id, held, version, found)).collect()
    }

    /// As [`Live::fetch`], if it needs neither wait for an update or a disk nor compute: `None` otherwise.
    pub fn fetch_at_once(&self, ids: &[ClusterId]) -> Result<Option<Vec<Arc<Vec<f32>>>>> {
        let in_memory = |values: Option<Array>| values.and_then(|values| values.in_memory().cloned());
        match self.shard.try_read() {
            Ok(shard) => ids.iter().map(|&id| shard.values(id).map(in_memory)).collect(),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Poisoned(_)) => Err(Error::Unfinished),
        }
    }

    /// Hands over one rank's gradients of a step; see [`Shard::push`]. The updates of a step run on
    /// all threads of the pool that this is called on. Fails when the rows of a step do not fit the memory
    /// that they may take, and when a disk does, as one that is full: the step can be tried again.
    pub fn push(&self, step: Step, rank: usize, gradients: Gradients) -> Result<Pushed> {
        let mut shard = self.write()?;
        shard.take(step, rank, gradients)?;
        let (mut n_updates, start) = (0, Instant::now());
        while let Some(ids) = shard.next_updates() {
            if let Some(offload) = &self.offload {
                offload.make_room(&mut shard, &ids)?;
            }
            shard.apply(&mut |updates| updates.into_par_iter().for_each(Update::run))?;
            n_updates += ids.len();
            self.applied.send_replace(shard.applied());
        }
        Ok(Pushed { applied: shard.applied(), n_updates, updating: start.elapsed() })
    }

    /// Forgets pushes that wait for others: see [`Shard::forget_pending`].
    pub fn forget_pending(&self) -> Result<()> {
        self.write().map(|mut shard| shard.forget_pending())
    }

    /// The blocks updated after `since`, as they are after `step`: they take no copy, and the next
    /// steps may be applied beside whoever reads them. Fails when the shard is at another step.
    pub fn snapshot(&self, step: Step, since: Step) -> Result<Snapshot> {
        let shard = self.read()?;
        match shard.applied() {
            applied if applied == step => Ok(shard.snapshot(since)),
            applied => Err(Error::SaveStep { expected: step, applied }),
        }
    }

    /// What `look` sees of the shard, which no push changes meanwhile.
    pub fn with<T>(&self, look: impl FnOnce(&Shard) -> T) -> Result<T> {
        self.read().map(|shard| look(&shard))
    }

    /// Puts another shard of the same spec and part in its place, as after a restore; pushes that waited
    /// for others are gone. Fails on another spec or part.
    pub fn replace(&self, shard: Shard) -> Result<()> {
        if shard.spec() != &*self.spec {
            let (expected, found) = (format!("{:?}", self.spec), format!("{:?}", shard.spec()));
            return Err(Error::Setting { field: "spec", expected, found });
        }
        if shard.options().placement != self.placement {
            let (expected, found) =
                (format!("{:?}", self.placement), format!("{:?}", shard.options().placement));
            return Err(Error::Setting { field: "placement", expected, found });
        }
        // What an unfinished update left behind is replaced too.
        let mut place = self.shard.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.applied.send_replace(shard.applied());
        *place = shard;
        drop(place);
        self.shard.clear_poison();
        Ok(())
    }

    fn read(&self) -> Result<RwLockReadGuard<'_, Shard>> {
        self.shard.read().map_err(|_| Error::Unfinished)
    }

    fn write(&self) -> Result<RwLockWriteGuard<'_, Shard>> {
        self.shard.write().map_err(|_| Error::Unfinished)
    }
}
