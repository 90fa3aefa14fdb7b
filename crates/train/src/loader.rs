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
            let mut batches = Batches::new(&corpus, &config);
            for step in first_step.. {
                // The receiver is gone when training ends: so does this thread.
                if sender.send(batches.of(step)).is_err() {
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

/// Makes batches: that of a step is a pure function of the corpus and the configuration.
pub(crate) struct Batches<'a> {
    corpus: &'a Corpus,
    config: &'a TrainConfig,
    /// The window of the last batch, and its sequences in the order of their paths.
    window: Option<(u64, Vec<u64>)>,
}

impl<'a> Batches<'a> {
    pub(crate) fn new(corpus: &'a Corpus, config: &'a TrainConfig) -> Self {
        Self { corpus, config, window: None }
    }

    /// The batch of `step` (from 1).
    pub(crate) fn of(&mut self, step: u64) -> corpus::Result<Batch> {
        let (corpus, config) = (self.corpus, self.config);
        let sequence = |index: u64| {
            let mut sequence = corpus.sequence(config.seed, index)?;
            if takes_generic(config, index) {
                sequence.path = ClusterPath::generic(sequence.path.n_levels())?;
            }
            Ok(sequence)
        };
        let n = config.batch_size as u64;
        let indices = match config.locality_window {
            1 => ((step - 1) * n..step * n).collect(),
            _ => self.of_window(step)?,
        };
        let sequences = indices.into_iter().map(sequence).collect::<corpus::Result<Vec<_>>>()?;
        Ok(Batch::new(sequences, corpus.eot()))
    }

    /// The sequences of a step that its window deals to it: of the window's in the order of their paths, each
    /// micro-batch of a step gets a run, and the same micro-batch of the next step the run after it. A worker, who
    /// has the same micro-batches of every step, meets few clusters in a window, and a step meets all.
    fn of_window(&mut self, step: u64) -> corpus::Result<Vec<u64>> {
        let steps = self.config.locality_window;
        let (window, step) = ((step - 1) / steps, (step - 1) % steps);
        if self.window.as_ref().is_none_or(|(found, _)| *found != window) {
            self.window = Some((window, self.order(window)?));
        }
        let ordered = self.window.as_ref().map_or(&[][..], |(_, ordered)| ordered);
        Ok(dealt(self.config, step).map(|place| ordered[place]).collect())
    }

    /// The sequences of a window in the order of their paths.
    fn order(&self, window: u64) -> corpus::Result<Vec<u64>> {
        let n = self.config.batch_size as u64 * self.config.locality_window;
        let path = |index: u64| match takes_generic(self.config, index) {
            true => Ok((None, index)),
            false => Ok((Some(self.corpus.sequence_path(self.config.seed, index)?), index)),
        };
        let mut paths = (window * n..(window + 1) * n).map(path).collect::<corpus::Result<Vec<_>>>()?;
        // The generic path is the last one.
        paths.sort_by(|(a, _), (b, _)| a.is_none().cmp(&b.is_none()).then_with(|| a.cmp(b)));
        Ok(paths.into_iter().map(|(_, index)| index).collect())
    }
}

/// Places, in the order of its window, of the sequences of the `step`-th step there.
fn dealt(config: &TrainConfig, step: u64) -> impl Iterator<Item = usize> {
    let TrainConfig { batch_size, micro_batch, locality_window: steps, .. } = *config;
    (0..batch_size).step_by(micro_batch).flat_map(move |begin| {
        let n = micro_batch.min(batch_size - begin);
        let first = begin * steps as usize + step as usize * n;
        first..first + n
    })
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
    fn a_window_is_dealt_out_whole_in_runs_of_a_micro_batch() {
        for (batch_size, micro_batch, locality_window) in [(8, 4, 3), (10, 4, 2), (5, 5, 4), (6, 1, 2)] {
            let config = TrainConfig { batch_size, micro_batch, locality_window, ..TrainConfig::default() };
            let steps: Vec<Vec<usize>> =
                (0..locality_window).map(|step| dealt(&config, step).collect()).collect();
            let mut all = steps.concat();
            all.sort_unstable();
            assert_eq!(all, (0..batch_size * locality_window as usize).collect::<Vec<_>>());
            for step in &steps {
                assert_eq!(step.len(), batch_size);
                let is_run = |places: &[usize]| places.windows(2).all(|pair| pair[1] == pair[0] + 1);
                assert!(step.chunks(micro_batch).all(is_run));
            }
            // A micro-batch's sequences of all steps stand together.
            let first: Vec<usize> = steps.iter().flat_map(|step| &step[..micro_batch]).copied().collect();
            assert_eq!(first, (0..first.len()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_seventeenth_of_the_sequences_takes_the_generic_path() {
        let config = TrainConfig::default();
        let n = (0..170_000).filter(|&i| takes_generic(&config, i)).count();
        assert!((9_700..10_300).contains(&n), "{n} of 170,000");
        let always_on = TrainConfig { assign: Assign::AlwaysOn, ..config };
        assert!((0..1000).all(|i| takes_generic(&always_on, i)));
    }
}
