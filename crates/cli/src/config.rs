//! One TOML is one run: a section a crate, every key known, checked once.

mod job;
mod model;
mod posthoc;
mod sections;
mod serving;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use corpus::{Format, SourceOptions, Tokenizer};
use memory_bank::BlockSpec;
use serde::{Deserialize, Serialize};
use train::{Phase, Subtree, TrainConfig};

pub(crate) use job::{CollectiveSection, EngineKind};
use job::{ObserveSection, ShardSection};
use model::AnchorSection;
pub(crate) use posthoc::{Method, PosthocSection};
use sections::{CorpusSection, MemorySection, RunSection, TreeSection};
pub(crate) use sections::{EmbedKind, EmbedSection, EvalSection, RetrieveSection, RouterKind, environment};
pub(crate) use serving::ServeSection;

use crate::checkpoint;

/// The whole configuration of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    pub(crate) run: RunSection,
    pub(crate) corpus: CorpusSection,
    pub(crate) embed: EmbedSection,
    pub(crate) tree: TreeSection,
    pub(crate) anchor: AnchorSection,
    pub(crate) memory: MemorySection,
    pub(crate) shard: ShardSection,
    pub(crate) collective: CollectiveSection,
    pub(crate) observe: ObserveSection,
    pub(crate) train: TrainConfig,
    pub(crate) retrieve: RetrieveSection,
    pub(crate) eval: EvalSection,
    pub(crate) generate: generate::Options,
    pub(crate) serve: ServeSection,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) posthoc: Option<PosthocSection>,
}

impl Config {
    /// Reads a file and applies `--set section.key=value`.
    pub(crate) fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
        Self::parse(&text, &path.display().to_string(), overrides)
    }

    /// As [`Config::load`], from the text of the file `name`.
    pub(crate) fn parse(text: &str, name: &str, overrides: &[String]) -> Result<Self> {
        // The text is parsed typed first, so that an error names its line.
        let typed: Self = toml::from_str(text).map_err(|e| explain(&e, Some(text), name))?;
        let mut config = match overrides.is_empty() {
            true => typed,
            false => {
                let mut table: toml::Table =
                    toml::from_str(text).map_err(|e| explain(&e, Some(text), name))?;
                let begun = table.clone();
                overrides.iter().try_for_each(|setting| set(&mut table, setting))?;
                match Self::deserialize(table) {
                    Ok(config) => config,
                    Err(error) => {
                        // The first with which it is wrong; several may be right together only.
                        let mut table = begun;
                        for setting in overrides {
                            set(&mut table, setting)?;
                            Self::deserialize(table.clone())
                                .map_err(|e| explain(&e, None, &format!("--set {setting}")))?;
                        }
                        return Err(explain(&error, None, name));
                    }
                }
            }
        };
        config.anchor.resolve().with_context(|| name.to_string())?;
        config.check().with_context(|| name.to_string())?;
        Ok(config)
    }

    /// What no single key can show.
    fn check(&self) -> Result<()> {
        if self.run.dir.as_os_str().is_empty() {
            bail!("run.dir: expected the folder of the run, found nothing");
        }
        if self.corpus.prepared.as_os_str().is_empty() {
            bail!("corpus.prepared: expected the folder of the prepared corpus, found nothing");
        }
        if self.corpus.files.is_empty() {
            bail!("corpus.files: expected at least one path, glob or URL, found none");
        }
        let corpus = &self.corpus;
        for (key, found, (least, most)) in [
            ("vocab_size", corpus.vocab_size as u64, (257, u64::from(u32::MAX))),
            ("tokenizer_sample_mib", corpus.tokenizer_sample_mib as u64, (1, 1 << 40)),
            ("window", u64::from(corpus.window), (1, u64::from(u32::MAX))),
            ("seq_len", u64::from(corpus.seq_len), (1, u64::from(u32::MAX) - 1)),
            ("validation_permille", u64::from(corpus.validation_permille), (0, 999)),
        ] {
            if !(least..=most).contains(&found) {
                bail!("corpus.{key}: expected {least} to {most}, found {found}");
            }
        }
        self.tree.options().check().context("[tree]")?;
        self.embed.hashed().check().context("[embed]")?;
        self.generate.check().context("[generate]")?;
        self.serve.check(self.tree.branching.len())?;
        if self.embed.kind != EmbedKind::Hashed && self.embed.path.is_none() {
            let kind = format!("{:?}", self.embed.kind).to_lowercase();
            bail!(
                "embed.path: expected the folder or the hub id of an embedder (embed.kind = \"{kind}\"), found nothing"
            );
        }
        self.collective.check()?;
        self.observe.endpoint(0)?;
        if let Some(peak) = self.observe.peak_tflops.filter(|peak| !(peak.is_finite() && *peak > 0.0)) {
            bail!("observe.peak_tflops: expected more than 0, found {peak}");
        }
        if self.tree.beam == 0 {
            bail!("tree.beam: expected at least 1, found 0");
        }
        self.retrieve.check()?;
        let (widths, levels) = (self.memory.width.len(), self.tree.branching.len());
        if self.train.phase.has_memory() && widths != levels {
            bail!("memory.width: expected one width per level of tree.branching ({levels}), found {widths}");
        }
        if self.train.phase.has_memory()
            && let Err(memory_bank::Error::Setting { field: "layers", expected, found }) =
                self.block_spec(self.tree.branching.clone()).validate()
        {
            bail!("memory.layers: expected {expected}, found {found}");
        }
        if let (Some(Subtree::Cluster(found)), Some(n)) = (self.train.subtree, self.tree.branching.first())
            && found as usize >= *n
        {
            bail!(
                "train.subtree: expected a cluster below {n} (tree.branching) or \"generic\", found {found}"
            );
        }
        if let Some(level) = self.memory.replicated.iter().find(|&&level| level >= levels) {
            bail!("memory.replicated: expected levels below {levels}, found {level}");
        }
        let memory = &self.memory;
        if !memory.replicated.is_empty() && !memory.shards.is_empty() && self.shard.store.is_none() {
            bail!(
                "shard.store.url: expected where the shards save, for the levels of memory.replicated, found nothing"
            );
        }
        let positions = self.anchor.config(1).max_seq_len;
        if positions < self.corpus.seq_len as usize {
            bail!(
                "{}: expected at least corpus.seq_len ({}), found {positions}",
                self.anchor.key_of_positions(),
                self.corpus.seq_len
            );
        }
        if self.eval.batch == 0 || self.eval.max_answer_tokens == 0 {
            bail!("eval.batch and eval.max_answer_tokens: expected at least 1, found 0");
        }
        self.anchor.config(1).check()?;
        self.train.check()?;
        if let Some(posthoc) = &self.posthoc {
            posthoc.check()?;
            if self.anchor.checkpoint.is_none() {
                bail!("anchor.checkpoint: expected what [posthoc] adds memory to, found nothing");
            }
        }
        match (self.train.phase, self.anchor.checkpoint.as_ref().or(self.anchor.init.as_ref())) {
            (Phase::Frozen | Phase::Cotrain, None) => bail!(
                "anchor.init: expected a trained run, or anchor.checkpoint (train.phase = \"{}\"), found nothing",
                format!("{:?}", self.train.phase).to_lowercase()
            ),
            (Phase::Joint, Some(init)) => bail!(
                "anchor.{}: expected nothing (train.phase = \"joint\" begins from scratch; \"cotrain\" goes on \
                 with an anchor), found {}",
                if self.anchor.checkpoint.is_some() { "checkpoint" } else { "init" },
                init.display()
            ),
            _ => {}
        }
        Ok(())
    }

    /// The sizes of the run's bank, over a tree of these branchings.
    pub(crate) fn block_spec(&self, branching: Vec<usize>) -> BlockSpec {
        let memory = &self.memory;
        let sizes = (memory.width.clone(), branching);
        // No size of a bank follows from the vocabulary.
        self.anchor.config(1).block_spec(memory.kind, memory.layers.clone(), sizes)
    }

    /// The tokenizer.json that the corpus is divided by: the configuration's, or the checkpoint's; none if one is
    /// trained.
    pub(crate) fn tokenizer(&self) -> Result<Option<PathBuf>> {
        let Some(checkpoint) = self.anchor.checkpoint.as_ref().filter(|_| self.corpus.tokenizer.is_none())
        else {
            return Ok(self.corpus.tokenizer.clone());
        };
        match checkpoint::describe(checkpoint)?.tokenizer {
            None => bail!(
                "corpus.tokenizer: expected a tokenizer.json, since anchor.checkpoint ({}) has none, found nothing",
                checkpoint.display()
            ),
            found => Ok(found),
        }
    }

    /// Fails when the anchor has no row for a token.
    pub(crate) fn check_vocabulary(&self, tokenizer: &Tokenizer) -> Result<()> {
        let (found, most) = (tokenizer.n_needed(), self.anchor.config(tokenizer.vocab_size()).vocab_size);
        if found > most {
            bail!("corpus.tokenizer: expected at most the {most} tokens of anchor.checkpoint, found {found}");
        }
        Ok(())
    }

    pub(crate) fn to_toml(&self) -> Result<String> {
        Ok(toml::to_string(self)?)
    }
}

/// The section [tree] alone, from settings `tree.key=value`.
pub(crate) fn tree_section(overrides: &[String]) -> Result<TreeSection> {
    let mut table = toml::Table::new();
    let mut section = TreeSection::default();
    for setting in overrides {
        set(&mut table, setting)?;
        let Some(tree) = table.get("tree").filter(|_| table.len() == 1) else {
            bail!("--set {setting}: expected a key of [tree]");
        };
        section = TreeSection::deserialize(tree.clone())
            .map_err(|e| explain(&e, None, &format!("--set {setting}")))?;
    }
    Ok(section)
}

/// A file alone, by path or URL, with the options of object stores that the environment gives.
pub(crate) fn bare_source(file: &str) -> SourceOptions {
    // No document of it is read, but without a format a folder's files whose names tell none (.npy) are passed over.
    let format = Some(Format::Txt);
    CorpusSection { files: vec![file.to_owned()], format, ..CorpusSection::default() }.source()
}

/// Applies `section.key=value`; the value is TOML, or else a string.
fn set(table: &mut toml::Table, setting: &str) -> Result<()> {
    let Some((key, value)) = setting.split_once('=') else {
        bail!("--set {setting}: expected section.key=value");
    };
    let Some((sections, key)) = key.trim().rsplit_once('.') else {
        bail!("--set {setting}: expected section.key=value, found no section");
    };
    let parsed = toml::from_str::<toml::Table>(&format!("value = {value}"));
    let value = match parsed {
        Ok(mut parsed) if parsed.len() == 1 => parsed.remove("value"),
        _ => Some(toml::Value::String(value.into())),
    };
    let mut table = table;
    for section in sections.split('.') {
        let inner = table.entry(section).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        let Some(inner) = inner.as_table_mut() else {
            bail!("--set {setting}: expected a section, found a value");
        };
        table = inner;
    }
    table.extend(value.map(|value| (key.to_string(), value)));
    Ok(())
}

/// One line for an error of the TOML crate: the file, the line, the key, and the nearest known name.
pub(crate) fn explain(error: &toml::de::Error, text: Option<&str>, name: &str) -> anyhow::Error {
    let line = text.zip(error.span()).map(|(text, span)| text[..span.start].matches('\n').count() + 1);
    let place = line.map_or_else(|| name.to_string(), |line| format!("{name}: line {line}"));
    let message = error.message().replace('\n', " ");
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    if !message.starts_with("unknown field") || quoted.len() < 2 {
        return anyhow::anyhow!("{place}: {message}");
    }
    let (unknown, known) = (quoted[0], &quoted[1..]);
    let nearest = known
        .iter()
        .max_by(|a, b| strsim::jaro_winkler(unknown, a).total_cmp(&strsim::jaro_winkler(unknown, b)));
    anyhow::anyhow!("{place}: unknown key `{unknown}`, did you mean `{}`?", nearest.unwrap_or(&unknown))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "[run]\ndir = \"r\"\n[corpus]\nprepared = \"p\"\nfiles = [\"a.txt\"]\n";

    fn error(text: &str, overrides: &[&str]) -> String {
        let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
        format!("{:#}", Config::parse(text, "run.toml", &overrides).unwrap_err())
    }

    #[test]
    fn unknown_keys_name_the_nearest_with_file_and_line() {
        let text = format!("{SMALL}[train]\nsteps = 3\nlerning_rate = 1.0\n");
        assert_eq!(
            error(&text, &[]),
            "run.toml: line 8: unknown key `lerning_rate`, did you mean `learning_rate`?"
        );
        assert_eq!(
            error(SMALL, &["train.stepz=3"]),
            "--set train.stepz=3: unknown key `stepz`, did you mean `steps`?"
        );
        assert!(error(&format!("{SMALL}[trian]\n"), &[]).contains("did you mean `train`?"));
    }

    #[test]
    fn wrong_types_and_impossible_values_name_their_key() {
        let text = format!("{SMALL}[train]\nsteps = \"many\"\n");
        let message = error(&text, &[]);
        assert!(
            message.starts_with("run.toml: line 7: invalid type: string \"many\", expected u64"),
            "{message}"
        );
        let message = error(SMALL, &["train.beta2=1.5"]);
        assert!(message.contains("train.beta2: expected a number from 0 to below 1, found 1.5"), "{message}");
        let message = error(SMALL, &["train.phase=cotrain", "memory.width=[1,2]"]);
        assert!(
            message.contains("memory.width: expected one width per level of tree.branching (4), found 2")
        );
        assert!(error("[run]\ndir=\"r\"\n", &[]).contains("corpus.prepared: expected"));
        let message = error(SMALL, &["memory.kind=lora"]);
        let kinds = "ffn, lora_qk, lora_vo, lora_ffn, kv";
        assert!(
            message.contains(&format!("memory.kind: expected one of {kinds}, found \"lora\"")),
            "{message}"
        );
        let message = error(SMALL, &["memory.layers=deep"]);
        let layers = "uniform, early, middle, late or a list of layers";
        assert!(message.contains(&format!("memory.layers: expected {layers}, found \"deep\"")), "{message}");
        let message = error(SMALL, &["train.phase=joint", "memory.layers=[1, 35]"]);
        let expected = "memory.layers: expected at least one layer, ascending, below 35, found [1, 35]";
        assert!(message.contains(expected), "{message}");
        assert!(error(SMALL, &["steps=3"]).contains("found no section"));
    }

    #[test]
    fn a_resolved_configuration_reads_back_as_itself() {
        let config =
            Config::parse(SMALL, "run.toml", &["train.seed=7".into(), "eval.none=runs/x".into()]).unwrap();
        assert_eq!((config.train.seed, config.eval.none.as_deref()), (7, Some(Path::new("runs/x"))));
        let again = Config::parse(&config.to_toml().unwrap(), "again", &[]).unwrap();
        assert_eq!(config, again);
        for layers in ["late", "[0, 7]"] {
            let settings = ["memory.kind=lora_ffn".into(), format!("memory.layers={layers}")];
            let config = Config::parse(SMALL, "run.toml", &settings).unwrap();
            assert_eq!(config.memory.kind.name(), "lora_ffn");
            assert_eq!(config.memory.layers.to_string(), layers);
            assert_eq!(Config::parse(&config.to_toml().unwrap(), "again", &[]).unwrap(), config);
        }
    }
}
