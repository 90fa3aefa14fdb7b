use std::path::PathBuf;

use cluster_tree::ClusterId;
use memory_bank::LayerWidths;

/// What can go wrong in the anchor crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A size in the configuration that no model can have.
    #[error("anchor.{key}: {found} {problem}")]
    Config {
        /// The configuration key.
        key: &'static str,
        /// Its value.
        found: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A checkpoint made for another configuration.
    #[error("{}: tensor {tensor}: expected shape {expected:?}, found {found:?}", path.display())]
    Shape {
        /// The checkpoint file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A checkpoint that lacks a tensor, or has one too many.
    #[error("{}: tensor {tensor} is {problem}", path.display())]
    Tensor {
        /// The checkpoint file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// "missing" or "not part of this anchor".
        problem: &'static str,
    },
    /// A setting of a model folder that is wrong, or not supported.
    #[error("{}: {key}: expected {expected}, found {found}", path.display())]
    Setting {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A file that is not a readable anchor checkpoint.
    #[error("{}: {problem}", path.display())]
    File {
        /// The checkpoint file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A block that does not fit the specification.
    #[error("memory block {id:?}: expected {expected} values, found {found}")]
    BlockLength {
        /// The block.
        id: ClusterId,
        /// Values a block of its level has.
        expected: usize,
        /// Values given.
        found: usize,
    },
    /// A sequence's path leads to a block that was not given.
    #[error("memory block {id:?} of sequence {sequence} is not among the {n_blocks} fetched blocks")]
    BlockNotFetched {
        /// The block.
        id: ClusterId,
        /// Index of the sequence in the batch.
        sequence: usize,
        /// Blocks given.
        n_blocks: usize,
    },
    /// Memory made for an anchor of another shape.
    #[error(
        "memory of {found_layers} layers and d_model {found_width} for an anchor of {layers} and {width}"
    )]
    MemoryShape {
        /// Layers of the memory.
        found_layers: usize,
        /// d_model of the memory.
        found_width: usize,
        /// Layers of the anchor.
        layers: usize,
        /// d_model of the anchor.
        width: usize,
    },
    /// Memory made for an anchor whose layers have other widths.
    #[error("memory for a layer {layer} of {found:?}, the anchor's has {expected:?}")]
    MemoryWidths {
        /// The layer.
        layer: usize,
        /// Widths that the memory was made for.
        found: LayerWidths,
        /// Widths of the anchor's layer.
        expected: LayerWidths,
    },
    /// A batch whose parts disagree.
    #[error("batch of {batch} x {len} tokens: {what} has {found} entries")]
    Batch {
        /// Sequences.
        batch: usize,
        /// Positions per sequence.
        len: usize,
        /// The part that disagrees.
        what: &'static str,
        /// Its length.
        found: usize,
    },
    /// An anchor that a decoder cannot be made of.
    #[error("decoder: expected {what}, found {found}")]
    Decoder {
        /// What it is made of.
        what: &'static str,
        /// What it was given.
        found: String,
    },
    /// A part of a step that cannot be done.
    #[error("segment {segment} of a step: expected {what}, found {found}")]
    Segment {
        /// Its index.
        segment: usize,
        /// What it may be.
        what: &'static str,
        /// What it is.
        found: String,
    },
    /// From the sizes of a bank.
    #[error(transparent)]
    Bank(#[from] memory_bank::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;
