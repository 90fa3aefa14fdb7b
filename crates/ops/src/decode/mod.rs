//! Operations of a decoder that generates: forward only, over plain f32 rows, with weights packed once.
//!
//! The N rows of a step are the tokens that several sequences add, one sequence after another. A row's result
//! depends on its own sequence only, to the bit: neither on the rows beside it, nor on how its prompt is cut
//! into steps, nor on threads.

mod attention;
mod ffn;
mod kv_memory;
mod lora;
mod matrix;
mod norm;

pub use crate::math::soft_cap;
pub use attention::{Attending, KvPages, KvShape, Reading, SequenceCache};
pub use ffn::{FfnLoraRuns, FfnRun, FfnWeights, add_ffn, add_ffn_lora};
pub use kv_memory::{KvRun, KvWeights, add_kv_memory};
pub use lora::{LoraRun, LoraWeights, Place, add_lora};
pub use matrix::{Held, Matrix};
pub use norm::{add_rms_norm_rows, norm_rope_rows, rms_norm_rows};

/// Steps of fewer rows are not worth a parallel loop over them.
const FEW_ROWS: usize = 16;
