use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use super::SpecialTokens;
use super::families::{FAMILIES, Family};
use super::settings::Settings;
use super::tensors::{Prefixes, Stored, stored, transpose};
use crate::{Anchor, AnchorConfig, Error, Result};

/// Writes config.json and model.safetensors of the first family that holds the anchor to `folder`, which is made; its
/// `model_type`. Numbers are f32, and a tied output is left out. A tokenizer is the caller's to copy.
///
/// Rotation tables are rounded to f32 by who reads it: the logits of an anchor that was trained with exact ones differ
/// by that, at far positions.
///
/// # Errors
/// When no family of transformers holds the anchor: names the nearest one and what it has differently. When a file
/// cannot be written.
pub fn write(anchor: &Anchor, folder: &Path, tokens: &SpecialTokens) -> Result<&'static str> {
    let (family, mut settings) = fitting(anchor.config(), folder)?;
    settings["architectures"] = json!([family.architecture]);
    settings["model_type"] = json!(family.model_type);
    settings["torch_dtype"] = json!("float32");
    settings["bos_token_id"] = json!(tokens.bos);
    settings["pad_token_id"] = json!(tokens.pad);
    settings["eos_token_id"] = match &tokens.eos[..] {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    };
    let file_error = |path: &Path, problem: String| Error::File { path: path.into(), problem };
    std::fs::create_dir_all(folder).map_err(|e| file_error(folder, e.to_string()))?;
    let path = folder.join("model.safetensors");
    let prefixes = Prefixes { model: family.names.prefix, output: "" };
    let bytes = tensors(anchor, &stored(anchor.config(), family.names, &prefixes), &path)?;
    atomic_file::write(&path, &bytes).map_err(|e| file_error(&path, e.to_string()))?;
    let path = folder.join("config.json");
    let text = format!("{settings:#}\n");
    atomic_file::write(&path, text.as_bytes()).map_err(|e| file_error(&path, e.to_string()))?;
    Ok(family.model_type)
}

/// The family whose settings, read again, are those of the anchor.
fn fitting(config: &AnchorConfig, folder: &Path) -> Result<(&'static Family, Value)> {
    let mut wanted = config.clone();
    wanted.form.rope.single = true;
    let mut nearest: Option<(usize, String)> = None;
    for family in &FAMILIES {
        let settings = (family.write)(config);
        let Value::Object(values) = settings.clone() else { continue };
        let read = (family.read)(&Settings::of(folder, values).over(&(family.defaults)()));
        let Ok(held) = read else { continue };
        if held == wanted {
            return Ok((family, settings));
        }
        let differences = differences(&wanted, &held);
        if nearest.as_ref().is_none_or(|(n, _)| differences.len() < *n) {
            let text = format!("{}, has {}", family.model_type, differences.join("; "));
            nearest = Some((differences.len(), text));
        }
    }
    let nearest = nearest.map_or("none".into(), |(_, text)| text);
    let problem = format!("no family of transformers holds this anchor: the nearest, {nearest}");
    Err(Error::File { path: folder.into(), problem })
}

/// What differs, as `key theirs where the anchor has ours`.
fn differences(ours: &AnchorConfig, theirs: &AnchorConfig) -> Vec<String> {
    fn flatten(value: Value, key: String, to: &mut BTreeMap<String, String>) {
        match value {
            Value::Object(values) => values.into_iter().for_each(|(inner, value)| {
                let key = if key.is_empty() { inner } else { format!("{key}.{inner}") };
                flatten(value, key, to);
            }),
            value => {
                to.insert(key, value.to_string());
            }
        }
    }
    let flat = |config: &AnchorConfig| {
        let mut to = BTreeMap::new();
        flatten(json!(config), String::new(), &mut to);
        to
    };
    let (ours, theirs) = (flat(ours), flat(theirs));
    let nothing = || "nothing".to_string();
    let keys: std::collections::BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
    let differs = keys.into_iter().filter(|key| ours.get(*key) != theirs.get(*key));
    differs
        .map(|key| {
            let value = |of: &BTreeMap<String, String>| of.get(key).cloned().unwrap_or_else(nothing);
            format!("{key} {} where the anchor has {}", value(&theirs), value(&ours))
        })
        .collect()
}

/// The bytes of model.safetensors.
fn tensors(anchor: &Anchor, all: &[Stored], path: &Path) -> Result<Vec<u8>> {
    let mut bytes: Vec<(&Stored, Vec<u8>)> = vec![];
    for tensor in all {
        let mut values = vec![0f32; tensor.shape.iter().product()];
        for piece in &tensor.pieces {
            let parameter = &anchor.parameters()[&piece.ours];
            let flat = parameter.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?;
            let mut from = flat.narrow(0, piece.offset, piece.len)?.to_vec1::<f32>()?;
            if let Some(columns) = piece.transposed {
                from = transpose(&from, columns);
            }
            values[piece.theirs..piece.theirs + piece.len].copy_from_slice(&from);
        }
        let bytes_of = |x: f32| (x - tensor.shift).to_le_bytes();
        bytes.push((tensor, values.into_iter().flat_map(bytes_of).collect()));
    }
    let problem = |e: safetensors::SafeTensorError| Error::File { path: path.into(), problem: e.to_string() };
    let views = bytes
        .iter()
        .map(|(tensor, bytes)| Ok((&tensor.name, TensorView::new(Dtype::F32, tensor.shape.clone(), bytes)?)))
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(problem)?;
    // transformers asks for it.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize(views, Some(metadata)).map_err(problem)
}
