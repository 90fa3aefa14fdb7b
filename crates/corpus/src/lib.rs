//! Documents in, tokens packed by leaf out.
//!
//! ```text
//! source      jsonl, txt, parquet, plain or .gz/.zst, from local paths and object stores -> Document
//! tokenizer   text <-> token ids: byte-level BPE, trained here or loaded
//! prepared    the prepared folder: the stages `tokenise` and `pack`, and Corpus, which reads the result
//! facts       a closed world of known facts, to measure what a model remembers
//! ```
//!
//! Reading blocks the thread that asks; nothing here has to be called from an async context, and
//! nothing reads the environment.

mod batch;
mod error;
pub mod facts;
pub mod prepared;
pub mod source;
mod text_stream;
pub mod tokenizer;

pub use batch::{Batch, IGNORE};
pub use error::{Error, Result};
pub use prepared::corpus::{Corpus, Sequence};
pub use prepared::embeddings::{EmbeddingWriter, Embeddings};
pub use prepared::files::lock;
pub use prepared::fingerprint::Fingerprint;
pub use prepared::pack::{PackOptions, PackSummary, pack};
pub use prepared::stages::{begin_stage, finish_stage, hash_inputs, stage_is_current, stage_is_finished};
pub use prepared::tokenise::{TokeniseOptions, TokeniseProgress, TokeniseSummary, tokenise};
pub use prepared::tokens::{TokenStore, Window};
pub use source::{
    Document, Documents, FileRecord, Format, SourceFile, SourceOptions, TxtSplit, copy, list, list_held_out,
    read,
};
pub use text_stream::TextStream;
pub use tokenizer::Tokenizer;
