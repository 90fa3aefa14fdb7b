//! Fused tensor operations with forward and backward, for a decoder whose FFNs widen by memory.
//!
//! Operations are functions of a [`Tape`], which goes through them backward. Each has a fused body for f32 on the
//! CPU, one for NVIDIA GPUs (feature `cuda`), and one composed of candle's differentiable tensor operations for
//! anything else, which in f64 is also the reference that the tests hold the others against. Operands are contiguous.
//! candle's own fused layers (`rms_norm`, `rope`, `softmax_last_dim`) are not used anywhere: they have
//! no backward and drop gradients without an error.
//!
//! Shapes: B batch, T query positions, S key positions, N = B·T rows, D d_model, H heads, G of them with keys and
//! values of their own, K head width, R width of a gated FFN, U unique blocks, V vocabulary.

mod activation;
mod adamw;
mod attention;
mod buffer;
mod cross_entropy;
#[cfg(feature = "cuda")]
mod cuda;
pub mod decode;
mod embedding;
mod encoder;
mod ffn_lora;
mod gated_ffn;
mod gemm;
mod kv_memory;
mod linear;
mod lora;
mod math;
mod rms_norm;
mod rope;
mod runs;
mod scale;
mod tape;

pub use activation::Activation;
pub use adamw::{AdamW, adamw_step, sum_of_squares};
pub use attention::{AttentionShape, Scoring, attention};
pub use buffer::{tensors_of, values_of};
pub use cross_entropy::{CrossEntropy, LOGIT_ROWS, TokenLoss, linear_cross_entropy};
pub use embedding::embedding;
pub use encoder::{Dense, LayerNorm, SelfAttention};
pub use ffn_lora::{FfnLora, gated_ffn_lora};
pub use gated_ffn::{FfnPart, Run, gated_ffn};
pub use kv_memory::{KvMemoryShape, KvPart, kv_memory};
pub use linear::{add_bias, affine, linear};
pub use lora::{LoraPart, lora};
pub use rms_norm::{add_rms_norm, rms_norm};
pub use rope::{NormRope, RopeTable, norm_rope};
pub use scale::scale;
pub use tape::{Gradients, Tape, Traced};

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

/// A target that is not scored: padding.
pub const IGNORE: u32 = u32::MAX;

/// How matrix products are made. Parameters, their gradients and every sum are f32; so is everything else on the
/// CPU, while on a GPU the activations between operations are of the type of the products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Of f32 operands.
    #[default]
    F32,
    /// Of operands rounded to bf16, by the processor's own instructions where it has them. Products of fewer than
    /// 5 rows, as when decoding, stay f32.
    Bf16,
}

/// Whether the bodies for GPUs apply.
#[cfg(feature = "cuda")]
fn on_gpu(t: &Tensor) -> bool {
    t.device().is_cuda() && matches!(t.dtype(), DType::F32 | DType::BF16)
}

/// Whether the fused f32 CPU body applies; everything else takes the composed body.
fn fused(t: &Tensor) -> bool {
    t.device().is_cpu() && t.dtype() == DType::F32
}

/// Sets up this process for training on the CPU: `n_threads` for our own loops, one for candle's second,
/// spinning pool, which would otherwise fight for the same cores; and freed memory stays with the allocator (where
/// it is mimalloc), since a step needs again what the last one freed, and new pages cost more than a sum over them.
///
/// The first thing to do in `main`: candle is told by an environment variable, which is set only while no
/// other thread exists. A second call keeps the pool of the first.
pub fn init_process(n_threads: usize) {
    let is_alone = std::fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() == 1);
    if is_alone {
        // SAFETY: no other thread exists that could read or write the environment meanwhile.
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
    // SAFETY: sets a number that mimalloc reads atomically, whether or not it is the allocator.
    unsafe { libmimalloc_sys::mi_option_set(MI_OPTION_PURGE_DELAY, -1) };
    let _ = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build_global();
}

/// Runs `f` on a thread of the pool, as every sequence of operations should: from another thread, each of their
/// parallel loops would begin by waking one up. It must not block on work that another thread gives the pool.
pub fn on_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| f())
}

/// `mi_option_purge_delay` of mimalloc.h (v3), which the binding does not name; -1 is never.
const MI_OPTION_PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
