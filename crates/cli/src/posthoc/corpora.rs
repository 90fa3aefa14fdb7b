//! What is learned, what is known already, and a mixture of both.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use corpus::{Corpus, SourceOptions, hash_inputs};

use crate::config::{Config, Method, PosthocSection};
use crate::prepare::prepare;
use crate::run::write_whole;

/// Configurations of prepared corpora.
pub(super) struct Corpora {
    /// What is learned.
    pub(super) learned: Config,
    /// What is not: its held-out documents are those that damage is measured on.
    pub(super) kept: Config,
    /// What `replay` reads; as what is learned without that method.
    pub(super) mixed: Config,
}

impl Corpora {
    /// Prepares what is learned, and what is not by the same tokenizer, embedder and tree. The mixture is written, to
    /// be prepared when it is trained on.
    pub(super) fn prepare(config: &Config, section: &PosthocSection) -> Result<Self> {
        let learned = Config { posthoc: None, ..config.clone() };
        eprintln!("{:>18}: {}", "what is learned", learned.corpus.prepared.display());
        prepare(&learned)?;
        check_held_out(&learned, "corpus.validation_permille or corpus.validation_files")?;
        let derived = |name: &str| {
            let mut derived = learned.clone();
            derived.corpus.prepared = config.run.dir.join(name);
            derived.tree.from = Some(learned.corpus.prepared.clone());
            derived
        };
        let mut kept = derived("kept");
        kept.corpus.validation_files = section.kept.clone();
        match section.replay.is_empty() {
            false => kept.corpus.files = section.replay.clone(),
            // A corpus has documents to train on. Nobody does.
            true => kept.corpus.validation_permille = 0,
        }
        eprintln!("{:>18}: {}", "what is not", kept.corpus.prepared.display());
        prepare(&kept)?;
        check_held_out(&kept, "posthoc.kept, or corpus.validation_permille of posthoc.replay,")?;
        let mut mixed = derived("mixed");
        if section.methods.contains(&Method::Replay) {
            fs::create_dir_all(&config.run.dir).with_context(|| format!("{}", config.run.dir.display()))?;
            let file = config.run.dir.join("mixed.jsonl");
            mix(config, section, &file)?;
            mixed.corpus.files = vec![file.display().to_string()];
            // Documents keep their ids, and so those that are held out stay so.
            mixed.corpus.text_key = "text".into();
            mixed.corpus.id_key = Some("id".into());
            mixed.corpus.label_key = config.corpus.label_key.as_ref().map(|_| "label".into());
            mixed.corpus.format = None;
        }
        Ok(Self { learned, kept, mixed })
    }
}

fn check_held_out(config: &Config, keys: &str) -> Result<()> {
    let dir = &config.corpus.prepared;
    if Corpus::open(dir)?.n_validation() == 0 {
        bail!("{}: expected documents that {keys} holds out, found none", dir.display());
    }
    Ok(())
}

/// Writes all documents of what is learned, and of `posthoc.replay` so many, spread evenly, that the share is theirs.
fn mix(config: &Config, section: &PosthocSection, file: &Path) -> Result<()> {
    let learned = config.corpus.source();
    let replay = SourceOptions { files: section.replay.clone(), validation_files: vec![], ..learned.clone() };
    let mut parts = vec![format!("mixed.v1 {} {:?}", section.replay_share, config.corpus.id_key)];
    for source in [&learned, &replay] {
        parts.extend(corpus::list(source)?.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?);
    }
    let (inputs, made_of) = (hash_inputs(&parts), file.with_extension("inputs"));
    if file.exists() && fs::read_to_string(&made_of).is_ok_and(|found| found == inputs) {
        return Ok(());
    }
    let bytes = |source: &SourceOptions| -> Result<f64> {
        let mut sum = 0.0;
        for_documents(source, |document| {
            sum += document.text.len() as f64;
            Ok(())
        })?;
        Ok(sum)
    };
    let (of_learned, of_replay) = (bytes(&learned)?, bytes(&replay)?);
    let wanted = of_learned * section.replay_share / (1.0 - section.replay_share);
    let taken = (wanted / of_replay).min(1.0);
    if wanted > of_replay {
        let share = of_replay / (of_learned + of_replay);
        eprintln!(
            "note: all of posthoc.replay is a share of {share:.2} (posthoc.replay_share {})",
            section.replay_share
        );
    }
    let between = file.with_extension("tmp");
    let of_file = || format!("{}", between.display());
    let mut out = BufWriter::new(fs::File::create(&between).with_context(of_file)?);
    let mut write = |document: &corpus::Document| -> Result<()> {
        let corpus::Document { id, label, text } = document;
        writeln!(out, "{}", serde_json::json!({"id": id, "label": label, "text": text})).with_context(of_file)
    };
    for_documents(&learned, |document| write(&document))?;
    let mut owed = 0.0;
    for_documents(&replay, |document| {
        let len = document.text.len() as f64;
        owed += len * taken;
        if owed < len / 2.0 {
            return Ok(());
        }
        owed -= len;
        write(&document)
    })?;
    out.into_inner()
        .map_err(|error| error.into_error())
        .and_then(|file| file.sync_all())
        .with_context(of_file)?;
    fs::rename(&between, file).with_context(of_file)?;
    write_whole(&made_of, inputs.as_bytes())
}

fn for_documents(source: &SourceOptions, mut each: impl FnMut(corpus::Document) -> Result<()>) -> Result<()> {
    for file in corpus::list(source)? {
        for document in corpus::read(&file, source)? {
            each(document?)?;
        }
    }
    Ok(())
}
