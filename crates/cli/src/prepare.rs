//! The four stages of a prepared corpus: tokenise, embed, cluster, pack. A stage whose inputs are
//! unchanged is skipped; a killed one goes on or begins again.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use cluster_tree::ClusterTree;
use corpus::{
    EmbeddingWriter, Embeddings, PackOptions, TokenStore, TokeniseOptions, Tokenizer, begin_stage,
    finish_stage, hash_inputs, stage_is_current,
};
use embed::{Embedder, Hashed, HashedOptions, Static};
use rayon::prelude::*;

use crate::config::{Config, EmbedKind};
use crate::progress::Progress;

/// Windows embedded at a time.
const EMBED_BATCH: usize = 4096;

/// Where the stages leave their files.
pub(crate) struct Prepared {
    pub(crate) dir: PathBuf,
}

impl Prepared {
    pub(crate) fn of(config: &Config) -> Self {
        Self { dir: config.corpus.prepared.clone() }
    }

    pub(crate) fn tokenizer(&self) -> PathBuf {
        self.dir.join("tokenizer.json")
    }

    pub(crate) fn tree(&self) -> PathBuf {
        self.dir.join("tree.safetensors")
    }

    pub(crate) fn hashed(&self) -> PathBuf {
        self.dir.join("embedder.safetensors")
    }
}

/// The embedder of a finished `embed` stage, from `hashed` or what the configuration names.
pub(crate) fn load_embedder(config: &Config, hashed: &Path) -> Result<Box<dyn Embedder>> {
    match named_embedder(config)? {
        Some(embedder) => Ok(embedder),
        None => Ok(Box::new(Hashed::load(hashed)?)),
    }
}

/// The embedder that the configuration names, from a folder or the Hugging Face hub; none if it is fitted on the
/// corpus.
pub(crate) fn named_embedder(config: &Config) -> Result<Option<Box<dyn Embedder>>> {
    /// A model2vec folder, the file that no folder lacks last.
    const STATIC_FILES: [&str; 2] = ["tokenizer.json", "model.safetensors"];
    let name = config.embed.path.as_deref();
    let embedder: Box<dyn Embedder> = match (config.embed.kind, name) {
        (EmbedKind::Static, Some(name)) => Box::new(Static::load(&bert::folder(name, &STATIC_FILES)?)?),
        (EmbedKind::Bert, Some(name)) => Box::new(bert::open(name)?),
        _ => return Ok(None),
    };
    Ok(Some(embedder))
}

/// Brings the prepared folder up to date.
pub(crate) fn prepare(config: &Config) -> Result<Prepared> {
    let prepared = Prepared::of(config);
    let _held = corpus::lock(&prepared.dir)?;
    let tokens = tokenise(config, &prepared)?;
    let (embeddings, embedder) = embed(config, &prepared, &tokens)?;
    let tree = cluster(config, &prepared, &embeddings, &*embedder)?;
    pack(config, &prepared, &tree, &*embedder)?;
    Ok(prepared)
}

/// The part of a fingerprint that says how texts were routed.
pub(crate) fn tree_hash(tree: &ClusterTree, beam: usize) -> String {
    hash_inputs(&[tree.hash(), format!("beam {beam}")])
}

/// Runs a stage unless `inputs` are those it was finished with.
fn stage(prepared: &Prepared, name: &str, inputs: &str, run: impl FnOnce() -> Result<String>) -> Result<()> {
    if stage_is_current(&prepared.dir, name, inputs)? {
        eprintln!("{name:>18}: up to date");
        return Ok(());
    }
    begin_stage(&prepared.dir, name)?;
    let progress = Progress::new(name, 1);
    let summary = run()?;
    finish_stage(&prepared.dir, name, inputs)?;
    progress.finish(summary);
    Ok(())
}

fn tokenise(config: &Config, prepared: &Prepared) -> Result<String> {
    let c = &config.corpus;
    let source = c.source();
    let mut parts = vec!["tokenise.v1".to_string()];
    let files = corpus::list(&source)?;
    for file in files.iter().chain(&corpus::list_held_out(&source, &files)?) {
        parts.push(serde_json::to_string(&file)?);
    }
    parts.push(serde_json::to_string(&(&c.text_key, &c.id_key, &c.label_key, c.format, c.txt_split))?);
    parts.push(format!("{:?}", (c.vocab_size, c.tokenizer_sample_mib, c.window, c.validation_permille)));
    parts.push(c.validation_files.join("\n"));
    let given = config.tokenizer()?.map(|path| Tokenizer::load(&path)).transpose()?;
    if let Some(tokenizer) = &given {
        config.check_vocabulary(tokenizer)?;
        parts.push(tokenizer.hash().to_string());
        parts.extend(tokenizer.bos().map(|bos| format!("begins with {bos}")));
    }
    let inputs = hash_inputs(&parts);
    stage(prepared, "tokenise", &inputs, || {
        let tokenizer = match given {
            Some(tokenizer) => tokenizer,
            None => train_tokenizer(config)?,
        };
        tokenizer.save(&prepared.tokenizer())?;
        let options = TokeniseOptions { window: c.window, validation_permille: c.validation_permille };
        let mut progress = Progress::new("tokenise", 1);
        let report = &mut |p: corpus::TokeniseProgress| {
            progress
                .set(p.bytes_done, p.bytes, || format!("{} documents, {} tokens", p.n_documents, p.n_tokens));
        };
        let s = corpus::tokenise(&source, &tokenizer, &prepared.dir, &options, report)?;
        Ok(format!(
            "{} documents ({} held out), {} windows, {} tokens of a vocabulary of {}",
            s.n_documents,
            s.n_validation_documents,
            s.n_windows,
            s.n_tokens,
            tokenizer.vocab_size()
        ))
    })?;
    Ok(inputs)
}

fn train_tokenizer(config: &Config) -> Result<Tokenizer> {
    let source = config.corpus.source();
    let mut files = corpus::list(&source)?.into_iter();
    let mut current: Option<corpus::Documents> = None;
    let texts = std::iter::from_fn(move || {
        loop {
            if let Some(document) = current.as_mut().and_then(Iterator::next) {
                return Some(document.map(|document| document.text));
            }
            match corpus::read(&files.next()?, &source) {
                Ok(documents) => current = Some(documents),
                Err(error) => return Some(Err(error)),
            }
        }
    });
    Tokenizer::train(texts, config.corpus.vocab_size, config.corpus.tokenizer_sample_mib << 20)
        .with_context(|| format!("corpus.files = {:?}", config.corpus.files))
}

/// The hash of what the embeddings are made from; and the embedder, for the later stages: a named one is slow to load.
fn embed(config: &Config, prepared: &Prepared, tokens: &str) -> Result<(String, Box<dyn Embedder>)> {
    let e = &config.embed;
    let named = match (named_embedder(config)?, &config.tree.from) {
        (None, Some(from)) => {
            // That of the tree, which may be fitted on another corpus.
            let file = from.join("embedder.safetensors");
            let hashed = Hashed::load(&file).context("tree.from")?;
            hashed.save(&prepared.hashed())?;
            Some(Box::new(hashed) as Box<dyn Embedder>)
        }
        (named, _) => named,
    };
    let options = e.hashed();
    let settings = match &named {
        Some(embedder) => embedder.fingerprint().to_string(),
        None => format!("{options:?} {}", e.sample_windows),
    };
    let inputs = hash_inputs(&["embed.v1", tokens, &settings]);
    stage(prepared, "embed", &inputs, || {
        let windows = Windows::open(prepared)?;
        let fitted;
        let embedder = match &named {
            Some(embedder) => &**embedder,
            None => {
                fitted = windows.fit(options, e.sample_windows)?;
                fitted.save(&prepared.hashed())?;
                &fitted
            }
        };
        windows.embed(embedder, &prepared.dir, &inputs)?;
        Ok(format!("{} windows in {} dimensions", windows.store.n_windows(), embedder.dim()))
    })?;
    let embedder = match named {
        Some(embedder) => embedder,
        None => Box::new(Hashed::load(&prepared.hashed())?),
    };
    Ok((inputs, embedder))
}

/// The windows of a tokenised corpus as texts.
pub(crate) struct Windows {
    pub(crate) store: TokenStore,
    pub(crate) tokenizer: Tokenizer,
}

impl Windows {
    pub(crate) fn open(prepared: &Prepared) -> Result<Self> {
        let store = TokenStore::open(&prepared.dir)?;
        let tokenizer = Tokenizer::load(&prepared.tokenizer())?;
        store.check_tokenizer(&tokenizer)?;
        Ok(Self { store, tokenizer })
    }

    pub(crate) fn texts(&self, windows: &[usize]) -> Result<Vec<String>> {
        let text = |&index: &usize| Ok(self.tokenizer.decode(&self.store.window_tokens(index)?)?);
        windows.par_iter().map(text).collect()
    }

    /// Counts word frequencies on windows spread evenly over the corpus.
    fn fit(&self, options: HashedOptions, sample: usize) -> Result<Hashed> {
        // In the order of ids, so that the sample does not depend on how documents are divided into files.
        let windows = self.store.windows_by_id()?;
        let every = windows.len().div_ceil(sample.max(1));
        let mut failed = None;
        let chosen: Vec<usize> = windows.into_iter().step_by(every).map(|index| index as usize).collect();
        let texts = chosen.chunks(EMBED_BATCH).map_while(|chosen| match self.texts(chosen) {
            Ok(texts) => Some(texts),
            Err(error) => {
                failed = Some(error);
                None
            }
        });
        let hashed = Hashed::fit(options, texts.flatten());
        match failed {
            Some(error) => Err(error),
            None => Ok(hashed?),
        }
    }

    fn embed(&self, embedder: &dyn Embedder, dir: &Path, inputs: &str) -> Result<()> {
        let n = self.store.n_windows();
        let mut writer = EmbeddingWriter::open(dir, inputs, embedder.dim())?;
        let mut progress = Progress::new("embed", n as u64);
        while writer.n_rows() < n {
            let first = writer.n_rows();
            let windows: Vec<usize> = (first..n.min(first + EMBED_BATCH)).collect();
            let texts = self.texts(&windows)?;
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            let rows = embedder.embed(&texts).with_context(|| {
                let document = self.store.window(first).map(|window| window.document).unwrap_or_default();
                format!("windows from {first} (document {document}) on")
            })?;
            writer.append(&rows)?;
            progress.set(writer.n_rows() as u64, n as u64, || "windows".into());
        }
        Ok(writer.commit()?)
    }
}

fn cluster(
    config: &Config,
    prepared: &Prepared,
    embeddings: &str,
    embedder: &dyn Embedder,
) -> Result<String> {
    if let Some(from) = &config.tree.from {
        return given_tree(config, prepared, (&from.join("tree.safetensors"), embeddings), embedder);
    }
    let options = config.tree.options();
    // The tree does not depend on the memory it is built in.
    let settings = kmeans::Options { host_bytes: 0, ..options.clone() };
    let inputs = hash_inputs(&["cluster.v2", embeddings, &format!("{settings:?}")]);
    stage(prepared, "cluster", &inputs, || {
        let store = TokenStore::open(&prepared.dir)?;
        let embeddings = Embedded::open(prepared, &store, embedder)?;
        let order = store.windows_by_id()?;
        let path = prepared.dir.join("cluster.journal");
        let journal = kmeans::JournalFile { path: &path, identity: &inputs };
        let (built, summary) = grow_tree(&*embeddings.rows(&options)?, &options, Some(&order), journal)?;
        built.tree.save(&prepared.tree())?;
        kmeans::remove_journal(&path)?;
        Ok(format!("clusters that hold windows, by level: {summary}"))
    })?;
    Ok(inputs)
}

/// Takes a tree that was made of other documents by the same embedder.
fn given_tree(
    config: &Config,
    prepared: &Prepared,
    (path, embeddings): (&Path, &str),
    embedder: &dyn Embedder,
) -> Result<String> {
    let tree = ClusterTree::load(path).context("tree.from")?;
    let branching: Vec<usize> = (0..tree.n_levels()).map(|level| tree.branching(level)).collect();
    let expected = &config.tree.branching;
    if branching != *expected {
        bail!("tree.from: {}: expected tree.branching = {expected:?}, found {branching:?}", path.display());
    }
    let (expected, found) = (embedder.dim(), tree.dim());
    if expected != found {
        bail!(
            "tree.from: {}: expected a tree of {expected} dimensions as the embedder has, found {found}",
            path.display()
        );
    }
    let inputs = hash_inputs(&["given tree.v1", embeddings, &tree.hash()]);
    stage(prepared, "cluster", &inputs, || {
        tree.save(&prepared.tree())?;
        Ok(format!("the tree of {}", path.display()))
    })?;
    Ok(inputs)
}

/// Builds a tree, told as it goes on; and how many clusters hold points, by level.
pub(crate) fn grow_tree(
    rows: &dyn kmeans::Rows,
    options: &kmeans::Options,
    order: Option<&[u32]>,
    journal: kmeans::JournalFile,
) -> Result<(kmeans::Built, String)> {
    let bar = Mutex::new(Progress::new("cluster", 1));
    let progress = |p: kmeans::Progress| {
        let mut bar = bar.lock().expect("no report panics");
        bar.set(p.done, p.total, || format!("steps of points, {} nodes", p.nodes));
    };
    let job = kmeans::Job { order, journal: Some(journal), progress: &progress };
    let built = kmeans::build(rows, options, &job)?;
    let tree = &built.tree;
    let used = |level: usize| tree.counts(level).iter().filter(|&&n| n > 0).count();
    let levels = (0..tree.n_levels()).map(|level| format!("{} of {}", used(level), tree.n_clusters(level)));
    let summary = levels.collect::<Vec<_>>().join(", ");
    if rows.len() < tree.n_leaves() {
        eprintln!("note: {} points for {} leaves: most stay empty", rows.len(), tree.n_leaves());
    }
    Ok((built, summary))
}

/// The embeddings of all windows, in memory where they fit.
struct Embedded {
    mapped: Embeddings,
    path: PathBuf,
    dim: usize,
}

impl Embedded {
    fn open(prepared: &Prepared, store: &TokenStore, embedder: &dyn Embedder) -> Result<Self> {
        let dim = embedder.dim();
        Ok(Self {
            mapped: Embeddings::open(&prepared.dir, store.n_windows(), dim)?,
            path: Embeddings::path(&prepared.dir),
            dim,
        })
    }

    fn rows(&self, options: &kmeans::Options) -> Result<Box<dyn kmeans::Rows + '_>> {
        Ok(match self.mapped.len() / self.dim <= options.loadable(self.dim) {
            true => Box::new(kmeans::Matrix::new(&self.mapped, self.dim)?),
            false => Box::new(kmeans::RowFile::open(&self.path, self.dim)?),
        })
    }
}

fn pack(config: &Config, prepared: &Prepared, cluster: &str, embedder: &dyn Embedder) -> Result<()> {
    let c = &config.corpus;
    let settings = format!("{:?}", (c.seq_len, c.seed, config.tree.beam));
    let inputs = hash_inputs(&["pack.v1", cluster, &settings]);
    stage(prepared, "pack", &inputs, || {
        let embeddings = Embedded::open(prepared, &TokenStore::open(&prepared.dir)?, embedder)?;
        let tree = ClusterTree::load(&prepared.tree())?;
        let leaves = kmeans::assign(&tree, &*embeddings.rows(&config.tree.options())?, config.tree.beam)?;
        let options = PackOptions {
            seq_len: c.seq_len,
            seed: c.seed,
            embedder: embedder.fingerprint().to_string(),
            tree: tree_hash(&tree, config.tree.beam),
        };
        let branching: Vec<usize> = (0..tree.n_levels()).map(|level| tree.branching(level)).collect();
        let s = corpus::pack(&prepared.dir, &leaves, &branching, &options)?;
        Ok(format!(
            "{} sequences ({} held out) of {} leaves, {} tokens a pass",
            s.n_sequences, s.n_validation, s.n_used_leaves, s.n_train_tokens
        ))
    })
}
