//! The packed corpus: (seed, index) to a sequence.

use std::path::Path;

use cluster_tree::ClusterPath;

use super::fingerprint::Fingerprint;
use super::pack::{TRAIN, VALIDATION, n_leaves};
use super::packed_set::{PackedSequence, PackedSet};
use super::shuffle::{mix2, permute};
use super::tokens::TokenStore;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Packed documents of one leaf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// The path to the leaf.
    pub path: ClusterPath,
    /// From 2 to `seq_len + 1` tokens: inputs are all but the last, targets all but the first. A
    /// document begins with the end-of-text token, which is the target of the last token before it.
    pub tokens: Vec<u32>,
    /// Positions in `tokens` where a document, or the continuation of one, begins, rising from 0:
    /// attention does not reach back across them. The last may be the last position, which is no input.
    pub doc_starts: Vec<u32>,
    /// The document from each of `doc_starts` on.
    pub documents: Vec<u32>,
}

/// A prepared corpus, mapped into memory.
pub struct Corpus {
    store: TokenStore,
    train: PackedSet,
    validation: PackedSet,
    fingerprint: Fingerprint,
    branching: Vec<usize>,
}

impl Corpus {
    /// Opens the prepared folder `dir`. Fails when `pack` has not finished there, and on files that are
    /// truncated or not of one corpus.
    pub fn open(dir: &Path) -> Result<Self> {
        let fingerprint = Fingerprint::load(dir)?;
        let store = TokenStore::open(dir)?;
        let branching = branching(&fingerprint, dir)?;
        if fingerprint.tokenizer != store.tokenizer_hash() {
            return Err(Error::OtherTokenizer {
                path: dir.join(super::tokens::TOKENS),
                expected: store.tokenizer_hash().to_owned(),
                found: fingerprint.tokenizer,
            });
        }
        let hash = fingerprint.hash();
        let train = PackedSet::open(&dir.join(TRAIN), &hash)?;
        let validation = PackedSet::open(&dir.join(VALIDATION), &hash)?;
        Ok(Self { store, train, validation, fingerprint, branching })
    }

    /// Sequence `index` of the endless training order of `seed`: each epoch of `n_sequences` indices
    /// visits every sequence once, in a new order. A pure function, so a position in the data is one
    /// number. Fails on damaged files.
    pub fn sequence(&self, seed: u64, index: u64) -> Result<Sequence> {
        self.assemble(&self.train, self.place(seed, index)?)
    }

    /// The path of [`Corpus::sequence`], without its tokens.
    pub fn sequence_path(&self, seed: u64, index: u64) -> Result<ClusterPath> {
        let place = self.place(seed, index)?;
        self.path(&self.train, &self.train.sequences()[place as usize])
    }

    /// Where a sequence of the training order is packed.
    fn place(&self, seed: u64, index: u64) -> Result<u64> {
        let n = self.n_sequences();
        if n == 0 {
            return Err(Error::OutOfRange { what: "training sequence", index, len: 0 });
        }
        let (epoch, position) = (index / n, index % n);
        Ok(permute(position, n, mix2(seed, epoch)))
    }

    /// Validation sequence `index`, in packing order. Fails past the end and on damaged files.
    pub fn validation(&self, index: u64) -> Result<Sequence> {
        let len = self.n_validation();
        if index >= len {
            return Err(Error::OutOfRange { what: "validation sequence", index, len });
        }
        self.assemble(&self.validation, index)
    }

    /// Leaf and document of every training window, leaf by leaf.
    pub fn train_windows(&self) -> impl Iterator<Item = Result<(u32, u32)>> {
        let (sequences, pieces) = (self.train.sequences(), self.train.pieces());
        // A piece belongs to the sequence it begins in; the next one may go on with its rest.
        let begins = |record: &PackedSequence| record.first_piece as usize + usize::from(record.offset > 0);
        sequences.iter().enumerate().flat_map(move |(i, record)| {
            let end = sequences.get(i + 1).map_or(pieces.len(), begins);
            pieces[begins(record).min(end)..end]
                .iter()
                .map(move |&window| Ok((record.leaf, self.store.window(window as usize)?.document)))
        })
    }

    /// Training sequences of one epoch.
    pub fn n_sequences(&self) -> u64 {
        self.train.n_sequences()
    }

    /// Validation sequences.
    pub fn n_validation(&self) -> u64 {
        self.validation.n_sequences()
    }

    /// Targets of one epoch.
    pub fn n_train_tokens(&self) -> u64 {
        self.train.n_targets()
    }

    /// One more than the highest token id.
    pub fn vocab_size(&self) -> usize {
        self.store.vocab_size()
    }

    /// The end-of-text token, with which documents begin.
    pub fn eot(&self) -> u32 {
        self.store.eot()
    }

    /// Targets of a sequence at most.
    pub fn seq_len(&self) -> usize {
        self.train.seq_len() as usize
    }

    /// Children of a node per level of the tree, coarse to fine.
    pub fn branching(&self) -> &[usize] {
        &self.branching
    }

    /// What the corpus was made from.
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// The label of a document. Fails past the end.
    pub fn label(&self, document: u32) -> Result<Option<&str>> {
        self.store.label(document)
    }

    /// Fails when the corpus was made with another tokenizer.
    pub fn check_tokenizer(&self, tokenizer: &Tokenizer) -> Result<()> {
        self.store.check_tokenizer(tokenizer)
    }

    /// Training sequence `index` in packing order.
    #[cfg(test)]
    pub(super) fn assemble_train(&self, index: u64) -> Result<Sequence> {
        self.assemble(&self.train, index)
    }

    fn assemble(&self, set: &PackedSet, index: u64) -> Result<Sequence> {
        let sequences = set.sequences();
        let record = usize::try_from(index).ok().and_then(|index| sequences.get(index));
        let record = *record.ok_or(Error::OutOfRange {
            what: "packed sequence",
            index,
            len: sequences.len() as u64,
        })?;
        let mut sequence = Sequence {
            path: self.path(set, &record)?,
            tokens: Vec::with_capacity(record.len as usize),
            doc_starts: Vec::new(),
            documents: Vec::new(),
        };
        let mut offset = u64::from(record.offset);
        let mut piece = record.first_piece as usize;
        while sequence.tokens.len() < record.len as usize {
            self.add_piece(set, piece, offset, record.len as usize, &mut sequence)?;
            (piece, offset) = (piece + 1, 0);
        }
        if let (Some(bos), Some(first)) = (self.store.bos(), sequence.tokens.first_mut()) {
            *first = bos;
        }
        Ok(sequence)
    }

    /// Appends a piece from `offset` on, up to `len` tokens in all.
    fn add_piece(
        &self,
        set: &PackedSet,
        piece: usize,
        offset: u64,
        len: usize,
        sequence: &mut Sequence,
    ) -> Result<()> {
        let pieces = set.pieces();
        let (index, n_pieces) = (piece as u64, pieces.len() as u64);
        let window = pieces.get(piece).ok_or(Error::OutOfRange { what: "piece", index, len: n_pieces })?;
        let window = self.store.window(*window as usize)?;
        sequence.doc_starts.push(sequence.tokens.len() as u32);
        sequence.documents.push(window.document);
        let before = self.store.before(&window)?;
        sequence.tokens.extend(before.filter(|_| offset == 0));
        let skip = offset.saturating_sub(u64::from(before.is_some()));
        let rest = u64::from(window.len).checked_sub(skip).ok_or(Error::OutOfRange {
            what: "token of a window",
            index: skip,
            len: u64::from(window.len),
        })?;
        let take = rest.min((len - sequence.tokens.len()) as u64);
        self.store.extend_tokens(&mut sequence.tokens, window.start.saturating_add(skip), take as usize)
    }

    /// Index at level l = leaf / (children below level l).
    fn path(&self, set: &PackedSet, record: &PackedSequence) -> Result<ClusterPath> {
        let n_leaves = n_leaves(&self.branching)?;
        if u64::from(record.leaf) >= n_leaves {
            return Err(Error::WrongFile {
                path: set.path().to_owned(),
                expected: format!("leaves below {n_leaves}"),
                found: format!("leaf {}", record.leaf),
            });
        }
        let mut below = n_leaves;
        let indices = self.branching.iter().map(|&children| {
            below /= children as u64;
            (u64::from(record.leaf) / below) as u32
        });
        Ok(ClusterPath::new(indices.collect())?)
    }
}

fn branching(fingerprint: &Fingerprint, dir: &Path) -> Result<Vec<usize>> {
    let value = fingerprint.options.get("branching").cloned().unwrap_or_default();
    serde_json::from_value(value).map_err(|e| Error::WrongFile {
        path: dir.join("fingerprint.json"),
        expected: "a list of numbers as option branching".to_owned(),
        found: e.to_string(),
    })
}
