//! Checkpoints that a run begins with, whoever made them: model folders of the Hugging Face hub, runs, and files of
//! llama2.c.

use std::path::{Path, PathBuf};

use anchor::hf::{self, SpecialTokens};
use anchor::{Anchor, AnchorConfig, llama2c};
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use corpus::Tokenizer;
use train::Checkpoints;

use crate::config::Config;

/// What a checkpoint is, without its weights.
pub(crate) struct About {
    pub(crate) config: AnchorConfig,
    /// Its tokenizer.json, if it has one.
    pub(crate) tokenizer: Option<PathBuf>,
    /// Its template of chats, if it has one as a file.
    pub(crate) chat_template: Option<PathBuf>,
    /// In words: "qwen3 of transformers".
    pub(crate) family: String,
    /// Tokens of its own, where it says some.
    tokens: SpecialTokens,
}

enum Kind {
    Folder,
    Run,
    Llama2c,
}

fn kind(path: &Path) -> Result<Kind> {
    if path.join("config.toml").exists() {
        return Ok(Kind::Run);
    }
    if path.join("config.json").exists() {
        return Ok(Kind::Folder);
    }
    let found = match path {
        path if path.is_file() => return Ok(Kind::Llama2c),
        path if path.is_dir() => "a folder without config.json",
        _ => "nothing there",
    };
    bail!(
        "anchor.checkpoint: {}: expected a model folder (config.json), a run (config.toml) or a llama2.c file, found \
         {found}",
        path.display()
    )
}

/// What the checkpoint at `path` is.
pub(crate) fn describe(path: &Path) -> Result<About> {
    let context = || "anchor.checkpoint";
    match kind(path)? {
        Kind::Folder => {
            let hf::Folder { model_type, config, tokens, tokenizer, chat_template } =
                hf::describe(path).with_context(context)?;
            let chat_template = chat_template.filter(|file| file.extension().is_some_and(|e| e == "jinja"));
            Ok(About {
                config,
                tokenizer,
                chat_template,
                family: format!("{model_type} of transformers"),
                tokens,
            })
        }
        Kind::Run => {
            let run = Config::load(&path.join("config.toml"), &[]).with_context(context)?;
            let file = path.join("tokenizer.json");
            let tokenizer = Tokenizer::load(&file).with_context(context)?;
            let tokens = SpecialTokens { eos: vec![tokenizer.eot()], ..SpecialTokens::default() };
            let config = run.anchor.config(tokenizer.vocab_size());
            let chat_template = Some(path.join("chat_template.jinja")).filter(|file| file.exists());
            Ok(About { config, tokenizer: Some(file), chat_template, family: "a run".into(), tokens })
        }
        Kind::Llama2c => {
            let config = llama2c::describe(path).with_context(context)?;
            // Its tokenizer is another file, whose tokens 1 and 2 begin and end a text.
            let tokens = SpecialTokens { bos: Some(1), eos: vec![2], pad: None };
            Ok(About { config, tokenizer: None, chat_template: None, family: "llama2.c".into(), tokens })
        }
    }
}

/// The anchor of the checkpoint at `path` in f32, and the tokens that it was trained on, as far as that is known.
pub(crate) fn open(path: &Path, device: &Device) -> Result<(Anchor, u64)> {
    let to = (device, DType::F32);
    match kind(path)? {
        Kind::Folder => Ok((hf::read(path, to).context("anchor.checkpoint")?.0, 0)),
        Kind::Llama2c => Ok((llama2c::read(path, to).context("anchor.checkpoint")?, 0)),
        Kind::Run => {
            let checkpoints = Checkpoints::of(path);
            let step = checkpoints.require_latest()?;
            let state = checkpoints.state(step)?;
            let anchor = Anchor::load(&checkpoints.dir(step).join("anchor.safetensors"), to)?;
            Ok((anchor, state.tokens_before + state.tokens_seen))
        }
    }
}

/// Writes the anchor of the checkpoint at `from` as a folder that transformers loads, with its tokenizer if it has
/// one.
pub(crate) fn export(from: &Path, folder: &Path) -> Result<()> {
    let about = describe(from)?;
    let (anchor, _) = open(from, &Device::Cpu)?;
    if matches!(kind(from)?, Kind::Run)
        && Config::load(&from.join("config.toml"), &[])?.train.phase.has_memory()
    {
        eprintln!("note: this is the anchor alone; `anchorage bank export` writes its memory");
    }
    let family = hf::write(&anchor, folder, &about.tokens)?;
    let mut files = vec!["config.json", "model.safetensors"];
    for (name, file) in [("tokenizer.json", &about.tokenizer), ("chat_template.jinja", &about.chat_template)]
    {
        if let Some(file) = file {
            let bytes = std::fs::read(file).with_context(|| format!("{}", file.display()))?;
            crate::run::write_whole(&folder.join(name), &bytes)?;
            files.push(name);
        }
    }
    println!(
        "{}: {family}, {} parameters ({})",
        folder.display(),
        anchor.config().n_parameters(),
        files.join(", ")
    );
    Ok(())
}
