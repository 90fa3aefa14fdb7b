//! The loss on held-out sequences, which the workers of a run share.

use cluster_tree::ClusterPath;
use collective::{Call, Mesh};
use corpus::{Corpus, Sequence};
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
    let memory = match model.bank {
        None => MemoryMode::None,
        Some(_) => mode(config),
    };
    Ok(eval::held_out(model, corpus, memory, &sample(corpus, config, part), &[])?.sequences)
}

fn mode(config: &TrainConfig) -> MemoryMode {
    match config.assign {
        Assign::AlwaysOn => MemoryMode::Generic,
        Assign::Fetched => MemoryMode::Fetched,
    }
}

fn sample(corpus: &Corpus, config: &TrainConfig, part: (usize, usize)) -> Sample {
    let n = match config.validate_sequences {
        0 => corpus.n_validation(),
        n => n.min(corpus.n_validation()),
    };
    Sample { n, batch: config.micro_batch, part, under: config.subtree.map(Subtree::cluster) }
}

/// The paths of one worker's part of the held-out sequences, in the batches in which they are read.
pub(crate) fn paths(
    corpus: &Corpus,
    config: &TrainConfig,
    part: (usize, usize),
) -> Result<Vec<Vec<ClusterPath>>> {
    let sample = sample(corpus, config, part);
    let of_batch = |batch: eval::Result<Vec<Sequence>>| -> Result<Vec<ClusterPath>> {
        Ok(batch?.into_iter().map(|sequence| sequence.path).collect())
    };
    eval::held_out_batches(corpus, mode(config), &sample, &[]).map(of_batch).collect()
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
