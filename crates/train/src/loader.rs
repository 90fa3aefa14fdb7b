use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use cluster_tree::ClusterPath;
use corpus::{Batch, Corpus};

use crate::{Assign, Error, Result, TrainConfig};

/// Batches made ahead of the step that trains on them.
const AHEAD: usize = 4;

/// Reads the batches of consecutive steps on a thread of its own, so that no step waits for data.
pub(crate) struct Loader {
    batches: Receiver<corpus::Result<Batch>>,
}

impl Loader {
    /// Batches from step `first_step` on, without end.
    pub(crate) fn start(corpus: Arc<Corpus>, config: &TrainConfig, first_step: u64) -> Self {
        let (sender, batches) = sync_channel(AHEAD);
        let config = config.clone();
        std::thread::spawn(move || {
            for step in first_step.. {
                // The receiver is gone when training ends: so does this thread.
                if sender.send(batch(&corpus, &config, step)).is_err() {
                    break;
                }
            }
        });
        Self { batches }
    }

    pub(crate) fn next(&self, step: u64) -> Result<Batch> {
        Ok(self.batches.recv().map_err(|_| Error::Loader { step })??)
    }
}

/// The batch of `step` (from 1): a pure function of the corpus and the configuration.
pub(crate) fn batch(corpus: &Corpus, config: &TrainConfig, step: u64) -> corpus::Result<Batch> {
    let n = config.batch_size as u64;
    let sequence = |index: u64| {
        let mut sequence = corpus.sequence(config.seed, index)?;
        if takes_generic(config, index) {
            sequence.path = ClusterPath::generic(sequence.path.n_levels())?;
        }
        Ok(sequence)
    };
    let sequences = ((step - 1) * n..step * n).map(sequence).collect::<corpus::Result<Vec<_>>>()?;
    Ok(Batch::new(sequences, corpus.eot()))
}

fn takes_generic(config: &TrainConfig, index: u64) -> bool {
    match config.assign {
        Assign::AlwaysOn => true,
        Assign::Fetched => {
            let uniform = mix(config.seed ^ mix(index)) >> 11;
            (uniform as f64) / ((1u64 << 53) as f64) < config.generic_share
        }
    }
}

/// The finaliser of SplitMix64 (Steele et al. 2014): a fixed hash of a number.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seventeenth_of_the_sequences_takes_the_generic_path() {
        let config = TrainConfig::default();
        let n = (0..170_000).filter(|&i| takes_generic(&config, i)).count();
        assert!((9_700..10_300).contains(&n), "{n} of 170,000");
        let always_on = TrainConfig { assign: Assign::AlwaysOn, ..config };
        assert!((0..1000).all(|i| takes_generic(&always_on, i)));
    }
}
