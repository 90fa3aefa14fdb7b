//! Text to unit vectors: what routes a text through the cluster tree.
//!
//! [`Hashed`] is the default and needs no download: TF-IDF over words and character n-grams, put
//! into a few hundred dimensions by a random projection. [`Static`] reads a model2vec folder: the
//! mean of a table's token vectors. Neither has a limit on the length of a text.
//!
//! Shapes: N texts, D embedding dimension, V tokens of a vocabulary.

mod embedder;
mod error;
mod hashed;
mod model2vec;
mod table;

pub use embedder::Embedder;
pub use error::{Error, Result};
pub use hashed::{Hashed, HashedOptions};
pub use model2vec::Static;
