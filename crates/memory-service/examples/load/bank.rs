//! The banks that are measured.

use std::collections::BTreeMap;

use cluster_tree::ClusterId;
use memory_bank::{AdamW, Array, BlockSpec, Placement, Row, Schedule, Shard, ShardOptions, Step};
use memory_service::{Identity, RemoteBank, RemoteOptions, Retry};

use crate::closed_loop::{Result, number};

/// The name that server and clients call the bank.
pub(crate) const NAME: &str = "bench";
/// Banks begin here: every block has been updated once.
pub(crate) const START: Step = Step(1);
pub(crate) const SEED: u64 = 7;
/// Every moment in the beginning. Not 0: memory that is all zeros may take none.
const MOMENT: f32 = 1.0 / 1024.0;

/// The sizes of a bank.
#[derive(clap::Args, Clone)]
pub(crate) struct Sizes {
    /// Layers of the model.
    #[arg(long, default_value_t = 14)]
    layers: usize,
    /// Memory width by level: a block has 86,016 bytes for each with 14 layers.
    #[arg(long, value_delimiter = ',', required = true)]
    width: Vec<usize>,
    #[arg(long, value_delimiter = ',', required = true)]
    branching: Vec<usize>,
}

/// What the optimizer holds of every block.
#[derive(Copy, Clone, PartialEq, Eq)]
pub(crate) enum Moments {
    /// Arrays of its own, as after training.
    Own,
    /// One array for all of a level: of a bank that is only read, so that it takes a third of the memory.
    Shared,
}

impl Sizes {
    pub(crate) fn spec(&self) -> BlockSpec {
        BlockSpec::ffn(self.layers, 512, self.width.clone(), self.branching.clone())
    }

    /// Every block but the generic ones.
    pub(crate) fn ids(&self) -> Vec<ClusterId> {
        let spec = self.spec();
        let of_level = |level| {
            (0..spec.n_blocks(level) as u32).map(move |index| ClusterId { level: level as u8, index })
        };
        spec.levels().flat_map(of_level).collect()
    }

    /// Bytes of all blocks' weights.
    pub(crate) fn weight_bytes(&self) -> u64 {
        self.spec().bank_len() * size_of::<f32>() as u64
    }

    /// A shard all of whose blocks have been updated.
    pub(crate) fn shard(&self, moments: Moments) -> Result<Shard> {
        let spec = self.spec();
        let moment = |id: ClusterId| Array::from(vec![MOMENT; spec.block_len(usize::from(id.level))]);
        let mut of_level = BTreeMap::new();
        let mut rows = vec![];
        for id in self.ids() {
            let values: Vec<f32> =
                (0..spec.block_len(usize::from(id.level))).map(|place| number(id.index, place)).collect();
            let (m, v) = match moments {
                Moments::Own => (moment(id), moment(id)),
                Moments::Shared => {
                    let moment = of_level.entry(id.level).or_insert_with(|| moment(id));
                    (moment.clone(), moment.clone())
                }
            };
            rows.push((id, Row { values: Array::from(values), m, v, steps: 1, last: START }));
        }
        Ok(Shard::with_rows(spec, options(), START, rows)?)
    }

    pub(crate) fn identity(&self) -> Identity {
        Identity::new(NAME, &self.spec(), BTreeMap::new())
    }

    /// A bank of one shard over one connection, which does not try again.
    pub(crate) async fn connect(&self, address: &str, bulk: bool) -> Result<RemoteBank> {
        self.connect_by(address, bulk, 1, Retry { seconds: 0, ..Retry::default() }).await
    }

    pub(crate) async fn connect_by(
        &self,
        address: &str,
        bulk: bool,
        streams: usize,
        retry: Retry,
    ) -> Result<RemoteBank> {
        let mut options = RemoteOptions::new(vec![address.to_owned()], self.spec(), self.identity());
        (options.bulk, options.streams, options.retry) = (bulk, streams, retry);
        Ok(RemoteBank::connect(options).await?)
    }
}

/// The rate stays as it is, and no gradient is clipped, as in torch.optim.AdamW.
pub(crate) fn options() -> ShardOptions {
    let schedule = Schedule { peak: 1e-3, floor: 1e-3, warmup_steps: 0, total_steps: 0 };
    let adamw = AdamW { schedule, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: None };
    ShardOptions { seed: SEED, adamw, world_size: 1, staleness: 0, placement: Placement::WHOLE }
}
