//! The anchor model: a decoder whose FFNs widen by the memory it is given (arXiv 2510.02375 §3).
//!
//! Which decoder it is, is data: [`AnchorConfig`] and its [`Form`]. Native anchors are the default; [`hf`] reads and
//! writes folders of open models.
//!
//! It does not know where its memory came from: [`FetchedMemory`] is a set of unique blocks and, for each
//! sequence of a batch, which of them it uses.
//!
//! Shapes: B batch, T sequence, D d_model, H heads, G of them with keys and values of their own, K head width, F FFN
//! width, R memory width, V vocabulary, U unique blocks.

mod bytes;
mod cache;
mod config;
mod decoder;
mod error;
mod file;
mod form;
pub mod hf;
mod init;
pub mod llama2c;
mod memory;
mod model;
mod weights;

pub use bytes::{TrainingBytes, TrainingShape};
pub use cache::KvCache;
pub use config::{AnchorConfig, LayerShape};
pub use decoder::{
    Decoder, DecoderOptions, KvPages, Logits, PackedBlock, PathMemory, Scores, Segment, SequenceCache,
};
pub use error::{Error, Result};
pub use form::{AttentionBias, AttentionForm, Form, LayerSizes, LocalLayers, QkNorm, RopeScaling, Rotation};
pub use memory::{FetchedMemory, unique_ids};
pub use model::{Anchor, Compute, Input, Targets};
pub use ops::{Activation, Gradients, Precision};
