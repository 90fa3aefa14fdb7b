use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use tokenizers::Tokenizer;

use crate::embedder::{Embedder, embed_rows, sha256};
use crate::table::{floats, integers, parse, tensor_error, view};
use crate::{Error, Result};

/// Part of every fingerprint: raise it when the same files come to give other embeddings.
const FORMAT: &str = "anchorage.static.v1";

/// A static embedder in the layout of model2vec: the mean of the vectors of a text's tokens, scaled
/// to unit norm.
///
/// The folder holds `tokenizer.json` and `model.safetensors`: the tensor `embeddings` (or the only
/// one of two dimensions), F32, F16, BF16 or I8, and, if they are there, `weights` (a factor per
/// token) and `mapping` (the row of each token). The integers of an I8 table stand for themselves,
/// since a common scale cancels in the norm. As in model2vec, unknown tokens are left out and no
/// special ones added; unlike there, no text is cut at a number of tokens. Rows always have unit
/// norm, so that `normalize` in a `config.json` does not matter.
pub struct Static {
    tokenizer: Tokenizer,
    /// The token that stands for what the vocabulary lacks.
    unknown: Option<u32>,
    tokens: Vec<TokenVector>, // [V]
    table: Vec<f32>,          // [rows, D]
    dim: usize,
    fingerprint: String,
}

/// Where the vector of a token is: a row of the table, times a weight.
struct TokenVector {
    row: usize,
    weight: f32,
}

impl Static {
    /// Reads a folder. Fails on a file that is missing or cut short, on a tensor of another type, on
    /// a table, `weights` or `mapping` whose length is not the tokenizer's vocabulary, and on a value
    /// that is not finite or names no row.
    pub fn load(folder: &Path) -> Result<Self> {
        let (model_path, tokenizer_path) = (folder.join("model.safetensors"), folder.join("tokenizer.json"));
        let model = fs::read(&model_path).map_err(Error::io(&model_path))?;
        let json = fs::read(&tokenizer_path).map_err(Error::io(&tokenizer_path))?;
        let (tokenizer, unknown) = read_tokenizer(&tokenizer_path, &json)?;
        let n_tokens = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let (_, tensors) = parse(&model_path, &model)?;
        let reader = Reader { path: model_path, tensors, n_tokens };
        let (table, n_rows, dim) = reader.table()?;
        let weights = reader.weights()?;
        let tokens = reader
            .rows(n_rows)?
            .into_iter()
            .enumerate()
            .map(|(token, row)| TokenVector { row, weight: weights.as_ref().map_or(1.0, |w| w[token]) })
            .collect();
        let fingerprint = sha256(&[FORMAT.as_bytes(), &model, &json]);
        Ok(Self { tokenizer, unknown, tokens, table, dim, fingerprint })
    }

    /// Adds up the vectors of a text's tokens in a row of zeros. Only the direction counts, so the
    /// sum does for the mean.
    fn fill(&self, index: usize, text: &str, row: &mut [f32]) -> Result<()> {
        let tokenise_error = |error: tokenizers::Error| Error::Tokenise { index, reason: error.to_string() };
        let encoding = self.tokenizer.encode_fast(text, false).map_err(tokenise_error)?;
        for &token in encoding.get_ids().iter().filter(|&&token| Some(token) != self.unknown) {
            // The table covers the largest id of the vocabulary.
            let TokenVector { row: table_row, weight } = self.tokens[token as usize];
            let vector = &self.table[table_row * self.dim..][..self.dim];
            row.iter_mut().zip(vector).for_each(|(sum, value)| *sum += weight * value);
        }
        Ok(())
    }
}

impl Embedder for Static {
    fn dim(&self) -> usize {
        self.dim
    }

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn embed(&self, texts: &[&str]) -> Result<Vec<f32>> {
        embed_rows(texts, self.dim, |(), index, row| self.fill(index, texts[index], row))
    }
}

/// The tokenizer, without the truncation and padding that its file may ask for, and the id of its
/// unknown token, if it has one.
fn read_tokenizer(path: &Path, json: &[u8]) -> Result<(Tokenizer, Option<u32>)> {
    let error = |reason: String| Error::Tokenizer { path: path.to_owned(), reason };
    let mut tokenizer = Tokenizer::from_bytes(json).map_err(|cause| error(cause.to_string()))?;
    tokenizer.with_truncation(None).map_err(|cause| error(cause.to_string()))?;
    tokenizer.with_padding(None);
    let value: serde_json::Value = serde_json::from_slice(json).map_err(|cause| error(cause.to_string()))?;
    // Unigram models name the unknown token by its id, the others by its text.
    let model = &value["model"];
    if let Some(id) = model["unk_id"].as_u64() {
        let id = u32::try_from(id).map_err(|_| error(format!("unk_id is {id}, expected a token id")))?;
        return Ok((tokenizer, Some(id)));
    }
    let unknown = model["unk_token"].as_str().and_then(|text| tokenizer.token_to_id(text));
    Ok((tokenizer, unknown))
}

/// The tensors of a model file, checked against a vocabulary of `n_tokens`.
struct Reader<'a> {
    path: PathBuf,
    tensors: SafeTensors<'a>,
    n_tokens: usize,
}

impl Reader<'_> {
    /// The table with its numbers of rows and of dimensions.
    fn table(&self) -> Result<(Vec<f32>, usize, usize)> {
        let name = self.table_name();
        let n_rows = if self.has("mapping") { "rows".to_owned() } else { self.n_tokens.to_string() };
        let expected = format!("F32, F16, BF16 or I8 [{n_rows}, dim] for {} tokens", self.n_tokens);
        let tensor = view(&self.path, &self.tensors, name, &expected)?;
        let mismatch = || tensor_error(&self.path, name, &expected, &tensor);
        let &[n_rows, dim] = tensor.shape() else { return Err(mismatch()) };
        if dim == 0 || (!self.has("mapping") && n_rows != self.n_tokens) {
            return Err(mismatch());
        }
        let table = floats(&tensor).ok_or_else(mismatch)?;
        self.check_finite(name, &table, dim)?;
        Ok((table, n_rows, dim))
    }

    /// `embeddings`, or the only tensor of two dimensions.
    fn table_name(&self) -> &str {
        let tables: Vec<&str> = self
            .tensors
            .iter()
            .filter(|(_, tensor)| tensor.shape().len() == 2)
            .map(|(name, _)| name)
            .collect();
        match tables[..] {
            [only] if !self.has("embeddings") => only,
            _ => "embeddings",
        }
    }

    /// A factor per token, if the file has them.
    fn weights(&self) -> Result<Option<Vec<f32>>> {
        if !self.has("weights") {
            return Ok(None);
        }
        let expected = format!("F64, F32, F16 or BF16 [{}]", self.n_tokens);
        let weights = self.per_token("weights", &expected, floats)?;
        self.check_finite("weights", &weights, 1)?;
        Ok(Some(weights))
    }

    /// The row of each token: by `mapping`, or its own.
    fn rows(&self, n_rows: usize) -> Result<Vec<usize>> {
        if !self.has("mapping") {
            return Ok((0..self.n_tokens).collect());
        }
        let expected = format!("I64 or I32 [{}]", self.n_tokens);
        let mapping = self.per_token("mapping", &expected, integers)?;
        let row = |(token, &row): (usize, &i64)| match usize::try_from(row) {
            Ok(row) if row < n_rows => Ok(row),
            _ => Err(self.value_error("mapping", token, format!("a row below {n_rows}"), row.to_string())),
        };
        mapping.iter().enumerate().map(row).collect()
    }

    fn per_token<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl Fn(&TensorView) -> Option<Vec<T>>,
    ) -> Result<Vec<T>> {
        let tensor = view(&self.path, &self.tensors, name, expected)?;
        let values = read(&tensor).filter(|_| tensor.shape() == [self.n_tokens]);
        values.ok_or_else(|| tensor_error(&self.path, name, expected, &tensor))
    }

    fn check_finite(&self, name: &str, values: &[f32], row_len: usize) -> Result<()> {
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(at) => {
                let (expected, found) = ("finite numbers".to_owned(), values[at].to_string());
                Err(self.value_error(name, at / row_len, expected, found))
            }
        }
    }

    fn value_error(&self, tensor: &str, row: usize, expected: String, found: String) -> Error {
        Error::Value { path: self.path.clone(), tensor: tensor.to_owned(), row, expected, found }
    }

    fn has(&self, name: &str) -> bool {
        self.tensors.tensor(name).is_ok()
    }
}
