//! Texts to unit vectors by a BERT of sentence-transformers (arXiv 1908.10084): a transformer encoder,
//! and the mean, the first or the maximum of its rows.
//!
//! [`open`] takes a folder or the id of a model on the Hugging Face hub; [`folder`] fetches a model of
//! another kind from there.
//!
//! Shapes: N rows (word pieces with their special tokens, sequences packed one after another), D width
//! of the model and of the embeddings, V word pieces of the vocabulary.

mod embedder;
mod error;
mod hub;
mod model;
mod settings;
mod weights;

pub use embedder::Bert;
pub use error::{Error, Result};
pub use hub::{FILES, folder, open};
