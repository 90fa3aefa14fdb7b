use std::sync::Arc;

use cluster_tree::{ClusterId, ClusterPath, ClusterTree};
use eval::tree_page::TreePage;
use memory_bank::{Encoded, Identity};
use retrieve::Retriever;

use super::{Ask, Bank, Banks, Error, Explained, MemoryStats, Reach, Result, Selected};

/// What a served run finds memory with. A clone is another handle.
#[derive(Clone)]
pub struct Retrieval(Arc<Inner>);

struct Inner {
    tree: Arc<ClusterTree>,
    banks: Banks,
}

/// What a [`Retrieval`] is made of.
pub struct RetrievalParts {
    /// Takes texts to paths.
    pub retriever: Retriever,
    /// The tree.
    pub tree: Arc<ClusterTree>,
    /// What banks must be: their spec and hashes. The seed is that of banks on shards, which do not tell theirs.
    pub identity: Identity,
    /// What clusters are about, when the corpus is there.
    pub page: Option<TreePage>,
    /// How shards and stores are reached.
    pub reach: Reach,
    /// Sizes.
    pub options: MemoryOptions,
}

/// Sizes of caches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryOptions {
    /// Most MiB of packed blocks, of all banks together.
    pub packed_mib: u64,
    /// Levels whose packed blocks stay once they are there.
    pub pinned_levels: Vec<usize>,
    /// Blocks that may wait to be fetched before anyone asks for them; 0 fetches none.
    pub prefetch: usize,
}

impl Default for MemoryOptions {
    fn default() -> Self {
        Self { packed_mib: 1024, pinned_levels: vec![], prefetch: 64 }
    }
}

/// A path for a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// The path.
    pub path: ClusterPath,
    /// Squared L2 distance to the centroid of its leaf.
    pub distance: f32,
    /// Cosine to the centroid of its leaf, −1 to 1; 0 when either has no length.
    pub score: f32,
}

impl Retrieval {
    /// Retrieval without banks, which are loaded next.
    ///
    /// # Errors
    /// On a tree, a spec and a page that do not belong to each other, and on options that do not fit.
    pub fn new(parts: RetrievalParts) -> Result<Self> {
        let RetrievalParts { tree, .. } = parts;
        Err(Error::Task(tree.hash()))
    }

    /// The paths of each text, best first, as many as the router names.
    ///
    /// # Errors
    /// On a blank text.
    pub async fn route(&self, texts: Vec<String>) -> Result<Vec<Vec<Route>>> {
        Err(Error::Task(texts.concat()))
    }

    /// The paths of each embedding, `[D]`, best first.
    ///
    /// # Errors
    /// On an embedding of another dimension or not finite.
    pub async fn route_embeddings(&self, rows: Vec<Vec<f32>>) -> Result<Vec<Vec<Route>>> {
        Err(Error::Task(rows.len().to_string()))
    }

    /// The embedding of each text, `[D]`, of unit length.
    ///
    /// # Errors
    /// Those of the embedder.
    pub async fn embed(&self, texts: Vec<String>) -> Result<Vec<Vec<f32>>> {
        Err(Error::Task(texts.concat()))
    }

    /// The memory that is asked for, fetched.
    ///
    /// # Errors
    /// On an unknown bank, a path that is not the tree's or is blocked, and when all tiers fail.
    pub async fn select(&self, ask: Ask) -> Result<Selected> {
        Err(Error::Task(ask.text))
    }

    /// Blocks as a bank's tiers hold them, in the order of `ids`; counted as fetched.
    ///
    /// # Errors
    /// As [`Bank::blocks`].
    pub async fn blocks(&self, bank: &Arc<Bank>, ids: &[ClusterId]) -> Result<Vec<Arc<Encoded>>> {
        bank.blocks(ids).await
    }

    /// What the cluster of these indices, one a level from the coarsest on, is about; of none, the root.
    ///
    /// # Errors
    /// On indices that no path of the tree has.
    pub fn explain(&self, prefix: &[u32]) -> Result<Explained> {
        Err(Error::Task(prefix.len().to_string()))
    }

    /// Times that each cluster's block was fetched for a request, by level, `[N]` each.
    pub fn fetches(&self) -> Vec<Vec<u64>> {
        vec![]
    }

    /// What was fetched so far.
    pub fn stats(&self) -> MemoryStats {
        MemoryStats::default()
    }

    /// The tree.
    pub fn tree(&self) -> &Arc<ClusterTree> {
        &self.0.tree
    }

    /// What clusters are about, when the corpus is there.
    pub fn page(&self) -> Option<&TreePage> {
        None
    }

    /// The banks that are loaded.
    pub fn banks(&self) -> &Banks {
        &self.0.banks
    }
}
