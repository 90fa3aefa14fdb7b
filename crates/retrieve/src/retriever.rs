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
        if let Some(index) = texts.iter().position(|text| text.trim().is_empty()) {
            return Err(Error::EmptyText { index });
        }
        let embeddings = self.embedder.embed(texts)?;
        let rows = embeddings.par_chunks_exact(self.router.dim());
        let route = |(text, embedding): (&&str, _)| self.router.route(Query { text, embedding });
        // Collected before they are judged: the error is that of the first text, whichever thread is first.
        let routes: Vec<Result<Vec<Route>>> = texts.par_iter().zip(rows).map(route).collect();
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
