use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The bounds of an engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineOptions {
    /// Sequences that run at once.
    pub max_sequences: usize,
    /// Tokens of a step: one of each sequence that generates, and of prompts what is left, at least a quarter.
    pub step_tokens: usize,
    /// Room for keys and values, in MiB.
    pub kv_mib: u64,
    /// Requests that wait to run; more are refused.
    pub max_waiting: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { max_sequences: 64, step_tokens: 512, kv_mib: 1024, max_waiting: 256 }
    }
}

impl EngineOptions {
    /// Fails on a bound of 0.
    pub fn check(&self) -> Result<()> {
        let Self { max_sequences, step_tokens, kv_mib, max_waiting } = self;
        let bounds = [
            ("max_sequences", *max_sequences as u64),
            ("step_tokens", *step_tokens as u64),
            ("kv_mib", *kv_mib),
            ("max_waiting", *max_waiting as u64),
        ];
        match bounds.into_iter().find(|(_, found)| *found == 0) {
            Some((key, _)) => Err(Error::Engine { key, expected: "at least 1".into(), found: 0 }),
            None => Ok(()),
        }
    }
}

/// What an engine has done and holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct EngineStats {
    /// Sequences admitted and not finished, those that rest for a reroute included.
    pub running: usize,
    /// Of those, the ones that rest.
    pub resting: usize,
    /// Requests that wait for pages or for a place.
    pub waiting: usize,
    /// Pages of keys and values that no sequence has.
    pub free_pages: usize,
    /// All of them.
    pub total_pages: usize,
    /// Requests that ended by a stop text, the end-of-text token or their length.
    pub completed: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests whose caller went away.
    pub cancelled: u64,
    /// Requests refused for a full queue.
    pub refused: u64,
    /// Prompt tokens that went through the decoder.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Steps of the decoder.
    pub steps: u64,
    /// Seconds spent in steps and in choosing tokens.
    pub busy_s: f64,
}
