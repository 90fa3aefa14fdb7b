use std::fs;
use std::ops::Range;
use std::path::Path;

use embed::{Embedder, normalise, sha256};
use rayon::prelude::*;
use tokenizers::Tokenizer;

use crate::model::{Model, Scratch};
use crate::settings::{Pooling, Settings};
use crate::weights::Weights;
use crate::{Error, Result};

/// Part of every fingerprint: raise it when the same files come to give other embeddings.
const FORMAT: &str = "anchorage.bert.v1";

/// Rows of a batch at most, a longer sequence aside: enough that the weights, read once a batch, cost
/// little, and few enough that activations stay in the cache of the thread that has the batch.
const BATCH_ROWS: usize = 512;

/// A BERT of sentence-transformers.
///
/// The folder holds `config.json`, `model.safetensors` (F32, F16 or BF16; names with or without `bert.`) and
/// `tokenizer.json`; `modules.json`, the `config.json` of the pooling module and
/// `sentence_bert_config.json` count if they are there. A text of more word pieces than the model's limit is
/// cut, and its embedding is the mean of those of its parts, weighted by their word pieces. Rows always
/// have unit norm, and the same text gives the same bits in any company and on any number of threads.
pub struct Bert {
    model: Model,
    tokenizer: Tokenizer,
    /// The word pieces before and after every sequence.
    special: [u32; 2],
    width: usize,
    pooling: Pooling,
    limit: usize,
    lower_case: bool,
    fingerprint: String,
}

/// A part of a text that fits the model.
struct Chunk {
    text: usize,
    pieces: Range<usize>,
}

impl Chunk {
    /// With its special tokens.
    fn rows(&self) -> usize {
        self.pieces.len() + 2
    }
}

impl Bert {
    /// Reads a folder. Fails on a file that is missing or broken, on a kind of model or a value that is not
    /// supported, on a tensor of another type or shape, and on a tokenizer that is not BERT's.
    pub fn load(folder: &Path) -> Result<Self> {
        let settings = Settings::read(folder)?;
        let model_path = settings.transformer.join("model.safetensors");
        let tokenizer_path = settings.transformer.join("tokenizer.json");
        let bytes = fs::read(&model_path).map_err(Error::io(&model_path))?;
        let json = fs::read(&tokenizer_path).map_err(Error::io(&tokenizer_path))?;
        let (tokenizer, special) = read_tokenizer(&tokenizer_path, &json, settings.vocab)?;
        let model = Model::read(&settings, &Weights::new(&model_path, &bytes)?)?;
        let Settings { width, heads, eps, activation, pooling, limit, lower_case, .. } = settings;
        let used = format!("{heads} {eps} {activation:?} {pooling:?} {limit} {lower_case}");
        let fingerprint = sha256(&[FORMAT.as_bytes(), used.as_bytes(), &bytes, &json]);
        Ok(Self { model, tokenizer, special, width, pooling, limit, lower_case, fingerprint })
    }

    /// The word pieces of a text, special tokens aside.
    fn pieces(&self, index: usize, text: &str) -> embed::Result<Vec<u32>> {
        let encoding = match self.lower_case {
            true => self.tokenizer.encode_fast(text.to_lowercase(), false),
            false => self.tokenizer.encode_fast(text, false),
        };
        let error = |error: tokenizers::Error| embed::Error::Tokenise { index, reason: error.to_string() };
        Ok(encoding.map_err(error)?.get_ids().to_vec())
    }

    /// The parts of a text of `n` word pieces: at least one, which may be empty.
    fn chunks(&self, text: usize, n: usize) -> impl Iterator<Item = Chunk> {
        let most = self.limit - 2;
        (0..n.max(1)).step_by(most).map(move |first| Chunk { text, pieces: first..n.min(first + most) })
    }

    /// Unit vectors of chunks, `[chunks, D]`; `pieces` are those of all texts.
    fn forward(&self, scratch: &mut Scratch, chunks: &[Chunk], pieces: &[Vec<u32>]) -> Vec<f32> {
        let mut ids = vec![];
        for chunk in chunks {
            ids.push(self.special[0]);
            ids.extend_from_slice(&pieces[chunk.text][chunk.pieces.clone()]);
            ids.push(self.special[1]);
        }
        let lengths: Vec<usize> = chunks.iter().map(Chunk::rows).collect();
        let mut rest = self.model.forward(scratch, &ids, &lengths);
        let mut vectors = vec![0f32; chunks.len() * self.width];
        for (vector, length) in vectors.chunks_exact_mut(self.width).zip(lengths) {
            let (rows, after) = rest.split_at(length * self.width);
            self.pool(rows, vector);
            normalise(vector);
            rest = after;
        }
        vectors
    }

    /// Makes one vector of the rows of a sequence, but for its length.
    fn pool(&self, rows: &[f32], vector: &mut [f32]) {
        let mut rows = rows.chunks_exact(self.width);
        vector.copy_from_slice(rows.next().expect("a sequence has its special tokens"));
        match self.pooling {
            Pooling::Cls => {}
            Pooling::Mean => {
                rows.for_each(|row| vector.iter_mut().zip(row).for_each(|(sum, x)| *sum += x));
            }
            Pooling::Max => {
                rows.for_each(|row| vector.iter_mut().zip(row).for_each(|(most, &x)| *most = most.max(x)));
            }
        }
    }
}

impl Embedder for Bert {
    fn dim(&self) -> usize {
        self.width
    }

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn embed(&self, texts: &[&str]) -> embed::Result<Vec<f32>> {
        let pieces: Vec<embed::Result<Vec<u32>>> =
            texts.par_iter().enumerate().map(|(index, text)| self.pieces(index, text)).collect();
        let pieces: Vec<Vec<u32>> = pieces.into_iter().collect::<embed::Result<_>>()?;
        let chunks: Vec<Chunk> =
            pieces.iter().enumerate().flat_map(|(text, pieces)| self.chunks(text, pieces.len())).collect();
        let vectors: Vec<Vec<f32>> = batches(&chunks)
            .into_par_iter()
            .map_init(|| self.model.scratch(), |scratch, batch| self.forward(scratch, batch, &pieces))
            .collect();
        let vectors = vectors.iter().flat_map(|vectors| vectors.chunks_exact(self.width));
        let mut rows = vec![0f32; texts.len() * self.width];
        for (chunk, vector) in chunks.iter().zip(vectors) {
            let weight = chunk.pieces.len().max(1) as f32;
            let row = &mut rows[chunk.text * self.width..][..self.width];
            row.iter_mut().zip(vector).for_each(|(sum, x)| *sum += weight * x);
        }
        rows.chunks_exact_mut(self.width).for_each(normalise);
        Ok(rows)
    }
}

/// Runs of chunks of at most [`BATCH_ROWS`] together.
fn batches(mut chunks: &[Chunk]) -> Vec<&[Chunk]> {
    let mut batches = vec![];
    while !chunks.is_empty() {
        let mut rows = 0;
        let fits = |chunk: &&Chunk| {
            rows += chunk.rows();
            rows <= BATCH_ROWS
        };
        let n = chunks.iter().take_while(fits).count().max(1);
        let (batch, rest) = chunks.split_at(n);
        batches.push(batch);
        chunks = rest;
    }
    batches
}

/// The tokenizer, without the truncation and padding that its file may ask for, and what it puts before
/// and after a text.
fn read_tokenizer(path: &Path, json: &[u8], vocab: usize) -> Result<(Tokenizer, [u32; 2])> {
    let error = |reason: String| Error::File(embed::Error::Tokenizer { path: path.to_owned(), reason });
    let failed = |cause: tokenizers::Error| error(cause.to_string());
    let mut tokenizer = Tokenizer::from_bytes(json).map_err(failed)?;
    tokenizer.with_truncation(None).map_err(failed)?;
    tokenizer.with_padding(None);
    let largest = tokenizer.get_vocab(true).into_values().max();
    if let Some(id) = largest.filter(|&id| id as usize >= vocab) {
        return Err(error(format!(
            "largest id is {id}, expected one below the model's vocab_size ({vocab})"
        )));
    }
    let around = tokenizer.encode_fast("", true).map_err(failed)?;
    match *around.get_ids() {
        [before, after] => Ok((tokenizer, [before, after])),
        _ => Err(error(format!("puts {:?} around a text, expected [CLS] and [SEP]", around.get_tokens()))),
    }
}
