use cluster_tree::ClusterPath;
use embed::Embedder;
use rayon::prelude::*;

use crate::{Error, Query, Result, Route, Router};

/// Finds the paths of texts: one embedding a text, which a router takes to its leaves.
pub struct Retriever {
    embedder: Box<dyn Embedder>,
    router: Box<dyn Router>,
}

impl Retriever {
    /// A retriever of a tree's router.
    ///
    /// # Errors
    /// When embedder and router have different dimensions.
    pub fn new(embedder: Box<dyn Embedder>, router: Box<dyn Router>) -> Result<Self> {
        if embedder.dim() != router.dim() {
            return Err(Error::Dimension { embedder: embedder.dim(), tree: router.dim() });
        }
        Ok(Self { embedder, router })
    }

    /// The leaves of each text, best first, as many as its router names.
    ///
    /// # Errors
    /// When a text is blank, and those of the router.
    pub fn routes(&self, texts: &[&str]) -> Result<Vec<Vec<Route>>> {
        let embeddings = self.embed(texts)?;
        let rows = embeddings.chunks_exact(self.dim());
        let queries = texts.iter().zip(rows).map(|(text, embedding)| Query { text, embedding });
        self.route(&queries.collect::<Vec<_>>())
    }

    /// Dimension D of the embeddings.
    pub fn dim(&self) -> usize {
        self.router.dim()
    }

    /// The embeddings of texts, `[N, D]`, each of unit length.
    ///
    /// # Errors
    /// When a text is blank.
    pub fn embed(&self, texts: &[&str]) -> Result<Vec<f32>> {
        match texts.iter().position(|text| text.trim().is_empty()) {
            Some(index) => Err(Error::EmptyText { index }),
            None => Ok(self.embedder.embed(texts)?),
        }
    }

    /// As [`Retriever::routes`], of texts that are embedded already.
    ///
    /// # Errors
    /// Those of the router.
    pub fn route(&self, queries: &[Query<'_>]) -> Result<Vec<Vec<Route>>> {
        // Collected before they are judged: the error is that of the first text, whichever thread is first.
        let routes: Vec<Result<Vec<Route>>> =
            queries.par_iter().map(|&query| self.router.route(query)).collect();
        routes.into_iter().collect()
    }

    /// The best path of each text.
    ///
    /// # Errors
    /// As [`Retriever::routes`].
    pub fn paths(&self, texts: &[&str]) -> Result<Vec<ClusterPath>> {
        let best = |(index, routes): (usize, Vec<Route>)| {
            let first = routes.into_iter().next();
            first.map(|(path, _)| path).ok_or(Error::NoRoute { index })
        };
        self.routes(texts)?.into_iter().enumerate().map(best).collect()
    }
}
