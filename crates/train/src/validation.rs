//! The loss on held-out sequences, which the workers of a run share.

use collective::{Call, Mesh};
use corpus::Corpus;
use eval::{MemoryMode, Sample, TokenSum};
use generate::Model;
use memory_bank::BlockStore;

use crate::{Assign, Result, Subtree, TrainConfig};

/// The losses of one worker's part of the held-out sequences, with the memory that they were trained to fetch.
pub(crate) fn losses<S: BlockStore>(
    model: &Model<S>,
    corpus: &Corpus,
    config: &TrainConfig,
    part: (usize, usize),
) -> Result<Vec<TokenSum>> {
    let n = match config.validate_sequences {
        0 => corpus.n_validation(),
        n => n.min(corpus.n_validation()),
    };
    let memory = match (model.bank, config.assign) {
        (None, _) => MemoryMode::None,
        (Some(_), Assign::AlwaysOn) => MemoryMode::Generic,
        (Some(_), Assign::Fetched) => MemoryMode::Fetched,
    };
    let under = config.subtree.map(Subtree::cluster);
    let sample = Sample { n, batch: config.micro_batch, part, under };
    Ok(eval::held_out(model, corpus, memory, &sample, &[])?.sequences)
}

/// The sum over all workers' sequences, in the order of the ranks.
pub(crate) fn total(mesh: &mut Mesh, step: u64, mine: &[TokenSum]) -> Result<TokenSum> {
    let bytes = |sum: &TokenSum| [sum.nats.to_le_bytes(), sum.tokens.to_le_bytes()].concat();
    let sum = |bytes: &[u8]| TokenSum {
        nats: f64::from_le_bytes(std::array::from_fn(|i| bytes[i])),
        tokens: u64::from_le_bytes(std::array::from_fn(|i| bytes[8 + i])),
    };
    let all = mesh.all_gather(&Call::new("validation", step), mine.iter().flat_map(bytes).collect())?;
    let all: Vec<TokenSum> = all.iter().flat_map(|bytes| bytes.chunks_exact(16)).map(sum).collect();
    Ok(TokenSum::total(&all))
}
