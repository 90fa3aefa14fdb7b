use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use cluster_tree::ClusterId;
use rayon::prelude::*;

use crate::manifest::{Manifest, VALUES, Verify, verify};
use crate::tensor_file::{Mapped, Reader, value_tensors};
use crate::{
    AdamW, Block, BlockSpec, BlockStore, Error, Gradients, Live, Placement, Result, Shard, ShardOptions,
    Step, checkpoint,
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
    /// Folder of the checkpoints: step 1000 is saved to `<checkpoint_root>/00001000/memory`.
    pub checkpoint_root: PathBuf,
    /// Hashes of what the bank belongs to, such as `tree`, `tokenizer` and `anchor`.
    pub hashes: BTreeMap<String, String>,
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
    ReadOnly(Arc<ReadOnly>),
}

struct Trained {
    live: Live,
    saving: Mutex<()>,
    checkpoint_root: PathBuf,
    hashes: BTreeMap<String, String>,
}

struct ReadOnly {
    manifest: Manifest,
    values: Mapped,
}

impl LocalBank {
    /// A bank in its initial state, which takes no memory until it is updated. Fails on a spec or
    /// options that make no bank.
    pub fn create(spec: BlockSpec, options: BankOptions) -> Result<Self> {
        Ok(Self::live(Shard::new(spec, options.shard())?, options))
    }

    /// The bank that a checkpoint's `memory` folder holds, to continue to the bit; the blocks
    /// updated so far are read into memory. Checks the hash of every file, and fails when spec,
    /// seed or hashes are not those of the checkpoint.
    pub fn resume(memory_folder: &Path, spec: BlockSpec, options: BankOptions) -> Result<Self> {
        let shard = checkpoint::resume(memory_folder, spec, options.shard(), &options.hashes)?;
        Ok(Self::live(shard, options))
    }

    /// The bank that a `memory` folder holds, mapped to be fetched from only. Checks the sizes of
    /// the files and not their hashes (see [`verify`]).
    pub fn open_read_only(memory_folder: &Path) -> Result<Self> {
        let manifest = verify(memory_folder, Verify::Sizes)?;
        let values = Reader::open(&memory_folder.join(VALUES), &value_tensors(&manifest.spec))?.map()?;
        let spec = Arc::new(manifest.spec.clone());
        Ok(Self { spec, source: Source::ReadOnly(Arc::new(ReadOnly { manifest, values })) })
    }

    /// The last step applied.
    pub fn applied(&self) -> Step {
        match &self.source {
            Source::Live(bank) => bank.live.applied(),
            Source::ReadOnly(files) => files.manifest.step,
        }
    }

    /// Hashes of what the bank belongs to, as given when it was made.
    pub fn hashes(&self) -> &BTreeMap<String, String> {
        match &self.source {
            Source::Live(bank) => &bank.hashes,
            Source::ReadOnly(files) => &files.manifest.hashes,
        }
    }

    fn live(shard: Shard, options: BankOptions) -> Self {
        let BankOptions { checkpoint_root, hashes, .. } = options;
        let live = Live::new(shard);
        let spec = Arc::clone(live.spec());
        let bank = Trained { live, saving: Mutex::new(()), checkpoint_root, hashes };
        Self { spec, source: Source::Live(Arc::new(bank)) }
    }

    fn live_for(&self, action: &'static str, step: Step) -> Result<Arc<Trained>> {
        match &self.source {
            Source::Live(bank) => Ok(Arc::clone(bank)),
            Source::ReadOnly(files) => Err(Error::ReadOnly { action, step, applied: files.manifest.step }),
        }
    }
}

impl BlockStore for LocalBank {
    fn spec(&self) -> &BlockSpec {
        &self.spec
    }

    async fn fetch(&self, after: Step, ids: &[ClusterId]) -> Result<Vec<Block>> {
        ids.iter().try_for_each(|&id| self.spec.check(id))?;
        let ids = ids.to_vec();
        match &self.source {
            Source::Live(bank) => {
                bank.live.reached(after).await?;
                let bank = Arc::clone(bank);
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
            Source::ReadOnly(files) => {
                let applied = files.manifest.step;
                if after > applied {
                    return Err(Error::NotReached { after, applied });
                }
                let files = Arc::clone(files);
                blocking(move || files.fetch(&ids)).await
            }
        }
    }

    async fn push(&self, step: Step, rank: usize, grads: Vec<Block>) -> Result<()> {
        let bank = self.live_for("push", step)?;
        let spec = Arc::clone(&self.spec);
        blocking(move || bank.live.push(step, rank, Gradients::new(&spec, grads)?).map(|_| ())).await
    }

    async fn save(&self, step: Step) -> Result<()> {
        let bank = self.live_for("save", step)?;
        blocking(move || bank.save(step)).await
    }
}

impl BankOptions {
    fn shard(&self) -> ShardOptions {
        ShardOptions {
            seed: self.seed,
            adamw: self.adamw,
            world_size: self.world_size,
            staleness: 0,
            placement: Placement::WHOLE,
        }
    }
}

impl Trained {
    /// A second save waits for the first, as both may be of one folder.
    fn save(&self, step: Step) -> Result<()> {
        let _saving = self.saving.lock().map_err(|_| Error::Unfinished)?;
        self.live.with(|shard| match shard.applied() {
            applied if applied == step => checkpoint::save(shard, &self.checkpoint_root, &self.hashes),
            applied => Err(Error::SaveStep { expected: step, applied }),
        })?
    }
}

impl ReadOnly {
    fn fetch(&self, ids: &[ClusterId]) -> Result<Vec<Block>> {
        let spec = &self.manifest.spec;
        let block = |&id: &ClusterId| {
            let level = usize::from(id.level);
            let place = spec.levels().take_while(|&other| other < level).count();
            let len = spec.block_len(level);
            let values = self.values.values(place, spec.row(id)? * len, len).to_vec();
            Ok(Block { id, values })
        };
        ids.par_iter().map(block).collect()
    }
}

/// Runs work that copies or computes much, so that the runtime's own threads stay free.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|source| Error::Task { source })?
}
