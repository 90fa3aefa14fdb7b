//! Checkpoints of llama2.c in its first format: seven integers, then f32 numbers kind by kind, layer after layer.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::{Anchor, AnchorConfig, Error, Form, QkNorm, Result};

/// Integers of the header: dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len.
const HEADER: usize = 7;

/// What a checkpoint is, by its header alone. The format has no base of the rotation and no eps: these are 10,000 and
/// 1e-5.
///
/// # Errors
/// When the file has no header, or one of no model.
pub fn describe(path: &Path) -> Result<AnchorConfig> {
    let error = |e: std::io::Error| Error::File { path: path.into(), problem: e.to_string() };
    let mut header = vec![];
    File::open(path).map_err(error)?.take(HEADER as u64 * 4).read_to_end(&mut header).map_err(error)?;
    parse(path, &header)
}

/// Reads a checkpoint, which has no tokenizer. The rest is as [`describe`] has it.
///
/// # Errors
/// As [`describe`], and when the file has not the length that its header asks for; names both.
pub fn read(path: &Path, (device, dtype): (&Device, DType)) -> Result<Anchor> {
    let error = |problem: String| Error::File { path: path.into(), problem };
    let bytes = std::fs::read(path).map_err(|e| error(e.to_string()))?;
    let config = parse(path, &bytes)?;
    let (words, _) = bytes.as_chunks::<4>();
    let kinds = kinds(&config);
    // Between the final norm and the output lie tables of the rotation.
    let tables = config.max_seq_len * config.head_width;
    let n: usize = kinds.iter().map(|(_, len)| len).sum::<usize>() + tables;
    let expected = (HEADER + n) * 4;
    if bytes.len() != expected {
        return Err(error(format!(
            "expected {expected} bytes of a model of this header, found {}",
            bytes.len()
        )));
    }
    let shapes: BTreeMap<String, Vec<usize>> = config.parameters().into_iter().collect();
    let mut values: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    let mut rest = &words[HEADER..];
    for (kind, len) in &kinds {
        if *kind == "output" {
            rest = &rest[tables..];
        }
        let (numbers, after) = rest.split_at(*len);
        rest = after;
        let numbers: Vec<f32> = numbers.iter().map(|&b| f32::from_le_bytes(b)).collect();
        if shapes.contains_key(*kind) {
            values.insert((*kind).into(), numbers);
            continue;
        }
        for (layer, numbers) in numbers.chunks_exact(len / config.n_layers).enumerate() {
            place(&mut values, (layer, kind), numbers, &config);
        }
    }
    let mut parameters = BTreeMap::new();
    for (name, shape) in shapes {
        let values = values.remove(&name).unwrap_or_default();
        parameters.insert(name, Tensor::from_vec(values, shape, device)?.to_dtype(dtype)?);
    }
    Ok(Anchor::from_parameters(config, parameters))
}

/// The configuration that the first bytes of a file tell.
fn parse(path: &Path, bytes: &[u8]) -> Result<AnchorConfig> {
    let error = |problem: String| Error::File { path: path.into(), problem };
    let Some(header) = bytes.as_chunks::<4>().0.first_chunk::<HEADER>() else {
        return Err(error(format!("expected {HEADER} integers, found {} bytes", bytes.len())));
    };
    let config = config(header.map(i32::from_le_bytes)).map_err(error)?;
    config.check()?;
    Ok(config)
}

fn config(header: [i32; HEADER]) -> std::result::Result<AnchorConfig, String> {
    let names = ["dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len"];
    let mut sizes = [0; HEADER];
    for ((size, found), name) in sizes.iter_mut().zip(header).zip(names) {
        // A size below 0 says that the output has a matrix of its own.
        let magnitude = if name == "vocab_size" { found.saturating_abs() } else { found };
        // So large that no product of three overflows.
        *size = usize::try_from(magnitude)
            .ok()
            .filter(|size| (1..1 << 20).contains(size))
            .ok_or_else(|| format!("{name}: expected a size, found {found}"))?;
    }
    let [d_model, ffn_width, n_layers, n_heads, kv_heads, vocab_size, max_seq_len] = sizes;
    if !d_model.is_multiple_of(n_heads) {
        return Err(format!("dim: expected a multiple of {n_heads} heads, found {d_model}"));
    }
    let mut form = Form::default();
    form.attention.kv_heads = (kv_heads != n_heads).then_some(kv_heads);
    form.attention.qk_norm = QkNorm::None;
    form.rope.single = true;
    Ok(AnchorConfig {
        vocab_size,
        d_model,
        n_layers,
        n_heads,
        head_width: d_model / n_heads,
        ffn_width,
        tied_embeddings: header[5] > 0,
        max_seq_len,
        rope_base: 10_000.0,
        norm_eps: 1e-5,
        form,
    })
}

/// The kinds of tensors in their order in the file, and the numbers of all layers together.
fn kinds(config: &AnchorConfig) -> Vec<(&'static str, usize)> {
    let layer = config.layer(0);
    let (v, d, l, f) = (config.vocab_size, config.d_model, config.n_layers, config.ffn_width);
    let (query, key) = (layer.query_width() * d, layer.kv_width() * d);
    let mut kinds = vec![
        ("token_embedding", v * d),
        ("attention_norm", l * d),
        ("query", l * query),
        ("key", l * key),
        ("value", l * key),
        ("attention_output", l * query),
        ("ffn_norm", l * d),
        ("gate", l * f * d),
        ("down", l * f * d),
        ("up", l * f * d),
        ("final_norm", d),
    ];
    if !config.tied_embeddings {
        kinds.push(("output", v * d));
    }
    kinds
}

/// Puts the numbers of a layer where they belong.
fn place(
    values: &mut BTreeMap<String, Vec<f32>>,
    (layer, kind): (usize, &str),
    numbers: &[f32],
    config: &AnchorConfig,
) {
    let (d, f) = (config.d_model, config.ffn_width);
    let name = |kind: &str| format!("layers.{layer}.{kind}");
    let ffn = |values: &mut BTreeMap<String, Vec<f32>>, third: usize, numbers: &[f32]| {
        let ffn = values.entry(name("ffn")).or_insert_with(|| vec![0.0; 3 * f * d]);
        ffn[third * f * d..(third + 1) * f * d].copy_from_slice(numbers);
    };
    match kind {
        "gate" => ffn(values, 0, numbers),
        "up" => ffn(values, 1, numbers),
        "down" => ffn(values, 2, &crate::hf::transpose(numbers, f)),
        "query" | "key" => {
            values.insert(name(kind), halves(numbers, config.head_width, d));
        }
        _ => {
            values.insert(name(kind), numbers.to_vec());
        }
    }
}

/// Rows [heads·K, D] whose pairs of dimensions are neighbours, with the pairs as halves of each head.
fn halves(rows: &[f32], head_width: usize, d: usize) -> Vec<f32> {
    let half = head_width / 2;
    let mut to = vec![0.0; rows.len()];
    for (head, rows) in to.chunks_exact_mut(head_width * d).zip(rows.chunks_exact(head_width * d)) {
        for (i, row) in rows.chunks_exact(d).enumerate() {
            let place = i / 2 + i % 2 * half;
            head[place * d..(place + 1) * d].copy_from_slice(row);
        }
    }
    to
}
