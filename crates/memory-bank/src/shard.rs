use std::collections::BTreeMap;

use cluster_tree::ClusterId;

use crate::adamw::{AdamW, Row};
use crate::schedule::setting;
use crate::{BlockSpec, Error, Gradients, Result, Step, init_block};

/// What a shard needs to know beside its spec.
#[derive(Copy, Clone, PartialEq, Debug)]
pub struct ShardOptions {
    /// Seed of the initial weights.
    pub seed: u64,
    /// How blocks are updated.
    pub adamw: AdamW,
    /// Ranks whose pushes make a step.
    pub world_size: usize,
}

/// The owner of blocks: a value without I/O, clock or threads, fed with pushes and asked for blocks.
///
/// A block that was never updated takes no memory: it is [`init_block`], computed when asked for.
#[derive(Clone, PartialEq, Debug)]
pub struct Shard {
    spec: BlockSpec,
    options: ShardOptions,
    applied: Step,
    /// Updated blocks by level and index; the generic block comes last, as in the files.
    rows: Vec<BTreeMap<u32, Row>>,
    /// What each rank has pushed of the step after `applied`.
    pending: Vec<Option<Gradients>>,
}

/// The update of one block in one step, independent of every other one of that step.
pub struct Update<'a> {
    spec: &'a BlockSpec,
    options: ShardOptions,
    step: Step,
    id: ClusterId,
    row: &'a mut Row,
    /// In rank order, at least one.
    grads: Vec<Vec<f32>>,
}

impl Shard {
    /// A shard in its initial state. Fails on a spec or options that make no bank.
    pub fn new(spec: BlockSpec, options: ShardOptions) -> Result<Self> {
        let rows = vec![BTreeMap::new(); spec.n_levels()];
        Self::from_rows(spec, options, Step(0), rows)
    }

    /// A shard after `applied` steps; the updated blocks have the spec's lengths.
    pub(crate) fn from_rows(
        spec: BlockSpec,
        options: ShardOptions,
        applied: Step,
        rows: Vec<BTreeMap<u32, Row>>,
    ) -> Result<Self> {
        spec.validate()?;
        options.adamw.validate()?;
        if options.world_size == 0 {
            return Err(setting("world_size", "at least 1", 0));
        }
        Ok(Self { spec, options, applied, rows, pending: vec![None; options.world_size] })
    }

    /// The sizes of the blocks.
    pub fn spec(&self) -> &BlockSpec {
        &self.spec
    }

    /// The seed of the initial weights.
    pub fn seed(&self) -> u64 {
        self.options.seed
    }

    /// The last step applied.
    pub fn applied(&self) -> Step {
        self.applied
    }

    /// The weights of a block, `[L, 3, r, d]`, as a copy. Fails on a block that the spec does not have.
    pub fn block(&self, id: ClusterId) -> Result<Vec<f32>> {
        self.spec.check(id)?;
        Ok(match self.row(id) {
            Some(row) => row.values.clone(),
            None => init_block(&self.spec, self.options.seed, id),
        })
    }

    /// Takes one rank's gradients of a step, which counts from 1. The push that completes the step
    /// applies it: `run` is then called once and must run every update it is given, in any order
    /// and on any thread. A push already taken, of this step or one before, is ignored. Fails on a
    /// rank outside the world and on a step that is neither applied nor the next one.
    pub fn push(
        &mut self,
        step: Step,
        rank: usize,
        grads: Gradients,
        run: impl FnOnce(Vec<Update<'_>>),
    ) -> Result<()> {
        let world_size = self.options.world_size;
        if rank >= world_size {
            return Err(Error::Rank { rank, world_size });
        }
        if step == Step(0) || step.0 > self.applied.0 + 1 {
            return Err(Error::PushStep { found: step, applied: self.applied });
        }
        if step <= self.applied || self.pending[rank].is_some() {
            return Ok(());
        }
        self.pending[rank] = Some(grads);
        if self.pending.iter().all(Option::is_some) {
            self.apply(step, run);
        }
        Ok(())
    }

    /// A block that has been updated.
    pub(crate) fn row(&self, id: ClusterId) -> Option<&Row> {
        self.rows[usize::from(id.level)].get(&id.index)
    }

    /// Number of updated blocks of a level.
    pub(crate) fn n_touched(&self, level: usize) -> usize {
        self.rows[level].len()
    }

    /// Has every block that got gradients updated; the work is of their number, not of the bank's.
    fn apply(&mut self, step: Step, run: impl FnOnce(Vec<Update<'_>>)) {
        let mut grads: BTreeMap<ClusterId, Vec<Vec<f32>>> = BTreeMap::new();
        for (id, values) in self.pending.iter_mut().filter_map(Option::take).flat_map(Gradients::into_blocks)
        {
            grads.entry(id).or_default().push(values);
        }
        let take = |id: &ClusterId| self.rows[usize::from(id.level)].remove(&id.index).unwrap_or_default();
        let mut rows: Vec<Row> = grads.keys().map(take).collect();
        let ids: Vec<ClusterId> = grads.keys().copied().collect();
        let (spec, options) = (&self.spec, self.options);
        let update = |((id, grads), row)| Update { spec, options, step, id, row, grads };
        run(grads.into_iter().zip(&mut rows).map(update).collect());
        for (id, row) in ids.into_iter().zip(rows) {
            self.rows[usize::from(id.level)].insert(id.index, row);
        }
        self.applied = step;
    }
}

impl Update<'_> {
    /// Sums the gradients in rank order and updates the block.
    pub fn run(self) {
        let Self { spec, options, step, id, row, grads } = self;
        if row.steps == 0 {
            row.values = init_block(spec, options.seed, id);
            row.m = vec![0.0; row.values.len()];
            row.v = vec![0.0; row.values.len()];
        }
        let mut grads = grads.into_iter();
        let mut sum = grads.next().unwrap_or_default();
        for grad in grads {
            sum.iter_mut().zip(&grad).for_each(|(sum, value)| *sum += value);
        }
        options.adamw.update(row, &sum, step.0);
    }
}
