use std::future::Future;
use std::sync::Arc;

use cluster_tree::ClusterId;
use half::bf16;

use crate::blocking::blocking;
use crate::schedule::setting;
use crate::{Block, BlockSpec, BlockStore, Gradients, Live, Placement, Result, Shard, Step, Traffic, Values};

/// A worker's view of a bank in shards, of which it keeps the coarse levels itself.
///
/// Every context fetches a block of the coarse levels, and nearly all of them are updated in every step: a
/// copy that sees all of their gradients makes the same updates, to the bit, and nothing of them is fetched.
/// The shards see the gradients too, each from one of the workers, so that they alone have the bank's
/// checkpoints and no placement shows in them.
pub struct Replicated<S> {
    shards: S,
    copy: Arc<Live>,
    /// By level: whether it is kept here.
    levels: Vec<bool>,
    /// Whether gradients reach the shards as bf16: the copy takes the same numbers.
    rounds: bool,
    /// Of this worker, and of all.
    rank: usize,
    world_size: usize,
}

impl<S: BlockStore> Replicated<S> {
    /// Of `shards`, with a `copy` that holds the blocks of `levels` as they are at the shards' step; `rounds`
    /// says that gradients go to the shards as bf16. Fails on another spec or number of levels, and on a copy
    /// of less than the whole bank or of several ranks.
    pub fn new(
        shards: S,
        copy: Shard,
        (levels, rounds): (Vec<bool>, bool),
        (rank, world_size): (usize, usize),
    ) -> Result<Self> {
        let spec = shards.spec();
        if copy.spec() != spec {
            return Err(setting("spec", &format!("{spec:?}"), format!("{:?}", copy.spec())));
        }
        if levels.len() != spec.n_levels() {
            return Err(setting("levels", &format!("{} of them", spec.n_levels()), levels.len()));
        }
        let options = copy.options();
        if (options.placement, options.world_size) != (Placement::WHOLE, 1) {
            let found = format!("{:?} of {} ranks", options.placement, options.world_size);
            return Err(setting("copy", "a whole bank of one rank", found));
        }
        Ok(Self { shards, copy: Arc::new(Live::new(copy)), levels, rounds, rank, world_size })
    }

    /// The bank itself.
    pub fn shards(&self) -> &S {
        &self.shards
    }

    fn is_here(&self, id: ClusterId) -> bool {
        self.levels.get(usize::from(id.level)) == Some(&true)
    }

    /// Whether this worker is the one that hands the block's gradients to the shards.
    fn speaks_for(&self, id: ClusterId) -> bool {
        id.index as usize % self.world_size == self.rank
    }
}

impl<S: BlockStore> Replicated<S> {
    /// The blocks that are kept here from here, and the others as `ask` has them from the shards.
    async fn gather<F>(
        &self,
        after: Step,
        ids: &[ClusterId],
        ask: impl FnOnce(Vec<ClusterId>) -> F + Send,
    ) -> Result<Vec<Block>>
    where
        F: Future<Output = Result<Vec<Block>>> + Send,
    {
        let (here, there): (Vec<ClusterId>, Vec<ClusterId>) = ids.iter().partition(|&&id| self.is_here(id));
        let own = async {
            self.copy.reached(after).await?;
            let copy = Arc::clone(&self.copy);
            blocking(move || Ok(here.iter().copied().zip(copy.fetch(&here)?).collect::<Vec<_>>())).await
        };
        // The shards are asked even for nothing: what is pushed next would else come too early for them.
        let (own, fetched) = futures::future::try_join(own, ask(there)).await?;
        let (mut own, mut fetched) = (own.into_iter(), fetched.into_iter());
        let block = |&id: &ClusterId| match self.is_here(id) {
            true => own.next().map(|(id, values)| Block { id, values: values.to_vec() }),
            false => fetched.next(),
        };
        Ok(ids.iter().filter_map(block).collect())
    }
}

impl<S: BlockStore> BlockStore for Replicated<S> {
    fn spec(&self) -> &BlockSpec {
        self.shards.spec()
    }

    async fn fetch(&self, after: Step, ids: &[ClusterId]) -> Result<Vec<Block>> {
        self.gather(after, ids, |there| async move { self.shards.fetch(after, &there).await }).await
    }

    async fn read(&self, after: Step, ids: &[ClusterId]) -> Result<Vec<Block>> {
        self.gather(after, ids, |there| async move { self.shards.read(after, &there).await }).await
    }

    fn traffic(&self) -> Option<Traffic> {
        self.shards.traffic()
    }

    /// `grads` holds the blocks of levels that are kept here as summed over all workers, and the others that
    /// this worker hands over.
    async fn push(&self, step: Step, rank: usize, grads: Vec<Block>) -> Result<()> {
        let here: Vec<Block> = grads.iter().filter(|block| self.is_here(block.id)).cloned().collect();
        let there = grads.into_iter().filter(|block| !self.is_here(block.id) || self.speaks_for(block.id));
        let there: Vec<Block> = there.collect();
        let (copy, rounds) = (Arc::clone(&self.copy), self.rounds);
        let own = blocking(move || {
            let mut gradients = Gradients::default();
            for Block { id, values } in here {
                let values = match rounds {
                    true => Values::Bf16(values.into_iter().map(bf16::from_f32).collect()),
                    false => Values::F32(values),
                };
                gradients.insert(copy.spec(), id, values)?;
            }
            copy.push(step, 0, gradients).map(|_| ())
        });
        futures::future::try_join(own, self.shards.push(step, rank, there)).await.map(|_| ())
    }

    async fn save(&self, step: Step) -> Result<()> {
        self.shards.save(step).await
    }
}
