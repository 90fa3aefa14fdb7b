//! The section about memory that is added to a checkpoint, and what it is compared with.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Result, bail};
use memory_bank::MemoryKind;
use serde::{Deserialize, Serialize};

/// A way to learn a corpus. All begin with the same checkpoint and take the same number of steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Method {
    /// Memory that a text fetches; the checkpoint's weights stay.
    Memory,
    /// As many parameters as one fetch, the same for every text: the control.
    Generic,
    /// LoRA: small matrices beside the checkpoint's, the same for every text.
    Lora,
    /// All weights.
    Full,
    /// All weights, with texts of before mixed in.
    Replay,
}

impl Method {
    /// In the order in which they are trained and shown.
    pub(crate) const ALL: [Self; 5] = [Self::Memory, Self::Generic, Self::Lora, Self::Full, Self::Replay];

    /// As in the configuration, and the name of its runs.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Generic => "generic",
            Self::Lora => "lora",
            Self::Full => "full",
            Self::Replay => "replay",
        }
    }
}

/// What `posthoc` compares, and what it asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct PosthocSection {
    /// Seeds, from train.seed on.
    pub(crate) seeds: u64,
    /// What is trained; `memory` is always among them.
    pub(crate) methods: Vec<Method>,
    /// Files of texts that the checkpoint knows; `replay` mixes them in. Documents that corpus.validation_permille
    /// holds out are not mixed in, and the damage to them is measured.
    pub(crate) replay: Vec<String>,
    /// Share of those texts in what `replay` reads.
    pub(crate) replay_share: f64,
    /// Files of texts that are never trained on: the damage to all of them is measured.
    pub(crate) kept: Vec<String>,
    /// A questions.jsonl about what is learned; without it sentences are asked about that are trained on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) questions: Option<PathBuf>,
    /// The same about what is kept; without it of held-out sentences.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kept_questions: Option<PathBuf>,
    /// Sentences of each that are asked about at most.
    pub(crate) n_questions: usize,
    /// Where LoRA is added.
    pub(crate) lora_kind: MemoryKind,
    /// Its rank.
    pub(crate) lora_rank: usize,
    /// Its learning rate; train.memory_learning_rate without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lora_learning_rate: Option<f64>,
    /// What the model card says, by the names of its places: `name`, `learned`, `license`, …
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) card: BTreeMap<String, String>,
}

impl Default for PosthocSection {
    fn default() -> Self {
        Self {
            seeds: 1,
            methods: Method::ALL.to_vec(),
            replay: vec![],
            replay_share: 0.5,
            kept: vec![],
            questions: None,
            kept_questions: None,
            n_questions: 400,
            lora_kind: MemoryKind::ALL[3],
            lora_rank: 16,
            lora_learning_rate: None,
            card: BTreeMap::new(),
        }
    }
}

impl PosthocSection {
    pub(super) fn check(&self) -> Result<()> {
        if self.seeds == 0 {
            bail!("posthoc.seeds: expected at least 1, found 0");
        }
        if !self.methods.contains(&Method::Memory) {
            let found: Vec<&str> = self.methods.iter().map(|method| method.name()).collect();
            bail!("posthoc.methods: expected memory among them, found {found:?}");
        }
        if self.methods.contains(&Method::Replay) && self.replay.is_empty() {
            bail!(
                "posthoc.replay: expected files of what the checkpoint knows (posthoc.methods has replay), found none"
            );
        }
        if !(self.replay_share > 0.0 && self.replay_share < 1.0) {
            bail!("posthoc.replay_share: expected a number between 0 and 1, found {}", self.replay_share);
        }
        if self.replay.is_empty() && self.kept.is_empty() {
            bail!("posthoc.kept: expected files of what is not learned, or posthoc.replay, found none");
        }
        if !matches!(self.lora_kind, MemoryKind::Lora { .. }) {
            let found = self.lora_kind.name();
            bail!("posthoc.lora_kind: expected lora_qk, lora_vo or lora_ffn, found {found}");
        }
        if self.lora_rank == 0 {
            bail!("posthoc.lora_rank: expected at least 1, found 0");
        }
        if self.lora_learning_rate.is_some_and(|rate| !(rate.is_finite() && rate > 0.0)) {
            bail!(
                "posthoc.lora_learning_rate: expected a number above 0, found {:?}",
                self.lora_learning_rate
            );
        }
        Ok(())
    }
}
