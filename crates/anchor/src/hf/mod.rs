//! Model folders as the Hugging Face hub has them: config.json, safetensors and a tokenizer.
//!
//! A family is a row of two tables: what its config.json says, and the names of its tensors. Nothing else knows
//! families: what they differ in is the [`crate::Form`] of an anchor.

mod families;
mod files;
mod settings;
mod tensors;
mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::json;

use crate::{Anchor, AnchorConfig, Error, Result};
use families::{FAMILIES, Family};
use files::Tensors;
use settings::Settings;
use tensors::{Piece, Prefixes, Stored, stored};

pub(crate) use tensors::transpose;
pub use write::write;

/// What a model folder says beside the weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Folder {
    /// The family, as `model_type` names it.
    pub model_type: String,
    /// Sizes and form of the anchor.
    pub config: AnchorConfig,
    /// Tokens of its own.
    pub tokens: SpecialTokens,
    /// tokenizer.json, if it is there.
    pub tokenizer: Option<PathBuf>,
    /// The file that holds the chat template: chat_template.jinja, or tokenizer_config.json if that has one.
    pub chat_template: Option<PathBuf>,
}

/// Tokens that begin and end a text, and that fill a batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begins a text.
    pub bos: Option<u32>,
    /// Each ends it.
    pub eos: Vec<u32>,
    /// Fills a batch.
    pub pad: Option<u32>,
}

/// What comes before the names of a model of text within one of images and text, and before its output's.
const WITHIN: [(&str, &str); 2] =
    [("language_model.model.", "language_model."), ("model.language_model.", "")];

/// Where the other parts of a model of images and text are.
const OTHER_PARTS: [&str; 4] =
    ["vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."];

/// Tables that older versions stored.
const COMPUTED: &str = ".rotary_emb.inv_freq";

/// What the settings of a folder say, and the family; `is_part` of a model of images and text.
struct Described {
    folder: Folder,
    family: &'static Family,
    is_part: bool,
}

/// What a model folder says, without its weights.
///
/// # Errors
/// When config.json is not that of a known family, or asks for what is not supported.
pub fn describe(folder: &Path) -> Result<Folder> {
    Ok(described(folder)?.folder)
}

/// The model of a folder, and what else the folder says. Its weights are widened to f32 and then made `dtype`.
///
/// # Errors
/// As [`describe`]; and when a tensor is missing, has another shape, or is one too many.
pub fn read(folder: &Path, (device, dtype): (&Device, DType)) -> Result<(Anchor, Folder)> {
    let Described { folder: about, family, is_part } = described(folder)?;
    let tensors = Tensors::open(folder)?;
    // A file may hold the model without its output, and then without a prefix.
    let candidates = if is_part { WITHIN } else { [(family.names.prefix, ""), ("", "")] };
    let there = |(model, _): &&(&str, &str)| {
        let embedding = format!("{model}{}", family.names.embedding);
        tensors.names().any(|name| name == embedding)
    };
    let &(model, output) = candidates.iter().find(there).unwrap_or(&candidates[0]);
    let all = stored(&about.config, family.names, &Prefixes { model, output });
    let embedding = format!("{model}{}", family.names.embedding);
    check(&tensors, &all, (&about.config, &embedding), is_part)?;
    let mut pieces: BTreeMap<&str, Vec<(&Stored, &Piece)>> = BTreeMap::new();
    for tensor in &all {
        for piece in &tensor.pieces {
            pieces.entry(&piece.ours).or_default().push((tensor, piece));
        }
    }
    let mut parameters = BTreeMap::new();
    for (name, shape) in about.config.parameters() {
        let mut values = vec![0.0; shape.iter().product()];
        for (tensor, piece) in &pieces[name.as_str()] {
            fill(&mut values, &tensors, tensor, piece)?;
        }
        let value = Tensor::from_vec(values, shape, device)?.to_dtype(dtype)?;
        parameters.insert(name, value);
    }
    Ok((Anchor::from_parameters(about.config.clone(), parameters), about))
}

/// Writes a piece of a parameter from a tensor.
fn fill(values: &mut [f32], tensors: &Tensors, tensor: &Stored, piece: &Piece) -> Result<()> {
    let Some(found) = tensors.get(&tensor.name) else {
        return Err(missing(tensors, &tensor.name));
    };
    let mut from = found.values(&tensor.name, piece.theirs, piece.len)?;
    if tensor.shift != 0.0 {
        from.iter_mut().for_each(|x| *x += tensor.shift);
    }
    if let Some(columns) = piece.transposed {
        from = transpose(&from, piece.len / columns);
    }
    values[piece.offset..piece.offset + piece.len].copy_from_slice(&from);
    Ok(())
}

fn missing(tensors: &Tensors, name: &str) -> Error {
    Error::Tensor { path: tensors.listed_in().into(), tensor: name.into(), problem: "missing" }
}

/// Fails unless the tensors are those that are expected.
fn check(
    tensors: &Tensors,
    all: &[Stored],
    (config, embedding): (&AnchorConfig, &str),
    is_part: bool,
) -> Result<()> {
    let mut expected = BTreeMap::new();
    for Stored { name, shape, .. } in all {
        let Some(found) = tensors.get(name) else { return Err(missing(tensors, name)) };
        if found.shape != shape {
            let (path, found) = (found.path.into(), found.shape.to_vec());
            return Err(Error::Shape { path, tensor: name.clone(), expected: shape.clone(), found });
        }
        expected.insert(name.as_str(), ());
    }
    for name in tensors.names().filter(|name| !expected.contains_key(name)) {
        if name.ends_with(COMPUTED) || is_part && OTHER_PARTS.iter().any(|part| name.starts_with(part)) {
            continue;
        }
        let (Some(found), Some(tied)) = (tensors.get(name), tensors.get(embedding)) else { continue };
        // The same matrix twice does no harm.
        if config.tied_embeddings && name.ends_with("lm_head.weight") && found.equals(&tied) {
            continue;
        }
        return Err(Error::Tensor {
            path: found.path.into(),
            tensor: name.into(),
            problem: "not part of this anchor",
        });
    }
    Ok(())
}

fn described(folder: &Path) -> Result<Described> {
    let path = folder.join("config.json");
    let settings = Settings::read(&path)?;
    let is_part = settings.has("text_config");
    let of_text = match settings.within("text_config") {
        // Files of the first versions leave the type out, and say of the whole whether the output is tied.
        Some(text) => match settings.has("tie_word_embeddings") {
            true => text.over(&json!({"tie_word_embeddings": settings.flag("tie_word_embeddings")?})),
            false => text,
        }
        .over(&json!({"model_type": "gemma3_text"})),
        None => Settings::read(&path)?,
    };
    if is_part {
        settings.only("model_type", &json!("gemma3"))?;
    }
    let model_type = of_text.text("model_type")?.to_string();
    let Some(family) = FAMILIES.iter().find(|family| family.model_type == model_type) else {
        let known: Vec<&str> = FAMILIES.iter().map(|family| family.model_type).collect();
        return of_text.unexpected("model_type", format!("one of {}", known.join(", ")));
    };
    let of_text = of_text.over(&(family.defaults)());
    let config = (family.read)(&of_text)?;
    config.check()?;
    let beside = |name: &str| Some(folder.join(name)).filter(|path| path.exists());
    let folder = Folder {
        tokens: special_tokens(folder, [&settings, &of_text])?,
        tokenizer: beside("tokenizer.json"),
        chat_template: match beside("chat_template.jinja") {
            Some(path) => Some(path),
            None => has_template(beside("tokenizer_config.json"))?,
        },
        model_type,
        config,
    };
    Ok(Described { folder, family, is_part })
}

/// The file, if it holds a chat template.
fn has_template(path: Option<PathBuf>) -> Result<Option<PathBuf>> {
    let Some(path) = path else { return Ok(None) };
    let has = Settings::read(&path)?.has("chat_template");
    Ok(has.then_some(path))
}

/// Those of generation_config.json, where it names some, or else of the settings, the outer ones first.
fn special_tokens(folder: &Path, settings: [&Settings; 2]) -> Result<SpecialTokens> {
    let path = folder.join("generation_config.json");
    let generation = if path.exists() { Some(Settings::read(&path)?) } else { None };
    let ids = |key: &str| -> Result<Vec<u32>> {
        for settings in generation.iter().chain(settings) {
            let ids = settings.ids(key)?;
            if !ids.is_empty() {
                return Ok(ids);
            }
        }
        Ok(vec![])
    };
    let first = |key: &str| Ok::<_, Error>(ids(key)?.first().copied());
    Ok(SpecialTokens { bos: first("bos_token_id")?, eos: ids("eos_token_id")?, pad: first("pad_token_id")? })
}
