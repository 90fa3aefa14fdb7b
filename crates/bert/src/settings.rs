//! What the JSON files of a sentence-transformers folder say.

use std::fs;
use std::path::{Path, PathBuf};

use ops::Activation;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// Positions of a model whose folder names no limit.
const DEFAULT_LIMIT: usize = 512;

/// Which rows make the embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pooling {
    Mean,
    Cls,
    Max,
}

/// A model's sizes and how it is used.
#[derive(Debug)]
pub(crate) struct Settings {
    /// Folder of the weights and the tokenizer.
    pub(crate) transformer: PathBuf,
    pub(crate) width: usize,
    pub(crate) n_layers: usize,
    pub(crate) heads: usize,
    pub(crate) inner: usize,
    pub(crate) positions: usize,
    pub(crate) vocab: usize,
    pub(crate) types: usize,
    pub(crate) eps: f64,
    pub(crate) activation: Activation,
    pub(crate) pooling: Pooling,
    /// Word pieces of a sequence, its two special tokens counted.
    pub(crate) limit: usize,
    /// Whether texts are lower-cased before the tokenizer sees them.
    pub(crate) lower_case: bool,
}

/// `config.json`
#[derive(Deserialize)]
struct Config {
    model_type: String,
    hidden_act: String,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    max_position_embeddings: usize,
    vocab_size: usize,
    type_vocab_size: usize,
    layer_norm_eps: f64,
    position_embedding_type: Option<String>,
}

/// An entry of `modules.json`.
#[derive(Deserialize)]
struct Module {
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

impl Module {
    /// Its class without the package: sentence-transformers has moved its modules between packages, not renamed them.
    fn class(&self) -> &str {
        self.kind.rsplit('.').next().unwrap_or_default()
    }
}

/// `sentence_bert_config.json`
#[derive(Default, Deserialize)]
#[serde(default)]
struct SequenceConfig {
    max_seq_length: Option<usize>,
    do_lower_case: bool,
}

impl Settings {
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        let (transformer, pooling) = modules(folder)?;
        let path = transformer.join("config.json");
        let config: Config = parse(&path, &fs::read(&path).map_err(Error::io(&path))?)?;
        let activation = check(&path, &config)?;
        let sequence_path = transformer.join("sentence_bert_config.json");
        let sequence: SequenceConfig = read_if_there(&sequence_path)?.unwrap_or_default();
        let positions = config.max_position_embeddings;
        let limit = sequence.max_seq_length.unwrap_or(positions.min(DEFAULT_LIMIT));
        if !(3..=positions).contains(&limit) {
            let expected = format!("3 to max_position_embeddings ({positions})");
            return Err(Error::key(&sequence_path, "max_seq_length", expected, limit));
        }
        Ok(Self {
            transformer,
            width: config.hidden_size,
            n_layers: config.num_hidden_layers,
            heads: config.num_attention_heads,
            inner: config.intermediate_size,
            positions,
            vocab: config.vocab_size,
            types: config.type_vocab_size,
            eps: config.layer_norm_eps,
            activation,
            pooling,
            limit,
            lower_case: sequence.do_lower_case,
        })
    }
}

/// The activation, of a configuration that describes a BERT.
fn check(path: &Path, config: &Config) -> Result<Activation> {
    let quoted = |value: &str| format!("{value:?}");
    if config.model_type != "bert" {
        return Err(Error::key(path, "model_type", "\"bert\"", quoted(&config.model_type)));
    }
    if let Some(kind) = config.position_embedding_type.as_deref().filter(|&kind| kind != "absolute") {
        return Err(Error::key(path, "position_embedding_type", "\"absolute\"", quoted(kind)));
    }
    for (key, size) in [
        ("hidden_size", config.hidden_size),
        ("num_attention_heads", config.num_attention_heads),
        ("intermediate_size", config.intermediate_size),
        ("type_vocab_size", config.type_vocab_size),
    ] {
        if size == 0 {
            return Err(Error::key(path, key, "at least 1", size));
        }
    }
    if !config.hidden_size.is_multiple_of(config.num_attention_heads) {
        let expected = format!("a multiple of num_attention_heads ({})", config.num_attention_heads);
        return Err(Error::key(path, "hidden_size", expected, config.hidden_size));
    }
    match config.hidden_act.as_str() {
        "gelu" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        "relu" => Ok(Activation::Relu),
        other => Err(Error::key(path, "hidden_act", "\"gelu\", \"gelu_new\" or \"relu\"", quoted(other))),
    }
}

/// The folder of the transformer and the pooling after it.
fn modules(folder: &Path) -> Result<(PathBuf, Pooling)> {
    let path = folder.join("modules.json");
    let Some(modules) = read_if_there::<Vec<Module>>(&path)? else {
        let pooled = pooling(&folder.join("1_Pooling"))?;
        return Ok((folder.to_owned(), pooled.unwrap_or(Pooling::Mean)));
    };
    let (mut transformer, mut pooled) = (folder.to_owned(), Pooling::Mean);
    for module in modules {
        match module.class() {
            "Transformer" => transformer = folder.join(module.path),
            "Pooling" => {
                let of = folder.join(module.path);
                let missing = || Error::io(&of.join("config.json"))(std::io::ErrorKind::NotFound.into());
                pooled = pooling(&of)?.ok_or_else(missing)?;
            }
            // Embeddings always have unit norm.
            "Normalize" => {}
            _ => {
                let found = format!("{:?}", module.kind);
                return Err(Error::key(&path, "type", "Transformer, Pooling or Normalize", found));
            }
        }
    }
    Ok((transformer, pooled))
}

/// Whether a folder names a pooling in `modules.json` that is not there. A `modules.json` that cannot be read names none
/// here: [`Settings::read`] says what is wrong with it.
pub(crate) fn lacks_pooling(folder: &Path) -> bool {
    let modules: Option<Vec<Module>> = read_if_there(&folder.join("modules.json")).ok().flatten();
    let is_missing = |module: &Module| !folder.join(&module.path).join("config.json").exists();
    modules.iter().flatten().any(|module| module.class() == "Pooling" && is_missing(module))
}

/// What the `config.json` of a pooling module says, by one name or by a switch per kind; none without the file.
fn pooling(folder: &Path) -> Result<Option<Pooling>> {
    const SWITCHES: &str = "pooling_mode_";
    let path = folder.join("config.json");
    let Some(config) = read_if_there::<serde_json::Map<String, serde_json::Value>>(&path)? else {
        return Ok(None);
    };
    let on = |(key, value): (&String, &serde_json::Value)| {
        let kind = key.strip_prefix(SWITCHES)?.trim_end_matches("_tokens").trim_end_matches("_token");
        (value.as_bool() == Some(true)).then(|| kind.to_owned())
    };
    let kinds: Vec<String> = match config.get("pooling_mode").and_then(serde_json::Value::as_str) {
        Some(kind) => vec![kind.to_owned()],
        None => config.iter().filter_map(on).collect(),
    };
    match kinds.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] | ["mean"] => Ok(Some(Pooling::Mean)),
        ["cls"] => Ok(Some(Pooling::Cls)),
        ["max"] => Ok(Some(Pooling::Max)),
        _ => Err(Error::key(&path, "pooling_mode", "one of mean, cls and max", kinds.join(" and "))),
    }
}

fn read_if_there<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => parse(path, &bytes).map(Some),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(path)(error)),
    }
}

fn parse<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|source| Error::Json { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pooling_is_looked_for_where_modules_json_says() {
        let folder = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| fs::write(folder.path().join(file), text).unwrap();
        assert!(!lacks_pooling(folder.path()));
        write(
            "modules.json",
            r#"[{"path": "", "type": "m.Transformer"}, {"path": "2_Pooling", "type": "m.Pooling"}]"#,
        );
        assert!(lacks_pooling(folder.path()));
        fs::create_dir(folder.path().join("2_Pooling")).unwrap();
        write("2_Pooling/config.json", "{}");
        assert!(!lacks_pooling(folder.path()));
        // What is no list of modules is for the loading to refuse.
        write("modules.json", "1_Pooling");
        assert!(!lacks_pooling(folder.path()));
    }
}
