//! Fused tensor operations with forward and backward, for a decoder whose FFNs widen by memory.
//!
//! Every operation has two bodies: a fused one for f32 on the CPU (a candle custom op, the one that
//! trains), and one composed of candle's differentiable tensor operations for any other type and
//! device, which in f64 is also the reference that the tests hold the fused body against.
//! candle's own fused layers (`rms_norm`, `rope`, `softmax_last_dim`) are not used anywhere: they have
//! no backward and drop gradients without an error.
//!
//! Shapes: B batch, T query positions, S key positions, N = B·T rows, D d_model, H heads, K head width,
//! R width of a gated FFN, U unique blocks, V vocabulary.

mod adamw;
mod attention;
mod buffer;
mod cross_entropy;
mod embedding;
mod gated_ffn;
mod gemm;
mod linear;
mod math;
mod rms_norm;
mod rope;

pub use adamw::{AdamW, adamw_step, sum_of_squares};
pub use attention::{AttentionShape, attention};
pub use cross_entropy::{CrossEntropy, TokenLoss, linear_cross_entropy};
pub use embedding::embedding;
pub use gated_ffn::{Run, gated_ffn};
pub use linear::linear;
pub use rms_norm::rms_norm;
pub use rope::{RopeTable, rope};

/// A target that is not scored: padding.
pub const IGNORE: u32 = u32::MAX;

use candle_core::{DType, Tensor};

/// Whether the fused f32 CPU body applies; everything else takes the composed body.
fn fused(t: &Tensor) -> bool {
    t.device().is_cpu() && t.dtype() == DType::F32
}

/// Sets up this process for training on the CPU: `n_threads` for the matrix products and our own
/// loops, and one for candle's second, spinning pool, which would otherwise fight for the same cores.
///
/// The first thing to do in `main`: candle is told by an environment variable, which is set only while no
/// other thread exists. A second call keeps the pool of the first.
pub fn init_threads(n_threads: usize) {
    let is_alone = std::fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() == 1);
    if is_alone {
        // SAFETY: no other thread exists that could read or write the environment meanwhile.
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
    let _ = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build_global();
}
