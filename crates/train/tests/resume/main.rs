//! Whole runs on a tiny corpus: resuming to the byte, phases, divergence, checkpoints and metrics.

mod attempts;
mod checkpoints;
#[path = "../../../../tests/fixtures/files.rs"]
mod files;
mod fixtures;
mod phases;
mod resuming;
mod workers;
