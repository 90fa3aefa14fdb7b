use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anchor::Anchor;
use collective::{Engine, Mesh};
use corpus::Corpus;
use memory_bank::Blocking;

use crate::{Attempt, Error, Result, TrainConfig};

/// What a trainer is made of.
pub struct Parts<S> {
    /// Where metrics and checkpoints go, as long as nobody else has begun to train the run.
    pub attempt: Attempt,
    /// How to train.
    pub config: TrainConfig,
    /// Packed sequences.
    pub corpus: Arc<Corpus>,
    /// The model at the beginning; frozen when the phase says so.
    pub anchor: Anchor,
    /// The bank, in phases with memory.
    pub memory: Option<Blocking<S>>,
    /// The workers that share every step, this one among them.
    pub workers: Workers,
}

/// A worker's place among those that train together.
pub struct Workers {
    /// Its connections to the others.
    pub mesh: Mesh,
    /// What sums the anchor's gradients.
    pub engine: Engine,
    /// Levels of the bank of which every worker has a copy of its own: all gradients reach it. Gradients of
    /// other levels are handed to the bank by one worker each.
    pub replicated: Vec<bool>,
    /// As which rank this worker pushes: 0 to a bank of its own.
    pub rank_at_bank: usize,
    /// Set by whoever wants the run to save and stop: one worker is enough.
    pub stop: Arc<AtomicBool>,
}

/// How a run ended.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Ended {
    /// With its last step.
    Done,
    /// Saved after an earlier one, as it was told to.
    Stopped,
}

impl Workers {
    /// One worker, who does all.
    pub fn alone() -> Self {
        Self {
            mesh: Mesh::alone(),
            engine: Engine::Tcp,
            replicated: vec![],
            rank_at_bank: 0,
            stop: Arc::default(),
        }
    }
}

impl<S> Parts<S> {
    /// Fails on a configuration that cannot be trained with, and on a bank too many or too few.
    pub(crate) fn check(&self) -> Result<()> {
        self.config.check()?;
        let (n, world_size) =
            (self.config.batch_size.div_ceil(self.config.micro_batch), self.workers.mesh.world_size());
        if n < world_size {
            let most = self.config.batch_size / world_size;
            let expected = match most {
                0 => {
                    return Err(Error::Config {
                        key: "batch_size",
                        expected: format!("at least the number of workers ({world_size})"),
                        found: self.config.batch_size.to_string(),
                    });
                }
                most => format!("at most {most}, so that each of {world_size} workers has one"),
            };
            return Err(Error::Config {
                key: "micro_batch",
                expected,
                found: self.config.micro_batch.to_string(),
            });
        }
        let (phase, has_bank) = (self.config.phase, self.memory.is_some());
        if phase.has_memory() == has_bank {
            return Ok(());
        }
        let found = format!("{phase:?} {} a bank", if has_bank { "with" } else { "without" });
        Err(Error::Config {
            key: "phase",
            expected: "a phase with memory and a bank, or neither".into(),
            found,
        })
    }
}
