//! The bank as one value in one thread, fed in order: what it was after every step.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use cluster_tree::ClusterId;
use memory_bank::{Array, Block, Gradients, Placement, Row, Shard, Step, Update, init_block};

use crate::setting::Setting;

pub(crate) struct Reference {
    initial: BTreeMap<ClusterId, Arc<Vec<f32>>>,
    /// By step, what has been updated up to it.
    rows: Vec<BTreeMap<ClusterId, Row>>,
}

impl Reference {
    pub(crate) fn new(setting: &Setting) -> Self {
        let options = setting.shard_options(Placement::WHOLE);
        let mut shard = Shard::new(setting.spec.clone(), options).unwrap();
        let initial = |id| (id, Arc::new(init_block(&setting.spec, options.seed, id)));
        let initial = setting.all_ids().into_iter().map(initial).collect();
        let rows_now = |shard: &Shard| shard.snapshot(Step(0)).rows.into_iter().collect();
        let mut rows = vec![rows_now(&shard)];
        for step in 1..=setting.n_steps {
            let block = |id| Block { id, values: shard.block(id).unwrap() };
            let gradients = (0..setting.world_size).map(|rank| {
                let fetched: Vec<Block> = setting.touched(step, rank).into_iter().map(block).collect();
                Gradients::new(&setting.spec, setting.gradients(step, rank, &fetched)).unwrap()
            });
            for (rank, gradients) in gradients.collect::<Vec<_>>().into_iter().enumerate() {
                shard.push(Step(step), rank, gradients, in_turn).unwrap();
            }
            rows.push(rows_now(&shard));
        }
        Self { initial, rows }
    }

    /// Fails unless a block is, whole, as it was after one of these steps.
    pub(crate) fn check_block(&self, found: &Block, steps: RangeInclusive<u64>) -> Result<(), String> {
        let matches = |step: &u64| same_bits(self.values(*step, found.id), &found.values);
        if steps.clone().any(|step| matches(&step)) {
            return Ok(());
        }
        let at = (0..self.rows.len() as u64).find(matches);
        let found_at = at.map_or("torn: as after no step at all".to_owned(), |at| format!("as after {at}"));
        Err(format!("block {} fetched for steps {steps:?} is {found_at}", found.id))
    }

    /// Fails unless these are the rows of some blocks after a step, moments and numbers of updates
    /// included; `owned` says which blocks.
    pub(crate) fn check_rows(
        &self,
        step: u64,
        found: &[(ClusterId, Row)],
        owned: impl Fn(ClusterId) -> bool,
    ) -> Result<(), String> {
        let expected: Vec<_> = self.rows[step as usize].iter().filter(|(id, _)| owned(**id)).collect();
        if !expected.iter().map(|(id, _)| **id).eq(found.iter().map(|(id, _)| *id)) {
            return Err(format!("the blocks updated up to step {step} are not those of the reference"));
        }
        for ((id, expected), (_, found)) in expected.into_iter().zip(found) {
            let arrays =
                [(&expected.values, &found.values), (&expected.m, &found.m), (&expected.v, &found.v)];
            let read = |array: &Array| array.read().map_err(|error| error.to_string());
            let mut same = true;
            for (expected, found) in arrays {
                same &= same_bits(&read(expected)?, &read(found)?);
            }
            if !same || expected.steps != found.steps {
                return Err(format!(
                    "block {id} after step {step} is not the reference's: {} updates, expected {}",
                    found.steps, expected.steps
                ));
            }
        }
        Ok(())
    }

    fn values(&self, step: u64, id: ClusterId) -> &[f32] {
        let row = self.rows[step as usize].get(&id);
        row.and_then(|row| row.values.in_memory()).unwrap_or(&self.initial[&id])
    }
}

/// Applies the updates of a step one after the other.
pub(crate) fn in_turn(updates: Vec<Update<'_>>) {
    updates.into_iter().for_each(Update::run);
}

/// Equality of floats would take 0 and −0 for the same.
fn same_bits(a: &[f32], b: &[f32]) -> bool {
    bytemuck::cast_slice::<f32, u32>(a) == bytemuck::cast_slice::<f32, u32>(b)
}
