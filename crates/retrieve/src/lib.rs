//! Text → embedding → cluster path, which names the memory blocks to fetch.

use cluster_tree::{ClusterPath, ClusterTree};
use embed::Embedder;

/// What can go wrong while retrieving.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tree was built on embeddings of another width.
    #[error("embedder of {embedder} dimensions for a cluster tree of {tree}")]
    Dimension {
        /// Dimensions of the embedder.
        embedder: usize,
        /// Dimensions of the tree's centroids.
        tree: usize,
    },
    /// A text to route is empty or blank.
    #[error("text {index} is empty, expected something to route by")]
    EmptyText {
        /// Index of the text in the call.
        index: usize,
    },
    /// From the embedder.
    #[error(transparent)]
    Embed(#[from] embed::Error),
    /// From the tree.
    #[error(transparent)]
    Tree(#[from] cluster_tree::Error),
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Finds the path of a text: one embedding, one beam descent of the tree.
pub struct Router {
    embedder: Box<dyn Embedder>,
    tree: ClusterTree,
    beam: usize,
}

/// A path and the squared L2 distance from the text to its leaf's centroid.
pub type Route = (ClusterPath, f32);

impl Router {
    /// A router that keeps `beam` candidates a level (1 is greedy descent).
    ///
    /// # Errors
    /// When embedder and tree have different dimensions.
    pub fn new(embedder: Box<dyn Embedder>, tree: ClusterTree, beam: usize) -> Result<Self> {
        if embedder.dim() != tree.dim() {
            return Err(Error::Dimension { embedder: embedder.dim(), tree: tree.dim() });
        }
        Ok(Self { embedder, tree, beam })
    }

    /// The tree that is descended.
    pub fn tree(&self) -> &ClusterTree {
        &self.tree
    }

    /// The nearest leaves of each text, best first, up to the beam width.
    ///
    /// # Errors
    /// When a text is blank.
    pub fn routes(&self, texts: &[&str]) -> Result<Vec<Vec<Route>>> {
        let embeddings = self.embed(texts)?;
        let rows = embeddings.chunks_exact(self.tree.dim());
        Ok(rows.map(|row| self.tree.beam(row, self.beam)).collect::<cluster_tree::Result<_>>()?)
    }

    /// The best path of each text.
    ///
    /// # Errors
    /// As [`Router::routes`].
    pub fn paths(&self, texts: &[&str]) -> Result<Vec<ClusterPath>> {
        let embeddings = self.embed(texts)?;
        let best = |row: &[f32]| -> Result<ClusterPath> {
            Ok(match self.beam {
                1 => self.tree.descend(row)?,
                width => self.tree.beam(row, width)?.swap_remove(0).0,
            })
        };
        embeddings.chunks_exact(self.tree.dim()).map(best).collect()
    }

    fn embed(&self, texts: &[&str]) -> Result<Vec<f32>> {
        match texts.iter().position(|text| text.trim().is_empty()) {
            Some(index) => Err(Error::EmptyText { index }),
            None => Ok(self.embedder.embed(texts)?),
        }
    }
}
