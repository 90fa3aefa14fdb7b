//! Text and token ids.

use std::path::Path;
use std::sync::OnceLock;

use rayon::prelude::*;
use sha2::{Digest, Sha256};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as Inner};

use crate::prepared::files::write_whole;
use crate::source::hex;
use crate::{Error, Result};

/// The end-of-text token of the tokenizers trained here, with id 0.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// The end-of-text tokens that [`Tokenizer::load`] looks for, in this order.
pub const END_OF_TEXT_NAMES: [&str; 4] = [END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>"];

/// The tokens that end the turns of a chat, where a tokenizer has them: they end a text too.
pub const END_OF_TURN_NAMES: [&str; 4] = ["<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>"];

/// The default of `sample_bytes` in [`Tokenizer::train`]: 64 MiB.
pub const SAMPLE_BYTES: usize = 64 << 20;

/// A tokenizer: text to token ids and back.
pub struct Tokenizer {
    inner: Inner,
    /// The file's bytes as they were loaded or made, so that a saved tokenizer keeps its hash.
    json: Vec<u8>,
    hash: String,
    eot: u32,
    bos: Option<u32>,
    ends: Vec<u32>,
    vocab_size: usize,
    n_needed: usize,
    longest: Option<usize>,
    /// Whether the text of a token depends on whether it is the first.
    joins: bool,
    /// The same one that takes text which spells a special token for that token; made when it is needed.
    marking: OnceLock<Box<Inner>>,
}

impl Tokenizer {
    /// Trains a byte-level BPE on at most `sample_bytes` bytes of `texts`. The vocabulary holds
    /// [`END_OF_TEXT`] as id 0, the 256 bytes, and merges up to `vocab_size`; on little text it comes
    /// out smaller, so ask [`vocab_size`](Self::vocab_size). The same texts give the same tokenizer.
    /// Fails on the first error of `texts`, and when they hold no text.
    pub fn train(
        texts: impl Iterator<Item = Result<String>>,
        vocab_size: usize,
        sample_bytes: usize,
    ) -> Result<Self> {
        let sample = sample(texts, sample_bytes)?;
        let mut inner = Inner::new(BPE::default());
        inner.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        inner.with_decoder(Some(ByteLevel::new(false, true, true)));
        let trainer = BpeTrainer::builder()
            .vocab_size(vocab_size)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .show_progress(false)
            .build();
        inner.train(&mut TrainerWrapper::from(trainer), sample.iter()).map_err(|e| failed("training", e))?;
        let json = inner.to_string(false).map_err(|e| failed("training", e))?;
        Self::new(json.into_bytes(), Path::new("training"), &[END_OF_TEXT])
    }

    /// Loads any `tokenizer.json`. Its end-of-text token is the first of [`END_OF_TEXT_NAMES`] that it has as a special
    /// token, or else as any: `</s>` ends a text for some and strikes it through for others. Fails on a file that is
    /// missing or damaged, and when it has none of them.
    pub fn load(path: &Path) -> Result<Self> {
        let json = std::fs::read(path).map_err(Error::io(path))?;
        Self::new(json, path, &END_OF_TEXT_NAMES)
    }

    fn new(json: Vec<u8>, path: &Path, end_of_text: &[&str]) -> Result<Self> {
        let name = path.display().to_string();
        let mut inner = Inner::from_bytes(&json).map_err(|e| failed(&name, e))?;
        let added = inner.get_added_tokens_decoder();
        let special = |name: &&str| {
            inner.token_to_id(name).filter(|id| added.get(id).is_some_and(|token| token.special))
        };
        let (spelling, eot) = end_of_text
            .iter()
            .find_map(|name| Some((*name, special(name)?)))
            .or_else(|| end_of_text.iter().find_map(|name| Some((*name, inner.token_to_id(name)?))))
            .ok_or_else(|| Error::NoEndOfText {
                path: path.to_owned(),
                looked_for: end_of_text.join(", "),
            })?;
        let ends = std::iter::once(eot).chain(END_OF_TURN_NAMES.iter().filter_map(special)).collect();
        // Documents are never cut or filled up behind the caller's back, text that spells a special
        // token stays text, and the end of text counts as special even where the file does not say so.
        inner.with_truncation(None).map_err(|e| failed(&name, e))?;
        inner.with_padding(None);
        let bos = before(&inner, &name)?.filter(|&bos| bos != eot);
        inner.add_special_tokens([AddedToken::from(spelling, true)]).map_err(|e| failed(&name, e))?;
        inner.set_encode_special_tokens(true);
        // The highest id counts, not the number of entries: files with holes in their ids exist.
        let vocab = inner.get_vocab(true);
        let vocab_size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        let texts = inner.get_vocab(false).into_values();
        let plain = added.iter().filter(|(_, token)| !token.special).map(|(&id, _)| id);
        let highest = texts.chain(plain).chain([eot]).chain(bos).max();
        let hash = hex(&Sha256::digest(&json));
        let is_whole =
            |model: &ModelWrapper| matches!(model, ModelWrapper::BPE(bpe) if bpe.get_unk_token().is_none());
        let keeps_all = inner.get_normalizer().is_none() && is_whole(inner.get_model());
        let longest = keeps_all.then(|| vocab.keys().map(String::len).max());
        let joins = joins(&inner, &name)?;
        Ok(Self {
            inner,
            json,
            hash,
            eot,
            bos,
            ends,
            vocab_size,
            n_needed: highest.map_or(0, |id| id as usize + 1),
            longest: longest.flatten(),
            joins,
            marking: OnceLock::new(),
        })
    }

    /// No token stands for more bytes of text than this. None where text may be shortened before it is divided, or
    /// unknown text of any length become one token.
    pub fn longest(&self) -> Option<usize> {
        self.longest
    }

    /// The token ids of `text`, without any special token; text that spells one is plain text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(|e| failed("encoding", e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The token ids of `text` as a template of chats makes it: what spells a special token is that token.
    pub fn encode_marked(&self, text: &str) -> Result<Vec<u32>> {
        let name = "a template of chats";
        let marking = match self.marking.get() {
            Some(marking) => marking,
            None => {
                let mut inner = self.inner.clone();
                inner.set_encode_special_tokens(false);
                self.marking.get_or_init(|| Box::new(inner))
            }
        };
        let encoding = marking.encode_fast(text, false).map_err(|e| failed(name, e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The token ids of each text, in parallel.
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T]) -> Result<Vec<Vec<u32>>> {
        texts.par_iter().map(|text| self.encode(text.as_ref())).collect()
    }

    /// The text of token ids; special tokens are spelled out. Bytes that are not UTF-8, as where a
    /// window cuts a character, become U+FFFD. Fails on an id that the vocabulary does not have.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        let vocab_size = self.vocab_size;
        if let Some(position) = tokens.iter().position(|&token| token as usize >= vocab_size) {
            return Err(Error::OutOfVocabulary {
                name: "decoding".to_owned(),
                position: position as u64,
                token: tokens[position],
                vocab_size,
            });
        }
        self.inner.decode(tokens, false).map_err(|e| failed("decoding", e))
    }

    /// The text of token ids that follow the token `last`, if one comes before: some tokenizers take a space off the
    /// first token of a text.
    pub fn decode_behind(&self, last: Option<u32>, tokens: &[u32]) -> Result<String> {
        match last.filter(|_| self.joins) {
            None => self.decode(tokens),
            Some(last) => {
                let text = self.decode(&[&[last], tokens].concat())?;
                let n_before = self.decode(&[last])?.len();
                Ok(text.get(n_before..).unwrap_or_default().to_owned())
            }
        }
    }

    /// Whether the text of a token depends on whether it is the first of a text.
    pub(crate) fn joins(&self) -> bool {
        self.joins
    }

    /// The end-of-text token.
    pub fn eot(&self) -> u32 {
        self.eot
    }

    /// The token that the file puts before every text, unless that is the end-of-text token: a model which was trained
    /// with it reads badly without.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// What comes before a text that continues none: the beginning-of-text token, or without one the end-of-text
    /// token, which is what stands before a document then.
    pub fn begin(&self) -> u32 {
        self.bos.unwrap_or(self.eot)
    }

    /// Tokens behind which there is nothing more: the end-of-text token, then those of [`END_OF_TURN_NAMES`].
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// Whether the file says that a token is special.
    pub fn is_special(&self, token: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&token).is_some_and(|t| t.special)
    }

    /// One more than the highest token id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// One more than the highest token id that text can have, or that begins or ends it: some files have special
    /// tokens beyond, for images say, which models of text have no rows for.
    pub fn n_needed(&self) -> usize {
        self.n_needed
    }

    /// Sha256 of the `tokenizer.json`, as hexadecimal digits.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Writes the `tokenizer.json`, byte for byte as it was loaded or trained.
    pub fn save(&self, path: &Path) -> Result<()> {
        write_whole(path, &self.json)
    }
}

/// The one token that the tokenizer puts before a text, if it does.
fn before(inner: &Inner, name: &str) -> Result<Option<u32>> {
    let ids = |mark: bool| -> Result<Vec<u32>> {
        let encoding = inner.encode_fast("a", mark).map_err(|e| failed(name, e))?;
        Ok(encoding.get_ids().to_vec())
    };
    let (plain, marked) = (ids(false)?, ids(true)?);
    Ok(marked.split_first().filter(|(_, rest)| rest.starts_with(&plain)).map(|(&first, _)| first))
}

/// Whether the text of tokens is not that of each, one after the other.
fn joins(inner: &Inner, name: &str) -> Result<bool> {
    let wrong = |e| failed(name, e);
    let ids = inner.encode_fast("a a", false).map_err(wrong)?.get_ids().to_vec();
    let each = ids.iter().map(|&id| inner.decode(&[id], false)).collect::<std::result::Result<String, _>>();
    Ok(inner.decode(&ids, false).map_err(wrong)? != each.map_err(wrong)?)
}

/// The first `sample_bytes` bytes of the texts; the last one is cut at a character.
fn sample(texts: impl Iterator<Item = Result<String>>, sample_bytes: usize) -> Result<Vec<String>> {
    let mut sample = Vec::new();
    let mut rest = sample_bytes;
    for text in texts {
        let mut text = text?;
        let end = (0..=rest.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
        text.truncate(end.unwrap_or(0));
        rest -= text.len();
        if text.is_empty() && rest < char::MAX.len_utf8() {
            break;
        }
        sample.push(text);
        if rest == 0 {
            break;
        }
    }
    if sample.iter().all(String::is_empty) {
        return Err(Error::NoTrainingText);
    }
    Ok(sample)
}

fn failed(name: &str, error: tokenizers::Error) -> Error {
    Error::Tokenizer { name: name.to_owned(), reason: error.to_string() }
}

#[cfg(test)]
mod tests;
