//! The sections of a configuration that are not a crate's own, with their defaults.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Result, bail};
use corpus::{Format, SourceOptions, TxtSplit};
use memory_bank::{MemoryKind, MemoryLayers, TierOptions};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

/// Where the run lives.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RunSection {
    /// Folder of the run.
    pub(crate) dir: PathBuf,
    /// The version that resolved this configuration; written, never asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) version: Option<String>,
}

/// What documents are read and how they become sequences.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct CorpusSection {
    /// Folder of the prepared corpus; runs on the same corpus share it.
    pub(crate) prepared: PathBuf,
    /// Paths, folders, globs or object store URLs.
    pub(crate) files: Vec<String>,
    /// Files whose documents are all held out.
    pub(crate) validation_files: Vec<String>,
    pub(crate) text_key: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id_key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) label_key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) format: Option<Format>,
    pub(crate) txt_split: TxtSplit,
    /// Options of object stores, as `object_store` names them; they go before the environment's.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) store: BTreeMap<String, String>,
    /// A tokenizer.json to use; without it a BPE is trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// Tokens of the trained vocabulary.
    pub(crate) vocab_size: usize,
    /// Text the tokenizer is trained on, MiB.
    pub(crate) tokenizer_sample_mib: usize,
    /// Tokens of a window: what is embedded and routed as one.
    pub(crate) window: u32,
    /// Documents of a thousand that are held out, by a hash of their id.
    pub(crate) validation_permille: u32,
    /// Tokens of a training sequence.
    pub(crate) seq_len: u32,
    /// Order of documents within a leaf.
    pub(crate) seed: u64,
}

impl Default for CorpusSection {
    fn default() -> Self {
        Self {
            prepared: PathBuf::new(),
            files: vec![],
            validation_files: vec![],
            text_key: "text".into(),
            id_key: None,
            label_key: None,
            format: None,
            txt_split: TxtSplit::File,
            store: BTreeMap::new(),
            tokenizer: None,
            vocab_size: 32_768,
            tokenizer_sample_mib: 64,
            window: 2048,
            validation_permille: 5,
            seq_len: 2048,
            seed: 1,
        }
    }
}

impl CorpusSection {
    pub(crate) fn source(&self) -> SourceOptions {
        SourceOptions {
            files: self.files.clone(),
            validation_files: self.validation_files.clone(),
            text_key: self.text_key.clone(),
            id_key: self.id_key.clone(),
            label_key: self.label_key.clone(),
            format: self.format,
            txt_split: self.txt_split,
            object_store_options: store_options(std::env::vars_os(), &self.store),
        }
    }
}

/// What the environment says of object stores, by the names their own tools use (`AWS_ENDPOINT`).
/// Credentials come from there and so are in no run's config.toml.
pub(crate) fn environment() -> Vec<(String, String)> {
    store_options(std::env::vars_os(), &BTreeMap::new())
}

/// What the environment says of object stores, then what the configuration says.
fn store_options(
    environment: impl Iterator<Item = (std::ffi::OsString, std::ffi::OsString)>,
    configured: &BTreeMap<String, String>,
) -> Vec<(String, String)> {
    let text = |(key, value): (std::ffi::OsString, std::ffi::OsString)| {
        let (key, value) = (key.into_string().ok()?, value.into_string().ok()?);
        let is_of_store = ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|prefix| key.starts_with(prefix));
        is_of_store.then(|| (key.to_lowercase(), value))
    };
    let mut options: BTreeMap<String, String> = environment.filter_map(text).collect();
    options.extend(configured.clone());
    options.into_iter().collect()
}

/// How a text becomes a vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum EmbedKind {
    Hashed,
    Static,
    Bert,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct EmbedSection {
    pub(crate) kind: EmbedKind,
    /// A static (model2vec) embedder or a BERT of sentence-transformers: its folder, or its id on the Hugging Face
    /// hub.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) path: Option<PathBuf>,
    /// Dimensions of the hashed embedder.
    pub(crate) dim: usize,
    /// Seed of the hashed embedder's projection.
    pub(crate) seed: u64,
    /// Weight of a word's n-grams together, relative to the word.
    pub(crate) char_weight: f32,
    /// Windows the hashed embedder's word frequencies are counted on.
    pub(crate) sample_windows: usize,
}

impl EmbedSection {
    /// The options of the hashed embedder.
    pub(crate) fn hashed(&self) -> embed::HashedOptions {
        embed::HashedOptions { dim: self.dim, seed: self.seed, char_weight: self.char_weight }
    }
}

impl Default for EmbedSection {
    fn default() -> Self {
        let hashed = embed::HashedOptions::default();
        Self {
            kind: EmbedKind::Hashed,
            path: None,
            dim: hashed.dim,
            seed: hashed.seed,
            char_weight: hashed.char_weight,
            sample_windows: 1 << 20,
        }
    }
}

/// The cluster tree and the descent of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TreeSection {
    /// A prepared corpus or a run, whose tree is taken, and whose embedder if that is hashed; without it a tree is
    /// made of this corpus.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<PathBuf>,
    /// Children per level, coarse to fine.
    pub(crate) branching: Vec<usize>,
    pub(crate) iterations: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) points_per_iteration: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_share: Option<f64>,
    pub(crate) spherical: bool,
    pub(crate) seed: u64,
    /// MiB that embeddings may take while the tree is built: those of a larger corpus are read piece by piece, which
    /// gives the same tree.
    pub(crate) host_mib: u64,
    /// Candidates a level of the descent keeps; 1 is greedy.
    pub(crate) beam: usize,
}

impl Default for TreeSection {
    fn default() -> Self {
        let options = kmeans::Options::default();
        Self {
            from: None,
            branching: options.branching,
            iterations: options.iterations,
            points_per_iteration: options.points_per_iteration,
            max_share: options.max_share,
            spherical: options.spherical,
            seed: 1,
            host_mib: 4096,
            beam: 4,
        }
    }
}

impl TreeSection {
    pub(crate) fn options(&self) -> kmeans::Options {
        kmeans::Options {
            branching: self.branching.clone(),
            seed: self.seed,
            iterations: self.iterations,
            points_per_iteration: self.points_per_iteration,
            max_share: self.max_share,
            spherical: self.spherical,
            host_bytes: self.host_mib.saturating_mul(1 << 20),
        }
    }
}

/// What takes an embedding to a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RouterKind {
    Beam,
    Prototypes,
    Hnsw,
    Exact,
    Random,
}

/// How a text that is asked about is routed. The documents of the corpus are assigned by `tree.beam`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RetrieveSection {
    pub(crate) router: RouterKind,
    /// Candidates a level of the beam keeps, and leaves that other routers name; tree.beam without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) beam: Option<usize>,
    /// K-means prototypes a leaf.
    pub(crate) prototypes: usize,
    /// Neighbours of a node of the HNSW graph.
    pub(crate) hnsw_connections: usize,
    /// Candidates kept while a node is inserted.
    pub(crate) hnsw_ef_construction: usize,
    /// Candidates kept by a search.
    pub(crate) hnsw_ef_search: usize,
    /// Seed of the prototypes, and of random leaves.
    pub(crate) seed: u64,
}

impl Default for RetrieveSection {
    fn default() -> Self {
        let hnsw = retrieve::HnswOptions::default();
        Self {
            router: RouterKind::Beam,
            beam: None,
            prototypes: retrieve::PrototypeOptions::default().per_leaf,
            hnsw_connections: hnsw.connections,
            hnsw_ef_construction: hnsw.ef_construction,
            hnsw_ef_search: hnsw.ef_search,
            seed: 1,
        }
    }
}

impl RetrieveSection {
    pub(crate) fn check(&self) -> Result<()> {
        for (key, found, (least, most)) in [
            ("beam", self.beam.unwrap_or(1), (1, usize::MAX)),
            ("prototypes", self.prototypes, (1, usize::MAX)),
            ("hnsw_connections", self.hnsw_connections, (2, 255)),
            ("hnsw_ef_construction", self.hnsw_ef_construction, (1, usize::MAX)),
            ("hnsw_ef_search", self.hnsw_ef_search, (1, usize::MAX)),
        ] {
            if !(least..=most).contains(&found) {
                let range = if most == usize::MAX { "or more".into() } else { format!("to {most}") };
                bail!("retrieve.{key}: expected {least} {range}, found {found}");
            }
        }
        Ok(())
    }

    /// The options of the graph, of which `n` leaves are asked.
    pub(crate) fn hnsw(&self, n: usize) -> retrieve::HnswOptions {
        retrieve::HnswOptions {
            connections: self.hnsw_connections,
            ef_construction: self.hnsw_ef_construction,
            ef_search: self.hnsw_ef_search,
            n,
        }
    }
}

/// Sizes of the memory blocks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct MemorySection {
    /// What the blocks are: `ffn`, `lora_qk`, `lora_vo`, `lora_ffn` or `kv`.
    #[serde(deserialize_with = "memory_kind")]
    pub(crate) kind: MemoryKind,
    /// The layers of the anchor that have memory: `uniform` (all), `early`, `middle`, `late` or a list.
    #[serde(deserialize_with = "memory_layers")]
    pub(crate) layers: MemoryLayers,
    /// Width of a block per level; 0 is no memory at that level.
    pub(crate) width: Vec<usize>,
    /// Seed of the blocks' initial weights.
    pub(crate) seed: u64,
    /// `host:port` of every shard that holds the blocks while they are trained, in order; without any, this
    /// process does.
    pub(crate) shards: Vec<String>,
    /// Levels of which every worker keeps a copy beside the shards', 0 the coarsest: they are not fetched.
    pub(crate) replicated: Vec<usize>,
    /// The bank's name there.
    pub(crate) bank: String,
    /// Of pushed gradients on their way to the shards; weights come as they are.
    pub(crate) push_dtype: memory_service::Dtype,
    /// Whether blocks may come over bulk streams, where the shards offer them.
    pub(crate) bulk: bool,
    /// Most MiB of blocks that a worker keeps of those that it validates with, to fetch again only what has
    /// changed; 0 keeps none.
    pub(crate) cache_mib: u64,
    /// Certificates for the shards.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tls: Option<shard_host::TlsSection>,
    /// A file that holds a token for the shards.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_file: Option<PathBuf>,
    /// Where blocks are read from, for evaluation and generation.
    pub(crate) placement: TierOptions,
}

impl Default for MemorySection {
    fn default() -> Self {
        Self {
            kind: MemoryKind::Ffn,
            layers: MemoryLayers::Uniform,
            width: vec![256, 64, 16, 0],
            seed: 1,
            shards: vec![],
            replicated: vec![],
            bank: "bank".into(),
            push_dtype: memory_service::Dtype::F32,
            bulk: true,
            cache_mib: 256,
            tls: None,
            token_file: None,
            placement: TierOptions::default(),
        }
    }
}

fn memory_kind<'de, D: Deserializer<'de>>(deserializer: D) -> Result<MemoryKind, D::Error> {
    let found = toml::Value::deserialize(deserializer)?;
    let expected = || MemoryKind::ALL.map(MemoryKind::name).join(", ");
    MemoryKind::deserialize(found.clone())
        .map_err(|_| D::Error::custom(format!("memory.kind: expected one of {}, found {found}", expected())))
}

fn memory_layers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<MemoryLayers, D::Error> {
    let found = toml::Value::deserialize(deserializer)?;
    let expected = "uniform, early, middle, late or a list of layers";
    MemoryLayers::deserialize(found.clone())
        .map_err(|_| D::Error::custom(format!("memory.layers: expected {expected}, found {found}")))
}

/// What `eval` measures, and the runs it compares with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct EvalSection {
    /// The dense control: a run without memory of an equal token budget. Without it, `none` is this
    /// run's anchor with its memory taken away.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) none: Option<PathBuf>,
    /// The control whose extra parameters are trained on every token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) always_on: Option<PathBuf>,
    /// A questions.jsonl.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) questions: Option<PathBuf>,
    /// Questions asked of each bucket at most, spread evenly; 0 is all.
    pub(crate) questions_per_bucket: usize,
    /// Held-out sequences scored at most; 0 is all.
    pub(crate) sequences: u64,
    /// Sequences or questions a batch.
    pub(crate) batch: usize,
    /// Tokens an answer may have.
    pub(crate) max_answer_tokens: usize,
    /// Whether the choices of a question are scored too.
    pub(crate) choices: bool,
}

impl Default for EvalSection {
    fn default() -> Self {
        Self {
            none: None,
            always_on: None,
            questions: None,
            questions_per_bucket: 0,
            sequences: 0,
            batch: 32,
            max_answer_tokens: 12,
            choices: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn stores_are_set_by_the_configuration_before_the_environment() {
        let text = "[run]\ndir = \"r\"\n[corpus]\nprepared = \"p\"\nfiles = [\"a.txt\"]\n";
        let overrides = ["corpus.store.aws_region=eu-1".to_string()];
        let config = Config::parse(text, "run.toml", &overrides).unwrap();
        let environment = [("AWS_REGION", "us-1"), ("AWS_ENDPOINT", "http://h"), ("HOME", "/")];
        let options = store_options(
            environment.into_iter().map(|(key, value)| (key.into(), value.into())),
            &config.corpus.store,
        );
        let pair = |key: &str, value: &str| (key.to_string(), value.to_string());
        assert_eq!(options, [pair("aws_endpoint", "http://h"), pair("aws_region", "eu-1")]);
    }
}
