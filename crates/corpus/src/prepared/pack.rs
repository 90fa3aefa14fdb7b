//! The stage `pack`: the windows of each leaf, joined and cut into sequences.

use std::path::Path;

use rayon::prelude::*;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::fingerprint::Fingerprint;
use super::packed_set::{PackedSequence, Packing};
use super::shuffle::mix2;
use super::stages::begin_stage;
use super::tokens::TokenStore;
use crate::source::hex;
use crate::{Error, Result};

pub(super) const TRAIN: &str = "train.pack";
pub(super) const VALIDATION: &str = "validation.pack";

/// How windows become sequences, and what routed them.
#[derive(Clone, Debug)]
pub struct PackOptions {
    /// Targets of a sequence; it holds one token more.
    pub seq_len: u32,
    /// Decides the order of the windows within a leaf.
    pub seed: u64,
    /// Hash of the embedder (settings included), for the fingerprint.
    pub embedder: String,
    /// Hash of the cluster tree (routing settings included), for the fingerprint.
    pub tree: String,
}

/// What the stage left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackSummary {
    /// Training sequences.
    pub n_sequences: u64,
    /// Targets of one pass over them.
    pub n_train_tokens: u64,
    /// Validation sequences.
    pub n_validation: u64,
    /// Targets of the validation sequences.
    pub n_validation_tokens: u64,
    /// Leaves of the tree.
    pub n_leaves: u64,
    /// Leaves with a training sequence.
    pub n_used_leaves: u64,
}

/// Packs the tokens in `dir`: for each leaf the training windows, in an order that `seed` decides, are
/// joined to one stream and cut into sequences of `seq_len + 1` tokens with stride `seq_len`, so that
/// every token of the stream but its first is a target exactly once (paper, section on training: only
/// documents of the same leaf share a sequence). The first window of a document begins with the
/// end-of-text token; a later one goes on without it. Where the tokenizer has a token that begins texts, every window
/// and every sequence begins with that instead: a sequence that is cut from within a window has it in place of its
/// first token, which is no target. A leaf's last sequence may be shorter, down to
/// two tokens. Validation windows are packed the same way into a second set.
///
/// `leaf_of_window[i]` is the leaf of window `i` in a tree of `branching` children per level, coarse to
/// fine. Fails when it is of another number of windows, names a leaf that the tree does not have, or
/// leaves nothing to train on.
pub fn pack(
    dir: &Path,
    leaf_of_window: &[u32],
    branching: &[usize],
    options: &PackOptions,
) -> Result<PackSummary> {
    if options.seq_len == 0 || options.seq_len == u32::MAX {
        let found = options.seq_len.to_string();
        return Err(Error::Option { key: "seq_len", expected: "from 1 to 2^32 - 2", found });
    }
    let store = TokenStore::open(dir)?;
    let n_leaves = check_leaves(&store, leaf_of_window, branching)?;
    begin_stage(dir, "pack")?;
    let (train, validation) = rayon::join(
        || packing(&store, leaf_of_window, options, false),
        || packing(&store, leaf_of_window, options, true),
    );
    let (train, validation) = (train?, validation?);
    if train.sequences.is_empty() {
        return Err(Error::NoTrainingSequence {
            dir: dir.to_owned(),
            n_validation: store.manifest().n_validation_documents,
            n_documents: store.manifest().n_documents,
        });
    }
    let fingerprint = fingerprint(&store, leaf_of_window, branching, options);
    Fingerprint::remove(dir)?;
    train.write(&dir.join(TRAIN), options.seq_len, &fingerprint.hash())?;
    validation.write(&dir.join(VALIDATION), options.seq_len, &fingerprint.hash())?;
    fingerprint.save(dir)?;
    Ok(PackSummary {
        n_sequences: train.sequences.len() as u64,
        n_train_tokens: train.n_targets(),
        n_validation: validation.sequences.len() as u64,
        n_validation_tokens: validation.n_targets(),
        n_leaves,
        n_used_leaves: train.sequences.chunk_by(|a, b| a.leaf == b.leaf).count() as u64,
    })
}

/// The number of leaves of a tree. Fails when there are none, or more than an index can count.
pub(super) fn n_leaves(branching: &[usize]) -> Result<u64> {
    let product = branching.iter().try_fold(1_u64, |product, &children| {
        // The highest index is kept free: it names the generic path.
        product.checked_mul(children as u64).filter(|product| (1..=u64::from(u32::MAX)).contains(product))
    });
    product
        .filter(|_| (1..=usize::from(u8::MAX)).contains(&branching.len()))
        .ok_or_else(|| Error::Branching { found: format!("{branching:?}") })
}

fn check_leaves(store: &TokenStore, leaf_of_window: &[u32], branching: &[usize]) -> Result<u64> {
    let n_leaves = n_leaves(branching)?;
    if leaf_of_window.len() != store.n_windows() {
        return Err(Error::WindowCount { expected: store.n_windows(), found: leaf_of_window.len() });
    }
    if u32::try_from(leaf_of_window.len()).is_err() {
        return Err(Error::TooMany { what: "windows to pack", limit: u64::from(u32::MAX) });
    }
    match leaf_of_window.iter().position(|&leaf| u64::from(leaf) >= n_leaves) {
        None => Ok(n_leaves),
        Some(window) => Err(Error::Leaf { window, leaf: leaf_of_window[window], n_leaves }),
    }
}

/// A window on its way into a leaf's stream.
struct Piece {
    leaf: u32,
    order: u64,
    window: u32,
    /// Tokens, with the one that stands before the window.
    len: u64,
}

fn packing(
    store: &TokenStore,
    leaf_of_window: &[u32],
    options: &PackOptions,
    validation: bool,
) -> Result<Packing> {
    let piece = |(index, &leaf): (usize, &u32)| -> Result<Option<Piece>> {
        let window = store.window(index)?;
        if store.is_validation(window.document)? != validation {
            return Ok(None);
        }
        let order = mix2(options.seed, index as u64);
        let len = u64::from(window.len) + u64::from(store.before(&window)?.is_some());
        Ok(Some(Piece { leaf, order, window: index as u32, len }))
    };
    let pieces = leaf_of_window.par_iter().enumerate().map(piece).filter_map(Result::transpose);
    let mut pieces: Vec<Piece> = pieces.collect::<Result<_>>()?;
    // The window makes the key unique, so the order is the same however the work is divided.
    pieces.par_sort_unstable_by_key(|piece| (piece.leaf, piece.order, piece.window));
    let mut sequences = Vec::new();
    let mut first = 0;
    for leaf in pieces.chunk_by(|a, b| a.leaf == b.leaf) {
        cut(leaf, first, options.seq_len, &mut sequences);
        first += leaf.len() as u32;
    }
    Ok(Packing { sequences, pieces: pieces.iter().map(|piece| piece.window).collect() })
}

/// Cuts the stream of one leaf; its pieces have the indices from `first_piece` on.
fn cut(pieces: &[Piece], first_piece: u32, seq_len: u32, sequences: &mut Vec<PackedSequence>) {
    let (stride, total) = (u64::from(seq_len), pieces.iter().map(|piece| piece.len).sum::<u64>());
    let (mut index, mut piece_start) = (0, 0);
    let mut start = 0;
    // A sequence needs a first token and a target.
    while start + 2 <= total {
        while start >= piece_start + pieces[index].len {
            piece_start += pieces[index].len;
            index += 1;
        }
        sequences.push(PackedSequence {
            leaf: pieces[index].leaf,
            first_piece: first_piece + index as u32,
            offset: (start - piece_start) as u32,
            len: (stride + 1).min(total - start) as u32,
        });
        start += stride;
    }
}

fn fingerprint(
    store: &TokenStore,
    leaf_of_window: &[u32],
    branching: &[usize],
    options: &PackOptions,
) -> Fingerprint {
    let manifest = store.manifest();
    let mut all = manifest.options.clone();
    let own: [(&str, Value); 3] =
        [("seq_len", options.seq_len.into()), ("seed", options.seed.into()), ("branching", branching.into())];
    all.extend(own.into_iter().map(|(key, value)| (key.to_owned(), value)));
    Fingerprint {
        files: manifest.files.clone(),
        tokenizer: manifest.tokenizer.clone(),
        embedder: options.embedder.clone(),
        tree: options.tree.clone(),
        assignment: hex(&Sha256::digest(bytemuck::cast_slice::<u32, u8>(leaf_of_window))),
        options: all,
    }
}
