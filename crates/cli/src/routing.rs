//! The routers of a run, and what they are made from.

use anyhow::{Context, Result};
use corpus::{Embeddings, TokenStore};
use kmeans::Matrix;
use retrieve::{Beam, Exact, Hnsw, PrototypeOptions, Prototypes, Random, Route, Router};

use crate::config::RouterKind;
use crate::run::Run;

/// The windows of a run's prepared corpus with their embeddings and leaves.
pub(crate) struct Windows {
    pub(crate) store: TokenStore,
    embeddings: Embeddings,
    dim: usize,
    /// The leaf that each window is packed in.
    pub(crate) leaves: Vec<u32>,
}

impl Windows {
    /// Fails when the folder is gone, or holds another corpus than the run was trained on.
    pub(crate) fn open(run: &Run) -> Result<Self> {
        run.corpus()?;
        let (dir, dim) = (&run.config.corpus.prepared, run.tree.dim());
        let store = TokenStore::open(dir)?;
        let embeddings = Embeddings::open(dir, store.n_windows(), dim)?;
        // As `prepare` packed them.
        let leaves = kmeans::assign(&run.tree, &Matrix::new(&embeddings, dim)?, run.config.tree.beam)?;
        Ok(Self { store, embeddings, dim, leaves })
    }

    /// `[D]`.
    pub(crate) fn embedding(&self, window: usize) -> &[f32] {
        &self.embeddings[window * self.dim..][..self.dim]
    }

    /// The windows of training documents, or of those held out.
    pub(crate) fn of(&self, held_out: bool) -> Result<Vec<usize>> {
        let mut found = vec![];
        for window in 0..self.store.n_windows() {
            if self.store.is_validation(self.store.window(window)?.document)? == held_out {
                found.push(window);
            }
        }
        Ok(found)
    }
}

/// Candidates a level that a beam keeps, and leaves that other routers name.
pub(crate) fn width(run: &Run) -> usize {
    run.config.retrieve.beam.unwrap_or(run.config.tree.beam)
}

/// The best of a query's routes.
pub(crate) fn first(routes: Vec<Route>) -> Result<Route> {
    routes.into_iter().next().context("expected a router to name a leaf, found none")
}

/// The router of a kind, with the options of the run's section [retrieve].
pub(crate) fn router(run: &Run, kind: RouterKind) -> Result<Box<dyn Router>> {
    let section = &run.config.retrieve;
    let (tree, n) = (run.tree.clone(), width(run));
    Ok(match kind {
        RouterKind::Beam => Box::new(Beam::new(tree, n)?),
        RouterKind::Exact => Box::new(Exact::new(tree, n)?),
        RouterKind::Hnsw => Box::new(Hnsw::new(tree, section.hnsw(n))?),
        RouterKind::Random => Box::new(Random::new(tree, section.seed)),
        RouterKind::Prototypes => {
            let windows = Windows::open(run)
                .context("retrieve.router = \"prototypes\" is made from the prepared corpus")?;
            Box::new(prototypes(run, &windows)?)
        }
    })
}

/// Prototypes of the training windows.
pub(crate) fn prototypes(run: &Run, windows: &Windows) -> Result<Prototypes> {
    let section = &run.config.retrieve;
    let options = PrototypeOptions { per_leaf: section.prototypes, seed: section.seed, n: width(run) };
    let training = windows.of(false)?;
    let rows: Vec<f32> = training.iter().flat_map(|&window| windows.embedding(window)).copied().collect();
    let leaves: Vec<u32> = training.iter().map(|&window| windows.leaves[window]).collect();
    Ok(Prototypes::fit(run.tree.clone(), (&rows, &leaves), options)?)
}
