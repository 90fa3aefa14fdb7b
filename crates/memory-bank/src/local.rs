use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cluster_tree::ClusterId;
use rayon::prelude::*;
use tokio::sync::Mutex;

use crate::blocking::{blocking, wait};
use crate::{
    AdamW, Block, BlockSpec, BlockStore, Checkpoint, Error, Gradients, Identity, Live, MappedBank, Offload,
    OffloadOptions, Placement, Result, Shard, ShardOptions, Step, folder,
};

/// How a bank is trained and where its checkpoints go.
#[derive(Clone, PartialEq, Debug)]
pub struct BankOptions {
    /// Seed of the initial weights.
    pub seed: u64,
    /// How blocks are updated.
    pub adamw: AdamW,
    /// Ranks whose pushes make a step.
    pub world_size: usize,
    /// Steps that a rank may push beyond the one that is waited for.
    pub staleness: u64,
    /// Folder of the checkpoints: step 1000 is saved to `<checkpoint_root>/00001000/memory`.
    pub checkpoint_root: PathBuf,
    /// Hashes of what the bank belongs to, such as `tree`, `tokenizer` and `anchor`.
    pub hashes: BTreeMap<String, String>,
    /// Where rows go beyond a part of memory; without it all of them stay in memory.
    pub offload: Option<OffloadOptions>,
}

/// A whole bank on this machine. A clone is another handle to the same bank.
///
/// A bank is either live, in memory and updated by pushes, or open read-only, mapped from its files.
/// Its requests need a tokio runtime: the work runs on the runtime's threads for blocking work.
#[derive(Clone)]
pub struct LocalBank {
    spec: Arc<BlockSpec>,
    source: Source,
}

#[derive(Clone)]
enum Source {
    Live(Arc<Trained>),
    ReadOnly(MappedBank),
}

struct Trained {
    live: Live,
    /// One save at a time, as several may be of one folder.
    saving: Mutex<()>,
    checkpoint_root: PathBuf,
    identity: Identity,
}

impl LocalBank {
    /// A bank in its initial state, which takes no memory until it is updated. Fails on a spec or
    /// options that make no bank.
    pub fn create(spec: BlockSpec, options: BankOptions) -> Result<Self> {
        let offload = options.open_offload()?;
        Ok(Self::live(Shard::new(spec, options.shard())?, options, offload))
    }

    /// The bank that a checkpoint's `memory` folder holds, to continue to the bit; the blocks
    /// updated so far are read. Checks the files and every block, and fails when spec,
    /// seed or hashes are not those of the checkpoint.
    pub fn resume(memory_folder: &Path, spec: BlockSpec, options: BankOptions) -> Result<Self> {
        let resumed =
            async { Self::resume_from(&Checkpoint::open_folder(memory_folder).await?, spec, options).await };
        wait(memory_folder, resumed)
    }

    /// As [`LocalBank::resume`], of a checkpoint anywhere, also one that shards have saved.
    pub async fn resume_from(checkpoint: &Checkpoint, spec: BlockSpec, options: BankOptions) -> Result<Self> {
        let identity = Identity { spec, seed: options.seed, hashes: options.hashes.clone() };
        let offload = options.open_offload()?;
        let shard = checkpoint.load_onto(&identity, options.shard(), vec![], offload.as_ref()).await?;
        Ok(Self::live(shard, options, offload))
    }

    /// The bank that a `memory` folder holds, mapped to be fetched from only: a [`MappedBank`].
    pub fn open_read_only(memory_folder: &Path) -> Result<Self> {
        let bank = MappedBank::open(memory_folder)?;
        Ok(Self { spec: Arc::new(bank.spec().clone()), source: Source::ReadOnly(bank) })
    }

    /// The last step applied.
    pub fn applied(&self) -> Step {
        match &self.source {
            Source::Live(bank) => bank.live.applied(),
            Source::ReadOnly(bank) => bank.manifest().step,
        }
    }

    /// Hashes of what the bank belongs to, as given when it was made.
    pub fn hashes(&self) -> &BTreeMap<String, String> {
        match &self.source {
            Source::Live(bank) => &bank.identity.hashes,
            Source::ReadOnly(bank) => &bank.manifest().hashes,
        }
    }

    fn live(shard: Shard, options: BankOptions, offload: Option<Offload>) -> Self {
        let BankOptions { checkpoint_root, hashes, seed, .. } = options;
        let live = Live::offloaded(shard, offload);
        let spec = Arc::clone(live.spec());
        let identity = Identity { spec: BlockSpec::clone(&spec), seed, hashes };
        let bank = Trained { live, saving: Mutex::new(()), checkpoint_root, identity };
        Self { spec, source: Source::Live(Arc::new(bank)) }
    }

    fn live_for(&self, action: &'static str, step: Step) -> Result<Arc<Trained>> {
        match &self.source {
            Source::Live(bank) => Ok(Arc::clone(bank)),
            Source::ReadOnly(_) => Err(Error::ReadOnly { action, step, applied: self.applied() }),
        }
    }
}

impl BlockStore for LocalBank {
    fn spec(&self) -> &BlockSpec {
        &self.spec
    }

    async fn fetch(&self, after: Step, ids: &[ClusterId]) -> Result<Vec<Block>> {
        ids.iter().try_for_each(|&id| self.spec.check(id))?;
        match &self.source {
            Source::Live(bank) => {
                bank.live.reached(after).await?;
                let (bank, ids) = (Arc::clone(bank), ids.to_vec());
                blocking(move || {
                    let shared = bank.live.fetch(&ids)?;
                    let block = |(&id, values): (&ClusterId, Arc<Vec<f32>>)| Block {
                        id,
                        values: Arc::unwrap_or_clone(values),
                    };
                    Ok(ids.par_iter().zip(shared).map(block).collect())
                })
                .await
            }
            Source::ReadOnly(bank) => bank.fetch(after, ids).await,
        }
    }

    async fn push(&self, step: Step, rank: usize, grads: Vec<Block>) -> Result<()> {
        let bank = self.live_for("push", step)?;
        let spec = Arc::clone(&self.spec);
        blocking(move || bank.live.push(step, rank, Gradients::new(&spec, grads)?).map(|_| ())).await
    }

    async fn save(&self, step: Step) -> Result<()> {
        let bank = self.live_for("save", step)?;
        let _saving = bank.saving.lock().await;
        let with_live = Arc::clone(&bank);
        // Pushes go on while the files are written: what they update, they copy.
        let snapshot = blocking(move || with_live.live.snapshot(step, Step(0))).await?;
        folder::save(&bank.identity, snapshot, &bank.checkpoint_root).await
    }
}

impl BankOptions {
    fn open_offload(&self) -> Result<Option<Offload>> {
        self.offload.as_ref().map(Offload::open).transpose()
    }

    fn shard(&self) -> ShardOptions {
        ShardOptions {
            seed: self.seed,
            adamw: self.adamw,
            world_size: self.world_size,
            staleness: self.staleness,
            placement: Placement::WHOLE,
        }
    }
}
