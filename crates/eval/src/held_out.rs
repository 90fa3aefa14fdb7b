use std::collections::BTreeMap;

use anchor::{Input, Targets};
use cluster_tree::ClusterPath;
use corpus::{Batch, Corpus, IGNORE, Sequence};
use generate::Model;
use memory_bank::BlockStore;

use crate::{MemoryMode, Result};

/// Negative log-likelihood over some tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
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
#[derive(Clone, Debug, Default)]
pub struct HeldOut {
    /// Over all tokens.
    pub total: TokenSum,
    /// By the label of the token's document.
    pub by_label: BTreeMap<String, TokenSum>,
    /// By sequence: the units of a bootstrap.
    pub sequences: Vec<TokenSum>,
}

/// The loss of `model` on `n` held-out sequences, `batch` at a time; fewer than all are spread evenly, as
/// they are stored leaf by leaf. A random path is one of `leaves`.
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
    (n, batch): (u64, usize),
    leaves: &[ClusterPath],
) -> Result<HeldOut> {
    let all = corpus.n_validation();
    let n = n.min(all);
    let sequences = (0..n).map(|i| corpus.validation(i * all / n)).collect::<corpus::Result<Vec<_>>>()?;
    let mut result = HeldOut::default();
    for (chunk, sequences) in sequences.chunks(batch).enumerate() {
        let rerouted = |(i, sequence): (usize, &Sequence)| -> Result<Sequence> {
            let index = (chunk * batch + i) as u64;
            let path = mode.path(&sequence.path, (index, leaves))?;
            Ok(Sequence { path: path.unwrap_or_else(|| sequence.path.clone()), ..sequence.clone() })
        };
        let sequences = sequences.iter().enumerate().map(rerouted).collect::<Result<Vec<_>>>()?;
        add_batch(model, corpus, (mode, &Batch::new(sequences, corpus.eot())), &mut result)?;
    }
    Ok(result)
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
            result.total.add(nats);
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
