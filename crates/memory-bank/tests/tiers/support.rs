use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cluster_tree::ClusterId;
use memory_bank::{
    AdamW, BankOptions, BankVersion, Block, BlockDtype, BlockSpec, BlockStore, DiskOptions, Error, LocalBank,
    Result, Schedule, Step, TierOptions, TierSource, TierStats, Tiered,
};
use tempfile::TempDir;

/// The step of the bank that is read.
pub(crate) const STEP: Step = Step(2);
pub(crate) const DTYPES: [BlockDtype; 3] = [BlockDtype::F32, BlockDtype::Bf16, BlockDtype::Int8];

/// Level 0 with 4 blocks of 2,304 bytes, level 2 with 1,024 of 1,152, and a generic one each: more
/// than 1 MiB.
pub(crate) fn spec() -> BlockSpec {
    BlockSpec::ffn(2, 24, vec![4, 0, 2], vec![4, 4, 64])
}

pub(crate) fn id(level: u8, index: u32) -> ClusterId {
    ClusterId { level, index }
}

/// Some blocks of both levels: updated ones, untouched ones and the generic ones.
pub(crate) fn some_ids() -> Vec<ClusterId> {
    let clusters = [id(2, 1000), id(0, 3), id(2, 7), id(0, 0), id(2, 8)];
    clusters.into_iter().chain([id(0, ClusterId::GENERIC), id(2, ClusterId::GENERIC)]).collect()
}

pub(crate) fn hashes() -> BTreeMap<String, String> {
    BTreeMap::from([("tree".to_owned(), "a1".to_owned())])
}

pub(crate) fn version() -> BankVersion {
    BankVersion { step: STEP, seed: 7, hashes: hashes() }
}

/// A bank of which every seventh block was updated, in files of its own.
pub(crate) struct Bank {
    folder: TempDir,
}

impl Bank {
    pub(crate) async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let schedule = Schedule { peak: 0.02, floor: 0.002, warmup_steps: 0, total_steps: 10 };
        let adamw = AdamW { schedule, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: None };
        let options = BankOptions {
            seed: 7,
            adamw,
            world_size: 1,
            staleness: 0,
            checkpoint_root: folder.path().to_owned(),
            offload: None,
            hashes: hashes(),
        };
        let bank = LocalBank::create(spec(), options).unwrap();
        for step in 1..=STEP.0 {
            let updated = some_ids().into_iter().filter(|id| id.index % 7 == 0);
            let gradient = |id: ClusterId| {
                let len = spec().block_len(usize::from(id.level));
                let value = |i| ((i * 37 + step as usize) % 19) as f32 - 9.0;
                Block { id, values: (0..len).map(value).collect() }
            };
            bank.push(Step(step), 0, updated.map(gradient).collect()).await.unwrap();
        }
        bank.save(STEP).await.unwrap();
        Self { folder }
    }

    /// The bank mapped from its files.
    pub(crate) fn local(&self) -> Arc<LocalBank> {
        Arc::new(LocalBank::open_read_only(&self.folder.path().join("00000002/memory")).unwrap())
    }

    /// The bank elsewhere, 1 ms away. Where time is paused, RAM and disk take none of it, so they are
    /// never slower, whatever the machine is doing.
    pub(crate) fn remote(&self) -> Arc<Remote> {
        let answers = Answers { delay: Duration::from_millis(1), kind: Answer::Right };
        Arc::new(Remote { bank: self.local(), answers: Mutex::new(answers), requests: Mutex::default() })
    }

    /// Tiers over one source.
    pub(crate) fn over(&self, options: &TierOptions, source: &Arc<Remote>) -> Tiered {
        Tiered::open(options, version(), vec![TierSource::new("remote", Arc::clone(source))]).unwrap()
    }
}

/// A bank elsewhere: as slow and as wrong as a test wants it, and it remembers what it was asked for.
pub(crate) struct Remote {
    bank: Arc<LocalBank>,
    answers: Mutex<Answers>,
    requests: Mutex<Vec<Vec<ClusterId>>>,
}

#[derive(Copy, Clone)]
struct Answers {
    delay: Duration,
    kind: Answer,
}

/// How a remote bank answers.
#[derive(Copy, Clone)]
pub(crate) enum Answer {
    Right,
    /// With an error.
    Fails,
    /// Without the last block.
    Short,
    /// With the first block in place of the last.
    Twice,
    /// With one number too few.
    Cut,
    /// With a NaN in the first block.
    Nan,
}

impl Remote {
    pub(crate) fn answer(&self, kind: Answer, delay_millis: u64) {
        *self.answers.lock().unwrap() = Answers { delay: Duration::from_millis(delay_millis), kind };
    }

    /// What it was asked for since this was called last.
    pub(crate) fn requests(&self) -> Vec<Vec<ClusterId>> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }
}

impl BlockStore for Remote {
    fn spec(&self) -> &BlockSpec {
        self.bank.spec()
    }

    async fn fetch(&self, after: Step, ids: &[ClusterId]) -> Result<Vec<Block>> {
        self.requests.lock().unwrap().push(ids.to_vec());
        let Answers { delay, kind } = *self.answers.lock().unwrap();
        tokio::time::sleep(delay).await;
        let mut blocks = self.bank.fetch(after, ids).await?;
        match kind {
            Answer::Right => {}
            Answer::Fails => {
                let source = std::io::ErrorKind::ConnectionReset.into();
                return Err(Error::Io { path: PathBuf::from("remote"), source });
            }
            Answer::Short => drop(blocks.pop()),
            Answer::Twice => *blocks.last_mut().unwrap() = blocks[0].clone(),
            Answer::Cut => drop(blocks[0].values.pop()),
            Answer::Nan => blocks[0].values[5] = f32::NAN,
        }
        Ok(blocks)
    }

    async fn push(&self, step: Step, rank: usize, grads: Vec<Block>) -> Result<()> {
        self.bank.push(step, rank, grads).await
    }

    async fn save(&self, step: Step) -> Result<()> {
        self.bank.save(step).await
    }
}

pub(crate) fn ram(ram_mib: u64, dtype: BlockDtype) -> TierOptions {
    TierOptions { ram_mib, dtype, ..TierOptions::default() }
}

pub(crate) fn disk(dir: &Path, dtype: BlockDtype) -> TierOptions {
    let disk = Some(DiskOptions { dir: dir.to_owned(), mib: 1 });
    TierOptions { disk, dtype, ..TierOptions::default() }
}

/// The bits of every weight: equality of floats would take 0 and −0 for the same.
pub(crate) fn bits(blocks: &[Block]) -> Vec<(ClusterId, Vec<u32>)> {
    blocks
        .iter()
        .map(|block| (block.id, block.values.iter().map(|value| value.to_bits()).collect()))
        .collect()
}

pub(crate) async fn fetch(store: &impl BlockStore, ids: &[ClusterId]) -> Vec<(ClusterId, Vec<u32>)> {
    bits(&store.fetch(STEP, ids).await.unwrap())
}

pub(crate) fn tier(tiered: &Tiered, name: &str) -> TierStats {
    let stats = tiered.stats().tiers;
    stats.iter().find(|tier| tier.name == name).unwrap_or_else(|| panic!("{name} in {stats:?}")).clone()
}

/// Blocks that a tier has had.
pub(crate) fn n_hits(tiered: &Tiered, name: &str) -> u64 {
    tier(tiered, name).levels.iter().map(|level| level.n_hits).sum()
}
