use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;

/// What a block's parameters are (method.md section 3). As text, also in files: `ffn`, `lora_qk`, `lora_vo`,
/// `lora_ffn` or `kv`.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum MemoryKind {
    /// Extra FFN width: M1, M2 `[r, d]` and M3 `[d, r]`.
    Ffn,
    /// W + αBA of rank r on some of the anchor's matrices, α = [`LORA_ALPHA`].
    Lora {
        /// Which matrices.
        on: LoraOn,
    },
    /// r pairs of a key and a value beside those of the attention, with a softmax of their own.
    Kv,
}

/// The matrices of a layer that LoRA memory is added to.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum LoraOn {
    /// Those that make queries and keys.
    Qk,
    /// Those that make values, and that of the attention's output.
    Vo,
    /// All three of the FFN.
    Ffn,
}

/// What LoRA memory is multiplied by: W + 2·BA.
pub const LORA_ALPHA: f32 = 2.0;

/// A part of the memory of one layer: what one place of the decoder uses.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum MemoryPart {
    /// FFN memory: `[M1, M2, M3]`, `[3, r, d]`, M3 stored transposed.
    Ffn,
    /// LoRA memory of one matrix `[O, I]`: A `[r, I]`, then B `[r, O]`, stored transposed.
    Lora(LoraMatrix),
    /// KV memory: keys, then values, `[2, r, width of keys]`.
    Kv,
}

/// A matrix that LoRA memory is added to.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum LoraMatrix {
    /// Makes queries.
    Query,
    /// Makes keys.
    Key,
    /// Makes values.
    Value,
    /// Makes the attention's output.
    Output,
    /// W1 of the FFN, under the activation.
    Gate,
    /// W2 of the FFN, beside it.
    Up,
    /// W3 of the FFN.
    Down,
}

/// Widths within a layer of the anchor.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerWidths {
    /// Of queries: heads times their width.
    pub query: usize,
    /// Of keys, and of values: heads of keys times their width.
    pub key_value: usize,
    /// Of a head.
    pub head: usize,
    /// Of the FFN.
    pub ffn: usize,
}

impl MemoryKind {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Ffn,
        Self::Lora { on: LoraOn::Qk },
        Self::Lora { on: LoraOn::Vo },
        Self::Lora { on: LoraOn::Ffn },
        Self::Kv,
    ];

    /// Its name, as text and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ffn => "ffn",
            Self::Lora { on: LoraOn::Qk } => "lora_qk",
            Self::Lora { on: LoraOn::Vo } => "lora_vo",
            Self::Lora { on: LoraOn::Ffn } => "lora_ffn",
            Self::Kv => "kv",
        }
    }

    /// The parts of a layer's memory, in their order.
    pub fn parts(self) -> &'static [MemoryPart] {
        use LoraMatrix::{Down, Gate, Key, Output, Query, Up, Value};
        use MemoryPart::Lora;
        match self {
            Self::Ffn => &[MemoryPart::Ffn],
            Self::Lora { on: LoraOn::Qk } => &[Lora(Query), Lora(Key)],
            Self::Lora { on: LoraOn::Vo } => &[Lora(Value), Lora(Output)],
            Self::Lora { on: LoraOn::Ffn } => &[Lora(Gate), Lora(Up), Lora(Down)],
            Self::Kv => &[MemoryPart::Kv],
        }
    }
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl From<MemoryKind> for String {
    fn from(kind: MemoryKind) -> Self {
        kind.name().to_owned()
    }
}

impl FromStr for MemoryKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
            let expected = Self::ALL.map(Self::name).join(", ");
            Error::Setting { field: "kind", expected: format!("one of {expected}"), found: name.to_owned() }
        })
    }
}

impl TryFrom<String> for MemoryKind {
    type Error = Error;

    fn try_from(name: String) -> Result<Self, Error> {
        name.parse()
    }
}

impl LoraMatrix {
    /// The widths I and O that the matrix `[O, I]` leads from and to, in a layer of these widths and of `d_model`.
    pub fn widths(self, d_model: usize, layer: LayerWidths) -> (usize, usize) {
        match self {
            Self::Query => (d_model, layer.query),
            Self::Key | Self::Value => (d_model, layer.key_value),
            Self::Output => (layer.query, d_model),
            Self::Gate | Self::Up => (d_model, layer.ffn),
            Self::Down => (layer.ffn, d_model),
        }
    }
}
