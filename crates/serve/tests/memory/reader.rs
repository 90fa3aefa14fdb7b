//! An embedder that reads vectors, and retrieval with it over the made-up tree.

use embed::Embedder;
use memory_bank::Identity;
use retrieve::{Beam, Retriever};
use serve::memory::{MemoryOptions, Reach, Retrieval, RetrievalParts};

use crate::made_up::{identity, tree};

/// Reads `"x y"`: the vector itself.
pub(crate) struct Numbers;

impl Embedder for Numbers {
    fn dim(&self) -> usize {
        2
    }

    fn fingerprint(&self) -> &str {
        "numbers"
    }

    fn embed(&self, texts: &[&str]) -> embed::Result<Vec<f32>> {
        Ok(texts.iter().flat_map(|text| text.split(' ').map(|part| part.parse().unwrap())).collect())
    }
}

pub(crate) fn retrieval(options: MemoryOptions) -> Retrieval {
    retrieval_of(identity(), options)
}

pub(crate) fn retrieval_of(identity: Identity, options: MemoryOptions) -> Retrieval {
    let retriever = Retriever::new(Box::new(Numbers), Box::new(Beam::new(tree(), 2).unwrap())).unwrap();
    let reach = Reach { bank: "made-up".to_owned(), ..Reach::default() };
    Retrieval::new(RetrievalParts { retriever, tree: tree(), identity, page: None, reach, options }).unwrap()
}
