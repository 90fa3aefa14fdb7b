//! Whole runs on a tiny corpus: resuming to the byte, phases, divergence, checkpoints and metrics.

mod checkpoints;
mod fixtures;
mod phases;
mod resuming;
