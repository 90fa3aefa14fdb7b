use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use cluster_tree::ClusterId;

use crate::row::Loaded;
use crate::schedule::setting;
use crate::{
    AdamW, Array, BlockSpec, Error, Gradients, Placement, Result, Row, Snapshot, Step, Values, init_block,
};

/// Most steps that a rank may be ahead of the slowest.
pub const MAX_STALENESS: u64 = 64;

/// What a shard needs to know beside its spec.
#[derive(Copy, Clone, PartialEq, Debug)]
pub struct ShardOptions {
    /// Seed of the initial weights.
    pub seed: u64,
    /// How blocks are updated.
    pub adamw: AdamW,
    /// Ranks whose pushes make a step.
    pub world_size: usize,
    /// Steps that a rank may push beyond the one that is waited for; 0 is synchronous training.
    pub staleness: u64,
    /// The part of the bank that the shard owns.
    pub placement: Placement,
}

/// The owner of blocks: a value without I/O, clock or threads, fed with pushes and asked for blocks.
///
/// A block that was never updated takes no memory: it is [`init_block`], computed when asked for. A row that
/// its host has put on disk is read through the row's own arrays.
#[derive(Clone, PartialEq, Debug)]
pub struct Shard {
    spec: BlockSpec,
    options: ShardOptions,
    applied: Step,
    /// Updated blocks by level and index; the generic block comes last, as in the files.
    rows: Vec<BTreeMap<u32, Row>>,
    /// What each rank has pushed of the steps after `applied`: of the next one, and of `staleness`
    /// more.
    pending: VecDeque<Vec<Option<Gradients>>>,
}

/// The update of one block in one step, independent of every other one of that step.
pub struct Update<'a> {
    spec: &'a BlockSpec,
    options: ShardOptions,
    step: Step,
    id: ClusterId,
    /// None before the first update.
    row: &'a mut Option<Loaded>,
    /// In rank order, at least one.
    gradients: Vec<Values>,
}

impl Shard {
    /// A shard in its initial state. Fails on a spec or options that make no bank.
    pub fn new(spec: BlockSpec, options: ShardOptions) -> Result<Self> {
        Self::with_rows(spec, options, Step(0), [])
    }

    /// A shard after `applied` steps, with the blocks updated so far. Fails on a spec or options
    /// that make no bank, and on a row that is not the shard's, is there twice or has another
    /// length than its block.
    pub fn with_rows(
        spec: BlockSpec,
        options: ShardOptions,
        applied: Step,
        rows: impl IntoIterator<Item = (ClusterId, Row)>,
    ) -> Result<Self> {
        spec.validate()?;
        options.adamw.validate()?;
        options.placement.validate()?;
        if options.world_size == 0 {
            return Err(setting("world_size", "at least 1", 0));
        }
        if options.staleness > MAX_STALENESS {
            return Err(setting("staleness", &format!("at most {MAX_STALENESS}"), options.staleness));
        }
        let mut by_level = vec![BTreeMap::new(); spec.n_levels()];
        for (id, row) in rows {
            spec.check(id)?;
            options.placement.check(id)?;
            let expected = spec.block_len(usize::from(id.level));
            for found in [row.values.len(), row.m.len(), row.v.len()] {
                if found != expected {
                    return Err(Error::RowLength { id, expected, found });
                }
            }
            if by_level[usize::from(id.level)].insert(id.index, row).is_some() {
                return Err(Error::RepeatedRow { id });
            }
        }
        let pending = (0..=options.staleness).map(|_| vec![None; options.world_size]).collect();
        Ok(Self { spec, options, applied, rows: by_level, pending })
    }

    /// The sizes of the blocks.
    pub fn spec(&self) -> &BlockSpec {
        &self.spec
    }

    /// How the shard was made.
    pub fn options(&self) -> &ShardOptions {
        &self.options
    }

    /// The last step applied.
    pub fn applied(&self) -> Step {
        self.applied
    }

    /// The weights of a block, `[L, 3, r, d]`, shared and not copied; `None` before its first
    /// update, when they are [`init_block`]. Fails on a block that the spec does not have, and on
    /// one that another shard owns.
    pub fn values(&self, id: ClusterId) -> Result<Option<Array>> {
        self.spec.check(id)?;
        self.options.placement.check(id)?;
        Ok(self.row(id).map(|row| row.values.clone()))
    }

    /// As [`Shard::values`], with the number of the block's updates so far. In one life of a shard, which only
    /// pushes change, a block with the same number has the same weights.
    pub fn versioned(&self, id: ClusterId) -> Result<(u64, Option<Array>)> {
        let values = self.values(id)?;
        Ok((self.row(id).map_or(0, |row| row.steps), values))
    }

    /// The weights of a block as a copy, whether it was updated or not. Fails as [`Shard::values`] and
    /// [`Array::read`].
    pub fn block(&self, id: ClusterId) -> Result<Vec<f32>> {
        match self.values(id)? {
            Some(values) => values.read().map(|values| values.to_vec()),
            None => Ok(init_block(&self.spec, self.options.seed, id)),
        }
    }

    /// Takes one rank's gradients of a step, which counts from 1. The push that completes a step
    /// applies it, and those after it that are complete too: for each, `run` is called once and
    /// must run every update it is given, in any order and on any thread. A push already taken, of
    /// a step applied or not, is ignored. Fails on a rank outside the world, on a step beyond those
    /// that may wait, on a block that another shard owns, and as [`Array::read`]; then the step is not
    /// applied, and is by the next push, of this step again too, that finds the rows.
    pub fn push(
        &mut self,
        step: Step,
        rank: usize,
        gradients: Gradients,
        mut run: impl FnMut(Vec<Update<'_>>),
    ) -> Result<()> {
        self.take(step, rank, gradients)?;
        while self.apply(&mut run)? {}
        Ok(())
    }

    /// The first half of [`Shard::push`]: nothing is applied yet.
    pub(crate) fn take(&mut self, step: Step, rank: usize, gradients: Gradients) -> Result<()> {
        let world_size = self.options.world_size;
        if rank >= world_size {
            return Err(Error::Rank { rank, world_size });
        }
        let last = self.applied.0 + 1 + self.options.staleness;
        if step == Step(0) || step.0 > last {
            let (applied, last) = (self.applied, Step(last));
            return Err(Error::PushStep { found: step, applied, last });
        }
        if step <= self.applied {
            return Ok(());
        }
        gradients.ids().try_for_each(|id| self.options.placement.check(id))?;
        let waiting = &mut self.pending[(step.0 - self.applied.0 - 1) as usize][rank];
        waiting.get_or_insert(gradients);
        Ok(())
    }

    /// Forgets what ranks have pushed of steps that are not applied yet.
    pub fn forget_pending(&mut self) {
        self.pending.iter_mut().flatten().for_each(|pushed| *pushed = None);
    }

    /// The blocks that the next step updates, once every rank has pushed it.
    pub(crate) fn next_updates(&self) -> Option<BTreeSet<ClusterId>> {
        let pushes: Option<Vec<&Gradients>> = self.pending[0].iter().map(Option::as_ref).collect();
        pushes.map(|pushes| pushes.into_iter().flat_map(Gradients::ids).collect())
    }

    /// Whether a rank's push of a step has been taken.
    pub fn has_pushed(&self, step: Step, rank: usize) -> bool {
        let waiting =
            step.0.checked_sub(self.applied.0 + 1).and_then(|place| self.pending.get(place as usize));
        step <= self.applied || waiting.is_some_and(|ranks| ranks.get(rank).is_some_and(Option::is_some))
    }

    /// The blocks updated after step `since`, as they are now. Their arrays are shared, so this takes
    /// time by the number of blocks and not by their size.
    pub fn snapshot(&self, since: Step) -> Snapshot {
        let rows = self.rows_where(|_, row| row.last > since);
        Snapshot { step: self.applied, placement: self.options.placement, rows }
    }

    /// The blocks whose last update is that of step `until` or an earlier one; shared as in a snapshot.
    pub fn unchanged_since(&self, until: Step) -> Vec<(ClusterId, Row)> {
        self.rows_where(|_, row| row.last <= until)
    }

    /// Steps that some rank has pushed and that wait for another.
    pub fn lag(&self) -> usize {
        self.pending.iter().rposition(|ranks| ranks.iter().any(Option::is_some)).map_or(0, |last| last + 1)
    }

    /// Number of updated blocks by level.
    pub fn n_touched(&self) -> Vec<usize> {
        self.rows.iter().map(BTreeMap::len).collect()
    }

    /// Bytes of updated blocks in memory.
    pub fn host_bytes(&self) -> u64 {
        self.rows.iter().flat_map(BTreeMap::values).map(Row::host_bytes).sum()
    }

    /// Some of the updated blocks, in the order of ids.
    pub(crate) fn rows_where(&self, takes: impl Fn(ClusterId, &Row) -> bool) -> Vec<(ClusterId, Row)> {
        let mut found = Vec::new();
        for (level, rows) in self.rows.iter().enumerate() {
            let rows = rows.iter().map(|(&index, row)| (ClusterId { level: level as u8, index }, row));
            found.extend(rows.filter(|&(id, row)| takes(id, row)).map(|(id, row)| (id, row.clone())));
        }
        found
    }

    pub(crate) fn row(&self, id: ClusterId) -> Option<&Row> {
        self.rows[usize::from(id.level)].get(&id.index)
    }

    /// Has a row, of the same numbers, elsewhere.
    pub(crate) fn place(&mut self, id: ClusterId, row: Row) {
        self.rows[usize::from(id.level)].insert(id.index, row);
    }

    /// Has every block that got gradients in the next step updated, if every rank has pushed it: `false`
    /// if not. The work is of their number, not of the bank's.
    pub(crate) fn apply(&mut self, run: &mut impl FnMut(Vec<Update<'_>>)) -> Result<bool> {
        let Some(ids) = self.next_updates() else { return Ok(false) };
        // What cannot be read is an error while nothing has changed.
        let load = |&id: &ClusterId| self.row(id).map(Row::load).transpose();
        let mut rows = ids.iter().map(load).collect::<Result<Vec<Option<Loaded>>>>()?;
        // What is also held here would be copied by its update.
        ids.iter().for_each(|id| drop(self.rows[usize::from(id.level)].remove(&id.index)));
        let step = Step(self.applied.0 + 1);
        let pushes = self.pending.pop_front().into_iter().flatten().flatten();
        self.pending.push_back(vec![None; self.options.world_size]);
        let mut gradients: BTreeMap<ClusterId, Vec<Values>> = BTreeMap::new();
        for (id, values) in pushes.flat_map(Gradients::into_blocks) {
            gradients.entry(id).or_default().push(values);
        }
        let (spec, options) = (&self.spec, self.options);
        let update = |((id, gradients), row)| Update { spec, options, step, id, row, gradients };
        run(gradients.into_iter().zip(&mut rows).map(update).collect());
        for (id, row) in ids.into_iter().zip(rows) {
            if let Some(row) = row {
                self.place(id, row.into_row(step));
            }
        }
        self.applied = step;
        Ok(true)
    }
}

impl Update<'_> {
    /// Sums the gradients in rank order and updates the block.
    pub fn run(self) {
        let Self { spec, options, step, id, row, gradients } = self;
        let row = row.get_or_insert_with(|| {
            let values = init_block(spec, options.seed, id);
            let zeros = || Arc::new(vec![0.0; values.len()]);
            Loaded { m: zeros(), v: zeros(), values: Arc::new(values), steps: 0 }
        });
        options.adamw.update(row, &gradients, step.0);
    }
}
