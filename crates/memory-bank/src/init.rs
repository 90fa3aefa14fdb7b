use cluster_tree::ClusterId;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{BlockPart, BlockSpec, MemoryPart};

/// The initial weights of a block, in the order of [`BlockSpec::parts`], so that a bank starts as the anchor alone
/// (paper section 3). Of FFN memory, M1 and M2 are normal with std 1/√d cut at 3σ, and M3 = 0. Of LoRA memory, A is
/// uniform in ±1/√I (Kaiming's bound for a leaky ReLU of slope √5, as usual for it), and B = 0. Of KV memory, keys
/// are normal with std 1/√(their width) cut at 3σ, and values = 0. A pure function of the spec's sizes, the seed and
/// the id: a bank of any sharding starts the same.
///
/// # Panics
/// If the spec has no level `id.level`.
pub fn init_block(spec: &BlockSpec, seed: u64, id: ClusterId) -> Vec<f32> {
    let level = usize::from(id.level);
    let mut values = vec![0.0; spec.block_len(level)];
    if values.is_empty() {
        return values;
    }
    let mut normal = TruncatedNormal::new(seed, id);
    for BlockPart { layer, part, range } in spec.parts(level) {
        let started = started(spec, layer, part, range.len());
        let values = &mut values[range][..started];
        let deviation = |width: usize| 1.0 / (width as f64).sqrt();
        match part {
            MemoryPart::Ffn => normal.fill(values, deviation(spec.d_model)),
            MemoryPart::Kv => normal.fill(values, deviation(spec.inner_of(layer).key_value)),
            MemoryPart::Lora(matrix) => {
                let bound = deviation(matrix.widths(spec.d_model, spec.inner_of(layer)).0);
                values.iter_mut().for_each(|value| *value = (normal.uniform() * bound) as f32);
            }
        }
    }
    values
}

/// How many numbers of a part of `len` do not begin as 0; they come first. The others, M3, B or values, are what
/// the part adds by.
pub(crate) fn started(spec: &BlockSpec, layer: usize, part: MemoryPart, len: usize) -> usize {
    match part {
        MemoryPart::Ffn => len / 3 * 2,
        MemoryPart::Kv => len / 2,
        MemoryPart::Lora(matrix) => {
            let (from, to) = matrix.widths(spec.d_model, spec.inner_of(layer));
            len / (from + to) * from
        }
    }
}

/// A standard normal cut at 3σ, with a random stream of its own per block.
struct TruncatedNormal {
    rng: ChaCha8Rng,
    /// The polar method makes two samples at a time.
    spare: Option<f64>,
}

impl TruncatedNormal {
    fn new(seed: u64, id: ClusterId) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..12].copy_from_slice(&id.index.to_le_bytes());
        key[12] = id.level;
        key[16..].copy_from_slice(b"memory bank init");
        Self { rng: ChaCha8Rng::from_seed(key), spare: None }
    }

    fn sample(&mut self) -> f64 {
        loop {
            let sample = self.spare.take().unwrap_or_else(|| self.pair());
            if sample.abs() <= 3.0 {
                return sample;
            }
        }
    }

    fn fill(&mut self, values: &mut [f32], deviation: f64) {
        values.iter_mut().for_each(|value| *value = (self.sample() * deviation) as f32);
    }

    /// Uniform in [−1, 1).
    fn uniform(&mut self) -> f64 {
        (self.rng.next_u64() >> 11) as f64 / f64::from(1u32 << 26) / f64::from(1u32 << 26) - 1.0
    }

    /// Marsaglia's polar method: returns one normal sample and keeps the other.
    fn pair(&mut self) -> f64 {
        loop {
            let bits = self.rng.next_u64();
            let x = f64::from(bits as i32) / f64::from(1u32 << 31);
            let y = f64::from((bits >> 32) as i32) / f64::from(1u32 << 31);
            let square = x * x + y * y;
            if square > 0.0 && square < 1.0 {
                let scale = (-2.0 * square.ln() / square).sqrt();
                self.spare = Some(y * scale);
                return x * scale;
            }
        }
    }
}
