use std::collections::BTreeMap;

use anchor::{Input, Targets};
use cluster_tree::{ClusterId, ClusterPath};
use corpus::{Batch, Corpus, IGNORE, Sequence};
use generate::Model;
use memory_bank::BlockStore;
use serde::{Deserialize, Serialize};

use crate::{MemoryMode, Result};

/// Negative log-likelihood over some tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TokenSum {
    /// Their sum, nats.
    pub nats: f64,
    /// How many.
    pub tokens: u64,
}

impl TokenSum {
    fn add(&mut self, nats: f32) {
        self.nats += f64::from(nats);
        self.tokens += 1;
    }

    /// The sums of sequences, added in their order.
    pub fn total(sequences: &[Self]) -> Self {
        let add = |sum: Self, sequence: &Self| Self {
            nats: sum.nats + sequence.nats,
            tokens: sum.tokens + sequence.tokens,
        };
        sequences.iter().fold(Self::default(), add)
    }

    /// Nats per token.
    pub fn mean(&self) -> f64 {
        self.nats / self.tokens as f64
    }

    /// e^mean.
    pub fn perplexity(&self) -> f64 {
        self.mean().exp()
    }
}

/// The loss on held-out documents.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct HeldOut {
    /// Over all tokens.
    pub total: TokenSum,
    /// By the label of the token's document.
    pub by_label: BTreeMap<String, TokenSum>,
    /// By sequence: the units of a bootstrap.
    pub sequences: Vec<TokenSum>,
}

/// Which of the held-out sequences.
#[derive(Clone, Debug)]
pub struct Sample {
    /// How many; fewer than all are spread evenly, as they are stored leaf by leaf.
    pub n: u64,
    /// How many at a time.
    pub batch: usize,
    /// Which part of them, and of how many: that of a worker, by its rank. All parts' sequences, one part after
    /// the other, are those of the whole.
    pub part: (usize, usize),
    /// Only those whose own path goes through this cluster.
    pub under: Option<ClusterId>,
}

impl Sample {
    /// All of `n`, `batch` at a time.
    pub fn whole(n: u64, batch: usize) -> Self {
        Self { n, batch, part: (0, 1), under: None }
    }
}

/// The loss of `model` on held-out sequences. A random path is one of `leaves`.
///
/// A sequence's own path is that of its documents' windows, which were embedded whole: what is scored had a
/// part in choosing its memory, by at most ln(leaves) nats a window.
///
/// # Errors
/// When data or memory cannot be read.
pub fn held_out<S: BlockStore>(
    model: &Model<S>,
    corpus: &Corpus,
    mode: MemoryMode,
    sample: &Sample,
    leaves: &[ClusterPath],
) -> Result<HeldOut> {
    let mut result = HeldOut::default();
    for sequences in held_out_batches(corpus, mode, sample, leaves) {
        add_batch(model, corpus, (mode, &Batch::new(sequences?, corpus.eot())), &mut result)?;
    }
    result.total = TokenSum::total(&result.sequences);
    Ok(result)
}

/// The sequences of a sample in the batches in which they are read, each with the path whose memory it is given.
///
/// # Errors
/// Those of the corpus and of [`MemoryMode::path`].
pub fn held_out_batches(
    corpus: &Corpus,
    mode: MemoryMode,
    sample: &Sample,
    leaves: &[ClusterPath],
) -> impl Iterator<Item = Result<Vec<Sequence>>> {
    let all = corpus.n_validation();
    let (n, (part, parts), under) = (sample.n.min(all), sample.part, sample.under);
    let batch = sample.batch as u64;
    let batches = n.div_ceil(batch);
    let begin = |part: usize| part as u64 * batches / parts as u64;
    let is_meant = move |path: &ClusterPath| {
        under.is_none_or(|cluster| path.index(usize::from(cluster.level)) == cluster.index)
    };
    let of_batch = move |nth: u64| -> Result<Vec<Sequence>> {
        let mut sequences = vec![];
        for index in nth * batch..((nth + 1) * batch).min(n) {
            let sequence = corpus.validation(index * all / n)?;
            if is_meant(&sequence.path) {
                let path = mode.path(&sequence.path, (index, leaves))?;
                sequences.push(Sequence { path: path.unwrap_or_else(|| sequence.path.clone()), ..sequence });
            }
        }
        Ok(sequences)
    };
    let is_some = |sequences: &Result<Vec<Sequence>>| !matches!(sequences, Ok(some) if some.is_empty());
    (begin(part)..begin(part + 1)).map(of_batch).filter(is_some)
}

fn add_batch<S: BlockStore>(
    model: &Model<S>,
    corpus: &Corpus,
    (mode, batch): (MemoryMode, &Batch),
    result: &mut HeldOut,
) -> Result<()> {
    let paths: Vec<Option<ClusterPath>> =
        batch.paths.iter().map(|path| (mode != MemoryMode::None).then(|| path.clone())).collect();
    let targets = Targets { targets: &batch.targets, scale: 1.0, z_loss: 0.0 };
    let (_, losses) = model.anchor.loss(input(batch), targets, &model.memory(&paths)?)?;
    let tokens: Vec<(u32, u32, f32)> = (batch.targets.iter().zip(&batch.documents).zip(losses))
        .map(|((&target, &document), nats)| (target, document, nats))
        .collect();
    for sequence in tokens.chunks_exact(batch.len) {
        let mut sum = TokenSum::default();
        for &(_, document, nats) in sequence.iter().filter(|(target, ..)| *target != IGNORE) {
            sum.add(nats);
            if let Some(label) = corpus.label(document)? {
                result.by_label.entry(label.to_string()).or_default().add(nats);
            }
        }
        result.sequences.push(sum);
    }
    Ok(())
}

/// A batch as the anchor's input.
pub fn input(batch: &Batch) -> Input<'_> {
    let (tokens, starts) = (&batch.tokens[..], &batch.starts[..]);
    Input { tokens, starts, batch: batch.n_sequences(), len: batch.len }
}
