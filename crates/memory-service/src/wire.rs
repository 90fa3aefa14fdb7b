use bytes::Bytes;
use half::bf16;
use memory_bank::Values;
use serde::{Deserialize, Serialize};

use crate::codec::Payload;
use crate::proto;

/// The type of numbers on the wire. The bank itself holds f32.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// As the bank holds them: local and remote banks train to the same bits.
    #[default]
    F32,
    /// Rounded to their upper half, for half of the bytes.
    Bf16,
}

impl Dtype {
    /// Bytes of a number.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => size_of::<f32>(),
            Self::Bf16 => size_of::<bf16>(),
        }
    }

    pub(crate) fn zeros(self, len: usize) -> Values {
        match self {
            Self::F32 => Values::F32(vec![0.0; len]),
            Self::Bf16 => Values::Bf16(vec![bf16::ZERO; len]),
        }
    }

    /// A piece of f32 numbers as it goes over the wire.
    pub(crate) fn payload(self, piece: Bytes) -> Payload {
        match self {
            Self::F32 => Payload::Bytes(piece),
            Self::Bf16 => Payload::Rounded(piece),
        }
    }

    pub(crate) fn message(self) -> proto::Dtype {
        match self {
            Self::F32 => proto::Dtype::F32,
            Self::Bf16 => proto::Dtype::Bf16,
        }
    }

    /// What a request says; f32 when it says nothing, `None` of a type unknown here.
    pub(crate) fn of_message(dtype: i32) -> Option<Self> {
        match proto::Dtype::try_from(dtype).ok()? {
            proto::Dtype::Unspecified | proto::Dtype::F32 => Some(Self::F32),
            proto::Dtype::Bf16 => Some(Self::Bf16),
        }
    }
}
