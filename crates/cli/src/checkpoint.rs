//! Checkpoints that a run begins with, whoever made them: model folders of the Hugging Face hub, runs, and files of
//! llama2.c.

use std::path::{Path, PathBuf};

use anchor::hf::{self, SpecialTokens};
use anchor::{Anchor, AnchorConfig, llama2c};
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use corpus::Tokenizer;
use serde_json::Value;
use train::Checkpoints;

use crate::config::Config;
use crate::run::write_whole;

/// Beside a tokenizer.json.
const TOKENIZER_SETTINGS: &str = "tokenizer_config.json";

/// What a checkpoint is, without its weights.
pub(crate) struct About {
    pub(crate) config: AnchorConfig,
    /// Its tokenizer.json, if it has one.
    pub(crate) tokenizer: Option<PathBuf>,
    /// Its template of chats, if it has one.
    pub(crate) chat_template: Option<String>,
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
            let chat_template = chat_template.as_deref().map(template).transpose()?.flatten();
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
            let tokens = SpecialTokens { bos: tokenizer.bos(), eos: tokenizer.ends().to_vec(), pad: None };
            let config = run.anchor.config(tokenizer.vocab_size());
            let template_file = Some(path.join("chat_template.jinja")).filter(|file| file.exists());
            let chat_template = template_file.as_deref().map(template).transpose()?.flatten();
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

/// The template of chats that a file is, or has in itself as tokenizer_config.json does: by itself, or among others as
/// the default.
fn template(file: &Path) -> Result<Option<String>> {
    let of_file = || format!("{}", file.display());
    let text = std::fs::read_to_string(file).with_context(of_file)?;
    if file.extension().is_some_and(|extension| extension == "jinja") {
        return Ok(Some(text));
    }
    let settings: Value = serde_json::from_str(&text).with_context(of_file)?;
    let found = match &settings["chat_template"] {
        Value::Array(all) => all.iter().find(|one| one["name"] == "default").map(|one| &one["template"]),
        one => Some(one),
    };
    Ok(found.and_then(Value::as_str).map(str::to_owned))
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

/// What transformers wants to know of a tokenizer beside its tokenizer.json: the file that stands there, or one that
/// says how texts begin and end.
fn tokenizer_settings(file: &Path, max_seq_len: usize) -> Result<Vec<u8>> {
    let beside = file.with_file_name(TOKENIZER_SETTINGS);
    if beside.exists() {
        return std::fs::read(&beside).with_context(|| format!("{}", beside.display()));
    }
    let tokenizer = Tokenizer::load(file)?;
    let spelling = |token: u32| tokenizer.decode(&[token]);
    let settings = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos().map(spelling).transpose()?,
        "eos_token": spelling(tokenizer.eot())?,
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": false,
    });
    Ok(serde_json::to_vec_pretty(&settings)?)
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
    if let Some(file) = &about.tokenizer {
        let bytes = std::fs::read(file).with_context(|| format!("{}", file.display()))?;
        write_whole(&folder.join("tokenizer.json"), &bytes)?;
        let settings = tokenizer_settings(file, anchor.config().max_seq_len)?;
        write_whole(&folder.join(TOKENIZER_SETTINGS), &settings)?;
        files.extend(["tokenizer.json", TOKENIZER_SETTINGS]);
    }
    if let Some(template) = &about.chat_template {
        write_whole(&folder.join("chat_template.jinja"), template.as_bytes())?;
        files.push("chat_template.jinja");
    }
    println!(
        "{}: {family}, {} parameters ({})",
        folder.display(),
        anchor.config().n_parameters(),
        files.join(", ")
    );
    Ok(())
}
