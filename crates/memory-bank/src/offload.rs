use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use cluster_tree::ClusterId;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::blocking::blocking;
use crate::schedule::setting;
use crate::scratch::Scratch;
use crate::segment::block_bytes;
use crate::{Result, Row, Shard};

const MIB: u64 = 1 << 20;
/// Weights and two moments.
const ARRAYS: u64 = 3;

/// A shard's rows beyond a part of memory, on disk: so a bank may be larger than its hosts' memory.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OffloadOptions {
    /// A folder on a local disk with room for the rows, 12 bytes a parameter that was ever updated; several
    /// shards may share it. It holds nothing that outlives them.
    pub dir: PathBuf,
    /// Most memory for rows, in MiB: at least those that one step updates. Gradients that wait for other
    /// ranks and blocks on their way to workers come to it, and while a save or a restore is under way at
    /// most as much again.
    pub host_mib: u64,
}

/// Where rows go that are not in memory. A clone is another handle to the same.
///
/// Before a step is applied, the rows that it updates are read, and for their sake those that were updated
/// longest ago written: all that may fail happens while nothing has changed yet, and the step may be tried
/// again. Fetches leave rows where they are.
#[derive(Clone, Debug)]
pub struct Offload {
    scratch: Arc<Scratch>,
    host_mib: u64,
}

impl Offload {
    /// Fails on a folder that cannot be written to.
    pub fn open(options: &OffloadOptions) -> Result<Self> {
        Ok(Self { scratch: Scratch::create(&options.dir)?, host_mib: options.host_mib })
    }

    /// Bytes of rows on disk, those included that only a save still holds.
    pub fn disk_bytes(&self) -> u64 {
        self.scratch.held_bytes()
    }

    /// Most bytes of rows in memory.
    pub(crate) fn host_bytes(&self) -> u64 {
        self.host_mib.saturating_mul(MIB)
    }

    /// Bytes that other rows may take beside those of a shard that is made.
    pub(crate) fn room_beside(&self, rows: &[(ClusterId, Row)]) -> u64 {
        self.host_bytes().saturating_sub(rows.iter().map(|(_, row)| row.host_bytes()).sum())
    }

    /// Takes in rows that were loaded: as they are while there is `room`, on disk from then on.
    pub(crate) async fn admit(
        self,
        rows: Vec<(ClusterId, Row)>,
        room: &mut u64,
    ) -> Result<Vec<(ClusterId, Row)>> {
        let bytes = rows.iter().map(|(_, row)| row.host_bytes()).sum();
        if let Some(left) = room.checked_sub(bytes) {
            *room = left;
            return Ok(rows);
        }
        blocking(move || self.store(&rows)).await
    }

    /// The same rows on disk.
    fn store(&self, rows: &[(ClusterId, Row)]) -> Result<Vec<(ClusterId, Row)>> {
        rows.par_iter().map(|(id, row)| Ok((*id, row.stored(&self.scratch)?))).collect()
    }

    /// Has the blocks that a step updates in memory, and others as far as there is room. Of those updated
    /// in the same step the fine levels go first: coarse ones are sooner needed again.
    pub(crate) fn make_room(&self, shard: &mut Shard, updated: &BTreeSet<ClusterId>) -> Result<()> {
        let row_bytes = |id: &ClusterId| ARRAYS * block_bytes(shard.spec(), usize::from(id.level));
        let needed: u64 = updated.iter().map(row_bytes).sum();
        if needed > self.host_bytes() {
            let (mib, n) = (needed.div_ceil(MIB), updated.len());
            let expected = format!("at least {mib}, for the {n} blocks of step {}", shard.applied().0 + 1);
            return Err(setting("offload.host_mib", &expected, self.host_mib));
        }
        let mut others = shard.rows_where(|id, row| row.host_bytes() > 0 && !updated.contains(&id));
        let held: u64 = others.iter().map(|(_, row)| row.host_bytes()).sum();
        let mut excess = (needed + held).saturating_sub(self.host_bytes());
        others.sort_by_key(|(id, row)| (row.last, Reverse(*id)));
        let goes = |(_, row): &&(ClusterId, Row)| {
            let goes = excess > 0;
            excess = excess.saturating_sub(row.host_bytes());
            goes
        };
        let n_going = others.iter().take_while(goes).count();
        let stored = self.store(&others[..n_going])?;
        drop(others);
        stored.into_iter().for_each(|(id, row)| shard.place(id, row));
        let load = |(&id, row): (&ClusterId, &Row)| Ok((id, row.load()?.into_row(row.last)));
        let known = updated.par_iter().filter_map(|id| Some((id, shard.row(*id)?)));
        let loaded: Vec<_> = known.map(load).collect::<Result<_>>()?;
        loaded.into_iter().for_each(|(id, row)| shard.place(id, row));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use super::*;
    use crate::{AdamW, Block, BlockSpec, Gradients, Live, Placement, Schedule, ShardOptions, Step};

    /// Rows of 590 KB: one fits.
    fn spec() -> BlockSpec {
        BlockSpec::ffn(2, 128, vec![64], vec![4])
    }

    fn live(file: File) -> Live {
        let schedule = Schedule { peak: 0.1, floor: 0.1, warmup_steps: 0, total_steps: 1 };
        let adamw = AdamW { schedule, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, clip: None };
        let options =
            ShardOptions { seed: 1, adamw, world_size: 1, staleness: 0, placement: Placement::WHOLE };
        let offload = Offload { scratch: Scratch::of(file, Path::new("scratch")), host_mib: 1 };
        Live::offloaded(Shard::new(spec(), options).unwrap(), Some(offload))
    }

    fn push(live: &Live, step: u64, index: u32) -> Result<()> {
        let block =
            Block { id: ClusterId { level: 0, index }, values: vec![step as f32; spec().block_len(0)] };
        live.push(Step(step), 0, Gradients::new(&spec(), vec![block])?).map(|_| ())
    }

    fn first_weights(live: &Live) -> Vec<f32> {
        let ids: Vec<_> = (0..3).map(|index| ClusterId { level: 0, index }).collect();
        live.fetch(&ids).unwrap().iter().map(|values| values[0]).collect()
    }

    /// The device on which every write finds the disk full.
    #[test]
    fn a_full_disk_is_an_error_and_nothing_is_lost() {
        let live = live(OpenOptions::new().read(true).write(true).open("/dev/full").unwrap());
        push(&live, 1, 0).unwrap();
        let before = first_weights(&live);
        for _ in 0..2 {
            let text = push(&live, 2, 1).unwrap_err().to_string();
            assert_eq!(text, "scratch: No space left on device (os error 28)");
            assert_eq!((live.applied(), first_weights(&live)), (Step(1), before.clone()));
            assert_eq!(live.offload().unwrap().disk_bytes(), 0);
        }
        let rows = live.snapshot(Step(1), Step(0)).unwrap().rows;
        assert_eq!((rows.len(), rows[0].1.host_bytes()), (1, 589_824));
    }

    #[test]
    fn a_disk_that_kept_something_else_is_noticed_and_the_step_can_be_repeated() {
        let file = tempfile::tempfile().unwrap();
        let live = live(file.try_clone().unwrap());
        push(&live, 1, 0).unwrap();
        push(&live, 2, 1).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 1000).unwrap();
        file.write_all_at(&[byte[0] ^ 1], 1000).unwrap();
        let errors =
            [push(&live, 3, 0).unwrap_err(), live.fetch(&[ClusterId { level: 0, index: 0 }]).unwrap_err()];
        for error in errors {
            let text = error.to_string();
            assert!(
                text.starts_with("scratch: crc32c of the array at byte 0 of the rows on disk is "),
                "{text}"
            );
        }
        assert_eq!(live.applied(), Step(2));
        file.write_all_at(&byte, 1000).unwrap();
        let before = first_weights(&live);
        push(&live, 3, 0).unwrap();
        assert_eq!(live.applied(), Step(3));
        assert_ne!(first_weights(&live)[0], before[0]);
    }
}
