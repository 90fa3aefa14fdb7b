//! How many bytes a training step needs, before it is tried.

use memory_bank::MemoryKind;
use ops::Precision;

use crate::{AnchorConfig, Compute, LayerShape};

/// A training pass whose bytes are asked for.
#[derive(Clone, Copy, Debug)]
pub struct TrainingShape {
    /// Sequences of a forward pass.
    pub micro_batch: usize,
    /// Tokens of a sequence.
    pub len: usize,
    /// What the memory is.
    pub memory_kind: MemoryKind,
    /// Sum of the widths of the memory blocks that a sequence fetches; in every layer.
    pub memory_width: usize,
    /// Parameters of all blocks that a step fetches.
    pub block_parameters: u64,
}

/// Bytes that training holds at its peak, by what they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainingBytes {
    /// Weights, gradients and both moments of the anchor.
    pub parameters: u64,
    /// Fetched blocks and their gradients, each twice: on the device, and as what is fetched or pushed.
    pub blocks: u64,
    /// Activations that the backward pass needs.
    pub activations: u64,
    /// The most that one operation holds beside them.
    pub workspace: u64,
}

impl TrainingBytes {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.parameters + self.blocks + self.activations + self.workspace
    }
}

impl AnchorConfig {
    /// The bytes of training on the CPU, where everything is f32 but the packed operands of products in bf16.
    pub fn training_bytes(&self, shape: TrainingShape, compute: Compute) -> TrainingBytes {
        let widening = if shape.memory_kind == MemoryKind::Ffn { shape.memory_width } else { 0 };
        let [v, d, l, f, r] =
            [self.vocab_size, self.d_model, self.n_layers, self.ffn_width + widening, shape.memory_width]
                .map(|x| x as u64);
        let rows = (shape.micro_batch * shape.len) as u64;
        // Both residuals, queries and keys before their norm, values, what attention mixed and its log-sum-exp, and
        // the products of the FFN; what comes out of a norm is computed again. And what a post-norm norms, twice.
        let post_norms = if self.form.post_norms { 2 } else { 0 };
        let block = |layer: LayerShape| {
            let [a, e, h, f] =
                [layer.query_width(), layer.kv_width(), layer.heads, layer.ffn_width + widening]
                    .map(|x| x as u64);
            // What lies between A and B of each matrix, or what attention mixed without the memory.
            let memory = match shape.memory_kind {
                MemoryKind::Kv if r > 0 => a,
                MemoryKind::Lora { .. } => r * shape.memory_kind.parts().len() as u64,
                MemoryKind::Ffn | MemoryKind::Kv => 0,
            };
            rows * ((2 + post_norms) * d + 2 * a + 2 * e + h + 2 * f + memory)
        };
        let largest = self.layers().map(block).max().unwrap_or(0);
        // The embedded tokens, and the last norm.
        let ends = 2 * rows * d;
        let activations = ends
            + match compute.checkpoint {
                true => l * rows * d,
                false => self.layers().map(block).sum(),
            };
        let packed = match compute.precision {
            Precision::F32 => 4,
            Precision::Bf16 => 2,
        };
        // The loss: logits, both packed forms of the output matrix, the gradient of the hidden states.
        let loss = 4 * ((ops::LOGIT_ROWS as u64).min(rows) * v + rows * d) + packed * 2 * v * d;
        // A block's FFN backward: hidden activations, gradients of both ends; weights and inputs packed. With
        // checkpoints all activations of the block were just computed again.
        let again = if compute.checkpoint { largest } else { 0 };
        let ffn = 4 * (again + rows * (f + 2 * d))
            + packed * (2 * rows * d + 3 * self.ffn_width as u64 * d + shape.block_parameters / l);
        TrainingBytes {
            parameters: 16 * self.n_parameters(),
            blocks: 16 * shape.block_parameters,
            activations: 4 * activations,
            workspace: loss.max(ffn),
        }
    }
}
