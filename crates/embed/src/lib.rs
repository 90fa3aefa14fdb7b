//! Text to unit vectors: what routes a text through the cluster tree.
//!
//! [`Hashed`] is the default and needs no download: TF-IDF over words and character n-grams, put
//! into a few hundred dimensions by a random projection. [`Static`] reads a model2vec folder: the
//! mean of a table's token vectors. Neither has a limit on the length of a text. An embedder of another
//! crate is an [`Embedder`] too; [`normalise`], [`sha256`] and [`table`] are there for it.
//!
//! Shapes: N texts, D embedding dimension, V tokens of a vocabulary.

mod embedder;
mod error;
mod hashed;
mod model2vec;
pub mod table;

pub use embedder::{Embedder, normalise, sha256};
pub use error::{Error, Result};
pub use hashed::{Hashed, HashedOptions};
pub use model2vec::Static;
