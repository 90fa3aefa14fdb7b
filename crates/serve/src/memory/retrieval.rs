use std::sync::{Arc, OnceLock};
use std::time::Instant;

use cluster_tree::{ClusterId, ClusterPath, ClusterTree};
use eval::tree_page::TreePage;
use memory_bank::{Encoded, Identity};
use retrieve::{Exact, Query, Retriever};

use super::blocked::of_indices;
use super::counts::Fetches;
use super::explain::Explainer;
use super::packed::Packed;
use super::prefetch::Prefetch;
use super::select::{Choice, choose, likely_next};
use super::{Ask, Bank, Banks, Error, Explained, Memory, MemoryStats, Reach, Result, Selected, blocking};

/// Blocks that one request has fetched ahead, at most.
const AHEAD: usize = 16;

/// What a served run finds memory with. A clone is another handle. Its functions need a tokio runtime.
#[derive(Clone)]
pub struct Retrieval(Arc<Inner>);

struct Inner {
    retriever: Retriever,
    tree: Arc<ClusterTree>,
    exact: Exact,
    page: OnceLock<TreePage>,
    identity: Identity,
    banks: Banks,
    packed: Arc<Packed>,
    fetches: Arc<Fetches>,
    prefetch: Arc<Prefetch>,
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
    /// On a tree, a retriever, a spec and a page that do not belong to each other, and on pinned levels that have no
    /// memory.
    pub fn new(parts: RetrievalParts) -> Result<Self> {
        let RetrievalParts { retriever, tree, identity, page, reach, options } = parts;
        identity.spec.validate()?;
        let branching: Vec<usize> = (0..tree.n_levels()).map(|level| tree.branching(level)).collect();
        let wrong = |name, expected: String, found: String| Err(Error::Setting { name, expected, found });
        if identity.spec.branching != branching {
            let (expected, found) = (format!("{branching:?}, as of the tree"), &identity.spec.branching);
            return wrong("branching of the bank's spec", expected, format!("{found:?}"));
        }
        if retriever.dim() != tree.dim() {
            return wrong("dimension of the retriever", tree.dim().to_string(), retriever.dim().to_string());
        }
        let levels: Vec<usize> = identity.spec.levels().collect();
        if !options.pinned_levels.iter().all(|level| levels.contains(level)) {
            let expected = format!("some of the levels {levels:?}");
            return wrong("pinned_levels", expected, format!("{:?}", options.pinned_levels));
        }
        let limit = options.packed_mib.saturating_mul(1 << 20);
        let packed = Arc::new(Packed::new(limit, options.pinned_levels, tree.n_levels()));
        let fetches = Arc::new(Fetches::new(&tree));
        let banks = Banks::new(identity.clone(), reach, Arc::clone(&packed), Arc::clone(&fetches));
        let (exact, prefetch) =
            (Exact::new(Arc::clone(&tree), 1)?, Arc::new(Prefetch::new(options.prefetch)));
        let inner = Inner {
            retriever,
            tree,
            exact,
            page: OnceLock::new(),
            identity,
            banks,
            packed,
            fetches,
            prefetch,
        };
        let retrieval = Self(Arc::new(inner));
        page.map_or(Ok(()), |page| retrieval.set_page(page))?;
        Ok(retrieval)
    }

    /// What clusters are about, told once it is known; a second one is left.
    ///
    /// # Errors
    /// On a page of another tree.
    pub fn set_page(&self, page: TreePage) -> Result<()> {
        let tree = &self.0.tree;
        let branching: Vec<usize> = (0..tree.n_levels()).map(|level| tree.branching(level)).collect();
        if page.branching != branching {
            let (name, expected) = ("branching of the page", format!("{branching:?}, as of the tree"));
            return Err(Error::Setting { name, expected, found: format!("{:?}", page.branching) });
        }
        // Whoever came first has told the same.
        let _ = self.0.page.set(page);
        Ok(())
    }

    /// The paths of each text, best first, as many as the router names.
    ///
    /// # Errors
    /// On a blank text.
    pub async fn route(&self, texts: Vec<String>) -> Result<Vec<Vec<Route>>> {
        let inner = Arc::clone(&self.0);
        blocking(move || {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            let embeddings = inner.retriever.embed(&texts)?;
            let rows = embeddings.chunks_exact(inner.tree.dim());
            let queries = texts.iter().zip(rows).map(|(text, embedding)| Query { text, embedding });
            inner.route(&queries.collect::<Vec<_>>())
        })
        .await
    }

    /// The paths of each embedding, `[D]`, best first. An oracle, which goes by texts, knows none.
    ///
    /// # Errors
    /// On an embedding of another dimension or not finite.
    pub async fn route_embeddings(&self, rows: Vec<Vec<f32>>) -> Result<Vec<Vec<Route>>> {
        let inner = Arc::clone(&self.0);
        blocking(move || {
            let expected = inner.tree.dim();
            if let Some((row, found)) = rows.iter().enumerate().find(|(_, row)| row.len() != expected) {
                return Err(Error::Dimension { row, expected, found: found.len() });
            }
            let queries: Vec<Query<'_>> =
                rows.iter().map(|embedding| Query { text: "", embedding }).collect();
            inner.route(&queries)
        })
        .await
    }

    /// The embedding of each text, `[D]`, of unit length.
    ///
    /// # Errors
    /// On a blank text.
    pub async fn embed(&self, texts: Vec<String>) -> Result<Vec<Vec<f32>>> {
        let inner = Arc::clone(&self.0);
        blocking(move || {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            let embeddings = inner.retriever.embed(&texts)?;
            Ok(embeddings.chunks_exact(inner.tree.dim()).map(<[f32]>::to_vec).collect())
        })
        .await
    }

    /// The memory that is asked for, fetched. When all leaves are blocked it is the generic path's, and none when the
    /// bank tells that this was never trained.
    ///
    /// # Errors
    /// On an unknown bank, a blank text to route, a path that is not the tree's or is blocked, and when all tiers
    /// fail.
    pub async fn select(&self, ask: Ask) -> Result<Selected> {
        let begin = Instant::now();
        let inner = &*self.0;
        if ask.memory == Memory::Off {
            return Ok(Selected::default());
        }
        let bank = inner.banks.get(ask.bank.as_deref().unwrap_or(Banks::DEFAULT))?;
        let (choice, candidates) = self.find(&bank, ask).await?;
        let route_ms = begin.elapsed().as_secs_f64() * 1e3;
        let blocked = choice.passed;
        let Some(path) = choice.path else {
            return Ok(Selected { blocked, route_ms, ..Selected::default() });
        };
        let busy = inner.prefetch.busy();
        let (memory, fetched) = bank.path_memory(&path).await?;
        drop(busy);
        if inner.prefetch.is_on() && !candidates.is_empty() && !path.is_generic() {
            let next = likely_next(&inner.tree, &path, &candidates, AHEAD);
            let is_missing = |id: &ClusterId| bank.spec().check(*id).is_ok() && !inner.packed.has(&bank, *id);
            inner.prefetch.begin(&bank, next.into_iter().filter(is_missing).collect());
        }
        let bank_version = Some(bank.version().step);
        let (path, bank) = (Some(path), Some(bank));
        let (fetch_ms, cached) = (fetched.ms, fetched.levels);
        Ok(Selected { memory, path, blocked, bank, bank_version, route_ms, fetch_ms, cached })
    }

    /// Blocks as a bank's tiers hold them, in the order of `ids`; counted as fetched.
    ///
    /// # Errors
    /// As [`Bank::blocks`].
    pub async fn blocks(&self, bank: &Arc<Bank>, ids: &[ClusterId]) -> Result<Vec<Arc<Encoded>>> {
        let _busy = self.0.prefetch.busy();
        bank.blocks(ids).await
    }

    /// What the cluster of these indices, one a level from the coarsest on, is about; of none, the root. Updates are
    /// those of the default bank, or of the first by name when there is no such.
    ///
    /// # Errors
    /// On indices that no path of the tree has.
    pub fn explain(&self, prefix: &[u32]) -> Result<Explained> {
        let inner = &*self.0;
        let first = || inner.banks.list().first().and_then(|bank| inner.banks.get(&bank.name).ok());
        let bank = inner.banks.get(Banks::DEFAULT).ok().or_else(first);
        let (page, bank) = (inner.page.get(), bank.as_deref());
        let explainer = Explainer { tree: &inner.tree, page, bank, fetches: &inner.fetches };
        match prefix.is_empty() {
            true => Ok(explainer.root()),
            false => Ok(explainer.cluster(of_indices(&inner.tree, prefix)?)),
        }
    }

    /// Times that each cluster's block was fetched for a request, by level, `[N]` each.
    pub fn fetches(&self) -> Vec<Vec<u64>> {
        self.0.fetches.all()
    }

    /// What was fetched so far.
    pub fn stats(&self) -> MemoryStats {
        let [prefetched, prefetch_dropped, prefetch_failed] = self.0.prefetch.counts();
        let (packed, banks) = (self.0.packed.stats(), self.0.banks.stats());
        MemoryStats { packed, banks, prefetched, prefetch_dropped, prefetch_failed }
    }

    /// The tree.
    pub fn tree(&self) -> &Arc<ClusterTree> {
        &self.0.tree
    }

    /// What banks must be.
    pub fn identity(&self) -> &Identity {
        &self.0.identity
    }

    /// What clusters are about, when the corpus is there.
    pub fn page(&self) -> Option<&TreePage> {
        self.0.page.get()
    }

    /// The banks that are loaded.
    pub fn banks(&self) -> &Banks {
        &self.0.banks
    }

    /// The path that is asked for, and the blocked prefixes that were passed over.
    pub(super) async fn path(&self, bank: &Bank, ask: Ask) -> Result<(Option<ClusterPath>, Vec<String>)> {
        let Choice { path, passed } = self.find(bank, ask).await?.0;
        Ok((path, passed))
    }

    /// The path that is asked for, and for a text all that its router names.
    async fn find(&self, bank: &Bank, ask: Ask) -> Result<(Choice, Vec<retrieve::Route>)> {
        let inner = &*self.0;
        match ask.memory {
            Memory::Off => Ok((Choice { path: None, passed: vec![] }, vec![])),
            Memory::Generic => {
                let path = Some(ClusterPath::generic(inner.tree.n_levels())?);
                Ok((Choice { path, passed: vec![] }, vec![]))
            }
            Memory::Path(path) => Ok((inner.check(path, &ask.blocked)?, vec![])),
            Memory::Auto => {
                let (choice, candidates) = self.choose(ask.text, ask.blocked).await?;
                let path = choice.path.or_else(|| inner.trained_generic(bank));
                Ok((Choice { path, ..choice }, candidates))
            }
        }
    }

    /// The path of a text that may be used, and all that its router names.
    async fn choose(
        &self,
        text: String,
        blocked: Arc<super::Blocked>,
    ) -> Result<(Choice, Vec<retrieve::Route>)> {
        let inner = Arc::clone(&self.0);
        blocking(move || {
            let embedding = inner.retriever.embed(&[&text])?;
            let query = Query { text: &text, embedding: &embedding };
            let candidates = inner.retriever.route(&[query])?.pop().unwrap_or_default();
            let choice = choose((&inner.tree, &inner.exact), &embedding, &candidates, &blocked)?;
            Ok((choice, candidates))
        })
        .await
    }
}

impl Inner {
    fn route(&self, queries: &[Query<'_>]) -> Result<Vec<Vec<Route>>> {
        let routes = self.retriever.route(queries)?;
        let scored = |(query, routes): (&Query<'_>, Vec<retrieve::Route>)| {
            let route = |(path, distance): retrieve::Route| {
                let score = cosine(query.embedding, self.tree.centroid(path.leaf())?);
                Ok(Route { path, distance, score })
            };
            routes.into_iter().map(route).collect()
        };
        queries.iter().zip(routes).map(scored).collect()
    }

    /// A path that was asked for.
    fn check(&self, path: ClusterPath, blocked: &super::Blocked) -> Result<Choice> {
        let expected = self.tree.n_levels();
        if path.n_levels() != expected {
            let expected = format!("a path of {expected} levels");
            return Err(Error::UnknownPath { found: path.to_string(), expected });
        }
        if !path.is_generic() {
            of_indices(&self.tree, &Vec::from(path.clone()))?;
        }
        match blocked.prefix_of(&path) {
            Some(prefix) => Err(Error::BlockedPath { path, prefix }),
            None => Ok(Choice { path: Some(path), passed: vec![] }),
        }
    }

    /// The generic path, unless the bank tells that none of its blocks was ever updated.
    fn trained_generic(&self, bank: &Bank) -> Option<ClusterPath> {
        let path = ClusterPath::generic(self.tree.n_levels()).ok()?;
        let is_trained = path.ids().any(|id| bank.spec().check(id).is_ok() && bank.updates(id) != Some(0));
        is_trained.then_some(path)
    }
}

/// Of two vectors, −1 to 1; 0 when one has no length.
fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let lengths = (dot(a, a) * dot(b, b)).sqrt();
    if lengths > 0.0 { (dot(a, b) / lengths) as f32 } else { 0.0 }
}
