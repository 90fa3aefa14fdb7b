use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use cluster_tree::ClusterId;

use crate::schedule::setting;
use crate::{AdamW, BlockSpec, Error, Gradients, Placement, Result, Row, Snapshot, Step, Values, init_block};

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
/// A block that was never updated takes no memory: it is [`init_block`], computed when asked for.
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
    row: &'a mut Option<Row>,
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
    pub fn values(&self, id: ClusterId) -> Result<Option<Arc<Vec<f32>>>> {
        self.spec.check(id)?;
        self.options.placement.check(id)?;
        Ok(self.row(id).map(|row| Arc::clone(&row.values)))
    }

    /// The weights of a block as a copy, whether it was updated or not. Fails as [`Shard::values`].
    pub fn block(&self, id: ClusterId) -> Result<Vec<f32>> {
        let values = self.values(id)?;
        Ok(values.map_or_else(|| init_block(&self.spec, self.options.seed, id), |values| values.to_vec()))
    }

    /// Takes one rank's gradients of a step, which counts from 1. The push that completes a step
    /// applies it, and those after it that are complete too: for each, `run` is called once and
    /// must run every update it is given, in any order and on any thread. A push already taken, of
    /// a step applied or not, is ignored. Fails on a rank outside the world, on a step beyond those
    /// that may wait, and on a block that another shard owns.
    pub fn push(
        &mut self,
        step: Step,
        rank: usize,
        gradients: Gradients,
        mut run: impl FnMut(Vec<Update<'_>>),
    ) -> Result<()> {
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
        if waiting.is_some() {
            return Ok(());
        }
        *waiting = Some(gradients);
        while self.pending[0].iter().all(Option::is_some) {
            self.apply(&mut run);
        }
        Ok(())
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
        let rows = self.rows_where(|row| row.last > since);
        Snapshot { step: self.applied, placement: self.options.placement, rows }
    }

    /// The blocks whose last update is that of step `until` or an earlier one; shared as in a snapshot.
    pub fn unchanged_since(&self, until: Step) -> Vec<(ClusterId, Row)> {
        self.rows_where(|row| row.last <= until)
    }

    /// Steps that some rank has pushed and that wait for another.
    pub fn lag(&self) -> usize {
        self.pending.iter().rposition(|ranks| ranks.iter().any(Option::is_some)).map_or(0, |last| last + 1)
    }

    /// Number of updated blocks by level.
    pub fn n_touched(&self) -> Vec<usize> {
        self.rows.iter().map(BTreeMap::len).collect()
    }

    /// Some of the updated blocks, in the order of ids.
    fn rows_where(&self, takes: impl Fn(&Row) -> bool) -> Vec<(ClusterId, Row)> {
        let mut found = Vec::new();
        for (level, rows) in self.rows.iter().enumerate() {
            let taken = rows.iter().filter(|(_, row)| takes(row));
            found.extend(taken.map(|(&index, row)| (ClusterId { level: level as u8, index }, row.clone())));
        }
        found
    }

    pub(crate) fn row(&self, id: ClusterId) -> Option<&Row> {
        self.rows[usize::from(id.level)].get(&id.index)
    }

    /// Has every block that got gradients in the next step updated; the work is of their number, not
    /// of the bank's.
    fn apply(&mut self, run: &mut impl FnMut(Vec<Update<'_>>)) {
        let step = Step(self.applied.0 + 1);
        let pushes = self.pending.pop_front().into_iter().flatten().flatten();
        self.pending.push_back(vec![None; self.options.world_size]);
        let mut gradients: BTreeMap<ClusterId, Vec<Values>> = BTreeMap::new();
        for (id, values) in pushes.flat_map(Gradients::into_blocks) {
            gradients.entry(id).or_default().push(values);
        }
        let ids: Vec<ClusterId> = gradients.keys().copied().collect();
        let take = |id: &ClusterId| self.rows[usize::from(id.level)].remove(&id.index);
        let mut rows: Vec<Option<Row>> = ids.iter().map(take).collect();
        let (spec, options) = (&self.spec, self.options);
        let update = |((id, gradients), row)| Update { spec, options, step, id, row, gradients };
        run(gradients.into_iter().zip(&mut rows).map(update).collect());
        for (id, row) in ids.into_iter().zip(rows) {
            if let Some(row) = row {
                self.rows[usize::from(id.level)].insert(id.index, row);
            }
        }
        self.applied = step;
    }
}

impl Update<'_> {
    /// Sums the gradients in rank order and updates the block.
    pub fn run(self) {
        let Self { spec, options, step, id, row, gradients } = self;
        let row = row.get_or_insert_with(|| {
            let values = init_block(spec, options.seed, id);
            let zeros = || Arc::new(vec![0.0; values.len()]);
            Row { m: zeros(), v: zeros(), values: Arc::new(values), steps: 0, last: Step(0) }
        });
        row.last = step;
        options.adamw.update(row, &gradients, step.0);
    }
}
