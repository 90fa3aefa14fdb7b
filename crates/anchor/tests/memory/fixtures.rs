//! A tiny anchor, its memory and batches of random tokens.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use anchor::{Anchor, AnchorConfig, Compute, FetchedMemory, Gradients, Input, Targets, unique_ids};
use candle_core::{DType, Device, Tensor};
use cluster_tree::{ClusterId, ClusterPath};
use memory_bank::{AdamW, BankOptions, Block, BlockSpec, Blocking, LocalBank, Schedule, Step};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub(crate) const VOCAB: usize = 23;
pub(crate) const CPU: (&Device, DType) = (&Device::Cpu, DType::F32);
pub(crate) const CPU_F64: (&Device, DType) = (&Device::Cpu, DType::F64);

/// Two layers whose attention is narrower than the residual stream.
pub(crate) fn config(tied_embeddings: bool) -> AnchorConfig {
    AnchorConfig {
        vocab_size: VOCAB,
        d_model: 16,
        n_layers: 2,
        n_heads: 2,
        head_width: 6,
        ffn_width: 24,
        tied_embeddings,
        max_seq_len: 32,
        rope_base: 10_000.0,
        norm_eps: 1e-5,
        form: anchor::Form::default(),
    }
}

pub(crate) fn anchor() -> Anchor {
    Anchor::new(config(true), 7, CPU).unwrap()
}

/// Memory of two levels of two children each.
pub(crate) fn spec(width: [usize; 2]) -> BlockSpec {
    BlockSpec::ffn(2, 16, width.to_vec(), vec![2, 2])
}

pub(crate) fn leaf(index: u32) -> ClusterPath {
    ClusterPath::new(vec![index / 2, index]).unwrap()
}

pub(crate) fn generic() -> ClusterPath {
    ClusterPath::generic(2).unwrap()
}

/// The blocks of `paths` as a bank holds them before its first step.
pub(crate) fn fresh_blocks(spec: &BlockSpec, paths: &[ClusterPath]) -> Vec<Block> {
    let schedule = Schedule { peak: 1e-3, floor: 1e-4, warmup_steps: 0, total_steps: 10 };
    let adamw = AdamW { schedule, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, clip: None };
    let options = BankOptions {
        seed: 3,
        adamw,
        world_size: 1,
        staleness: 0,
        checkpoint_root: PathBuf::from("never-saved"),
        offload: None,
        hashes: BTreeMap::new(),
    };
    let bank = LocalBank::create(spec.clone(), options).unwrap();
    let bank = Blocking::new(Arc::new(bank)).unwrap();
    bank.fetch(Step(0), &unique_ids(paths, spec)).unwrap()
}

/// Blocks for `paths` whose every value is random in (-0.4, 0.4): a block's values depend on its id alone.
pub(crate) fn trained_blocks(spec: &BlockSpec, paths: &[ClusterPath]) -> Vec<Block> {
    let block = |id: ClusterId| {
        let mut random = ChaCha8Rng::seed_from_u64(u64::from(id.level) << 32 | u64::from(id.index));
        let len = spec.block_len(usize::from(id.level));
        let values = (0..len).map(|_| (random.next_u32() as f32 / 2f32.powi(32) - 0.5) * 0.8).collect();
        Block { id, values }
    };
    unique_ids(paths, spec).into_iter().map(block).collect()
}

pub(crate) fn memory(blocks: &[Block], paths: &[ClusterPath], spec: &BlockSpec) -> FetchedMemory {
    FetchedMemory::to_device(blocks, paths, spec, CPU).unwrap()
}

/// A batch of one document a sequence.
#[derive(Clone)]
pub(crate) struct Batch {
    pub(crate) tokens: Vec<u32>,
    pub(crate) starts: Vec<u32>,
    pub(crate) targets: Vec<u32>,
    pub(crate) batch: usize,
    pub(crate) len: usize,
}

impl Batch {
    pub(crate) fn random(batch: usize, len: usize, seed: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut ids = || (0..batch * len).map(|_| random.next_u32() % VOCAB as u32).collect();
        Self { tokens: ids(), starts: vec![0; batch * len], targets: ids(), batch, len }
    }

    /// One sequence of it.
    pub(crate) fn sequence(&self, index: usize) -> Self {
        self.slice(index, 0..self.len)
    }

    /// Some positions of one sequence, as a sequence that begins there.
    pub(crate) fn slice(&self, index: usize, positions: std::ops::Range<usize>) -> Self {
        let range = index * self.len + positions.start..index * self.len + positions.end;
        Self {
            tokens: self.tokens[range.clone()].to_vec(),
            starts: vec![0; range.len()],
            targets: self.targets[range.clone()].to_vec(),
            batch: 1,
            len: range.len(),
        }
    }

    pub(crate) fn input(&self) -> Input<'_> {
        Input { tokens: &self.tokens, starts: &self.starts, batch: self.batch, len: self.len }
    }

    /// The sum over tokens, with a little z-loss.
    pub(crate) fn targets(&self) -> Targets<'_> {
        Targets { targets: &self.targets, scale: 1.0, z_loss: 1e-2 }
    }
}

pub(crate) fn logits(anchor: &Anchor, batch: &Batch, memory: &FetchedMemory) -> Vec<f32> {
    let hidden = anchor.hidden(batch.input(), memory, None).unwrap();
    values(&anchor.logits(&hidden).unwrap())
}

pub(crate) fn losses(anchor: &Anchor, batch: &Batch, memory: &FetchedMemory) -> Vec<f32> {
    anchor.loss(batch.input(), batch.targets(), memory).unwrap().1
}

/// The gradients of the anchor by slot, and those of every block.
pub(crate) fn gradients(anchor: &Anchor, batch: &Batch, memory: &FetchedMemory) -> (Gradients, Vec<Block>) {
    let mut gradients = Gradients::default();
    let work = (batch.input(), batch.targets());
    let (_, blocks) = anchor.loss_and_gradients(work, memory, Compute::default(), &mut gradients).unwrap();
    (gradients, blocks)
}

/// The gradient of every block.
pub(crate) fn block_gradients(anchor: &Anchor, batch: &Batch, memory: &FetchedMemory) -> Vec<Block> {
    gradients(anchor, batch, memory).1
}

pub(crate) fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// ‖a − b‖ / ‖b‖
pub(crate) fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    difference / norm(&mut b.iter().map(|&b| f64::from(b)))
}

/// The relative error of the gradient of the block at this place of `blocks` against central finite differences of
/// the loss, of every `stride`-th number.
pub(crate) fn difference_error(
    (blocks, place): (&[Block], usize),
    gradient: &Block,
    stride: usize,
    loss: impl Fn(&[Block]) -> f64,
) -> f64 {
    /// Half the distance of a finite difference: exact in f32, and small enough for an error of 1e-7.
    const STEP: f32 = 1.0 / 4096.0;
    let difference = |position: usize| {
        let mut moved = blocks.to_vec();
        let value = blocks[place].values[position];
        let mut at = |x: f32| {
            moved[place].values[position] = x;
            (loss(&moved), f64::from(x))
        };
        let ((high, x_high), (low, x_low)) = (at(value + STEP), at(value - STEP));
        ((high - low) / (x_high - x_low)) as f32
    };
    let positions = || (0..gradient.values.len()).step_by(stride);
    let expected: Vec<f32> = positions().map(difference).collect();
    let found: Vec<f32> = positions().map(|position| gradient.values[position]).collect();
    relative_error(&found, &expected)
}
