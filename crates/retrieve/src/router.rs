use cluster_tree::ClusterPath;

use crate::Result;

/// A path and the squared L2 distance from the embedding to the centroid of its leaf.
pub type Route = (ClusterPath, f32);

/// A text to route.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// The text itself: only the oracle looks at it.
    pub text: &'a str,
    /// Its embedding, `[D]`.
    pub embedding: &'a [f32],
}

/// Finds the leaves of a text. The same query gives the same routes, on any thread.
pub trait Router: Send + Sync {
    /// Dimension D of the embeddings that it routes.
    fn dim(&self) -> usize;

    /// The leaves of one text, best first, at least one. What is best is the router's to say: the
    /// distance is always that to the leaf's centroid.
    ///
    /// # Errors
    /// On an embedding of another dimension, or not finite.
    fn route(&self, query: Query<'_>) -> Result<Vec<Route>>;
}
