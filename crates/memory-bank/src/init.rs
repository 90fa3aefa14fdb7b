use cluster_tree::ClusterId;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{BlockSpec, MemoryKind};

/// The initial weights of a block, `[L, 3, r, d]`: M1 and M2 normal with std 1/√d cut at 3σ, M3 = 0,
/// so that a bank starts as the anchor alone (paper section 3). A pure function of the spec's
/// sizes, the seed and the id: a bank of any sharding starts the same.
///
/// # Panics
/// If the spec has no level `id.level`.
pub fn init_block(spec: &BlockSpec, seed: u64, id: ClusterId) -> Vec<f32> {
    let MemoryKind::Ffn = spec.kind;
    let matrix_len = spec.width[usize::from(id.level)] * spec.d_model;
    let mut values = vec![0.0; spec.block_len(usize::from(id.level))];
    if matrix_len == 0 {
        return values;
    }
    let mut normal = TruncatedNormal::new(seed, id);
    let std = 1.0 / (spec.d_model as f64).sqrt();
    for layer in values.chunks_exact_mut(3 * matrix_len) {
        layer[..2 * matrix_len].iter_mut().for_each(|value| *value = (normal.sample() * std) as f32);
    }
    values
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
