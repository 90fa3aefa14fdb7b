//! Initial weights: truncated normals cut at 3σ (OpenLM's default), one random stream per parameter so
//! that a parameter's start depends on its name and the seed alone.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::AnchorConfig;

/// Values of the parameter `name` of `shape`.
///
/// Norm gains are 1, biases 0; matrices have σ = 1/√fan_in, and the two that write to the residual stream are
/// smaller by √(2·(layer + 1)); the embedding has σ = 1/√D.
pub(crate) fn values(config: &AnchorConfig, name: &str, shape: &[usize], seed: u64) -> Vec<f32> {
    let n: usize = shape.iter().product();
    if name.ends_with("norm") {
        return vec![1.0; n];
    }
    if name.ends_with("bias") {
        return vec![0.0; n];
    }
    let mut random = ChaCha8Rng::seed_from_u64(seed ^ fnv1a(name));
    let d = config.d_model as f64;
    let layer = name.split('.').nth(1).and_then(|layer| layer.parse::<usize>().ok()).unwrap_or(0);
    let into_residual = 1.0 / (2.0 * (layer + 1) as f64).sqrt();
    let normal = |n: usize, std: f64, random: &mut ChaCha8Rng| -> Vec<f32> {
        (0..n).map(|_| (truncated_normal(random) * std) as f32).collect()
    };
    if name.ends_with(".ffn") {
        let in_and_gate = normal(n / 3 * 2, 1.0 / d.sqrt(), &mut random);
        let out = normal(n / 3, into_residual / (shape[1] as f64).sqrt(), &mut random);
        return [in_and_gate, out].concat();
    }
    let fan_in = shape[shape.len() - 1] as f64;
    let residual = if name.ends_with("attention_output") { into_residual } else { 1.0 };
    normal(n, residual / fan_in.sqrt(), &mut random)
}

/// A standard normal (Box–Muller) redrawn until it lies within 3σ.
fn truncated_normal(random: &mut ChaCha8Rng) -> f64 {
    loop {
        let uniform = |random: &mut ChaCha8Rng| (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let (a, b) = (uniform(random), uniform(random));
        let x = (-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos();
        if x.abs() <= 3.0 {
            return x;
        }
    }
}

/// 64-bit FNV-1a: a fixed hash of a name.
fn fnv1a(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
