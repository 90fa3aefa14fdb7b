use std::fmt;

use anchor::{AnchorConfig, Precision};
use cluster_tree::{ClusterId, ClusterPath};
use memory_bank::Schedule;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What is trained (method.md §5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// The anchor alone, without memory.
    Anchor,
    /// Memory on a frozen anchor.
    Frozen,
    /// Memory and a pretrained anchor together.
    Cotrain,
    /// Memory and anchor together from scratch.
    Joint,
}

impl Phase {
    /// Whether blocks are fetched and pushed.
    pub fn has_memory(self) -> bool {
        self != Self::Anchor
    }

    /// Whether the anchor's weights change.
    pub fn trains_anchor(self) -> bool {
        self != Self::Frozen
    }

    /// FLOPs of the products of forward and backward for one token ([`AnchorConfig::training_flops`]); a frozen
    /// anchor has no gradients of its weights: two of three products remain.
    pub fn flops_per_token(self, anchor: &AnchorConfig, len: usize, fetch_len: u64) -> f64 {
        let of_anchor = anchor.training_flops(len, 0) as f64;
        let of_memory = anchor.training_flops(len, fetch_len) as f64 - of_anchor;
        of_memory + if self.trains_anchor() { of_anchor } else { of_anchor * 2.0 / 3.0 }
    }
}

/// Which path a training sequence fetches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Assign {
    /// The path of its leaf, or with probability `generic_share` the generic path.
    Fetched,
    /// The generic path for every sequence: the control with as many extra parameters as one fetch, all
    /// of them trained on every token.
    AlwaysOn,
}

/// A part of the corpus and of the bank that is trained by itself: the sequences and blocks under one cluster of
/// the coarsest level, or those of the generic path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Subtree {
    /// A cluster.
    Cluster(u32),
    /// The generic path, written "generic".
    Named(Generic),
}

/// The name of the path that no document has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Generic {
    /// "generic"
    Generic,
}

impl Subtree {
    /// Its cluster of the coarsest level.
    pub fn cluster(self) -> ClusterId {
        let index = match self {
            Self::Cluster(index) => index,
            Self::Named(Generic::Generic) => ClusterId::GENERIC,
        };
        ClusterId { level: 0, index }
    }

    /// Whether a path is in it.
    pub fn has(self, path: &ClusterPath) -> bool {
        path.index(0) == self.cluster().index
    }
}

impl fmt::Display for Subtree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cluster(index) => index.fmt(f),
            Self::Named(Generic::Generic) => f.write_str("generic"),
        }
    }
}

/// The section `[train]` of a run's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// What is trained.
    pub phase: Phase,
    /// Which path a sequence fetches.
    pub assign: Assign,
    /// Of each step only the sequences of this subtree, with the blocks under it: the job of one of several
    /// machines that need not know each other, on a frozen anchor. Together they are the whole run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subtree: Option<Subtree>,
    /// Share of sequences that fetch the generic path (arXiv 2510.02375: 1/17).
    pub generic_share: f64,
    /// Optimizer steps.
    pub steps: u64,
    /// Sequences a step.
    pub batch_size: usize,
    /// Sequences a forward pass; gradients of a step's passes are summed.
    pub micro_batch: usize,
    /// Steps whose sequences are dealt out so that each micro-batch is of few clusters, from a window of the
    /// shuffled order: fewer blocks are moved, and steps are less alike. 1 orders each step by itself.
    pub locality_window: u64,
    /// Seeds the order of sequences and the initial weights.
    pub seed: u64,
    /// Peak learning rate of the anchor.
    pub learning_rate: f64,
    /// The anchor's learning rate falls to this part of its peak.
    pub final_share: f64,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Decoupled weight decay of the anchor.
    pub weight_decay: f64,
    /// Peak learning rate of memory blocks.
    pub memory_learning_rate: f64,
    /// Decoupled weight decay of memory blocks, applied when a block is touched.
    pub memory_weight_decay: f64,
    /// Steps by which the blocks that are fetched may be behind. 0 is exactly synchronous; with 1 a fetch
    /// takes place while the step before computes, and two runs are no longer the same to the bit.
    pub staleness: u64,
    /// AdamW's decay of the first moment.
    pub beta1: f64,
    /// AdamW's decay of the second moment.
    pub beta2: f64,
    /// AdamW's addend to the root of the second moment.
    pub eps: f64,
    /// Largest global L2 norm of the anchor's gradient, and of a block's; 0 is off.
    pub clip: f64,
    /// Weight of the z-loss; 0 is off.
    pub z_loss: f64,
    /// Operands of the matrix products: f32, or bf16 (weights, sums and all else stay f32).
    pub precision: Precision,
    /// Whether the backward pass computes the activations of each decoder block again instead of keeping
    /// them: less memory, about a third more work.
    pub checkpoint_activations: bool,
    /// Steps between lines of metrics.jsonl.
    pub log_every: u64,
    /// Steps between losses on held-out documents; 0 is only at the end.
    pub validate_every: u64,
    /// Held-out sequences of one such loss; 0 is all.
    pub validate_sequences: u64,
    /// Steps between checkpoints; 0 is only at the end.
    pub save_every: u64,
    /// Checkpoints kept.
    pub keep: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            phase: Phase::Anchor,
            assign: Assign::Fetched,
            subtree: None,
            generic_share: 1.0 / 17.0,
            steps: 1000,
            batch_size: 32,
            micro_batch: 32,
            locality_window: 1,
            seed: 1,
            learning_rate: 2e-3,
            final_share: 0.1,
            warmup_steps: 100,
            weight_decay: 0.05,
            memory_learning_rate: 1e-3,
            memory_weight_decay: 1e-3,
            staleness: 0,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            clip: 1.0,
            z_loss: 0.0,
            precision: Precision::F32,
            checkpoint_activations: false,
            log_every: 10,
            validate_every: 0,
            validate_sequences: 64,
            save_every: 250,
            keep: 2,
        }
    }
}

impl TrainConfig {
    /// Checks every value.
    ///
    /// # Errors
    /// Names the key, what it may be and what it is.
    pub fn check(&self) -> Result<()> {
        let fail = |key, expected: &str, found: String| {
            Err(Error::Config { key, expected: expected.to_string(), found })
        };
        let positive = [
            ("steps", self.steps),
            ("batch_size", self.batch_size as u64),
            ("micro_batch", self.micro_batch as u64),
            ("locality_window", self.locality_window),
            ("log_every", self.log_every),
            ("keep", self.keep as u64),
        ];
        if let Some((key, found)) = positive.into_iter().find(|&(_, value)| value == 0) {
            return fail(key, "at least 1", found.to_string());
        }
        if let Some(subtree) = self.subtree {
            if self.phase != Phase::Frozen {
                return fail("subtree", "none, unless train.phase is \"frozen\"", subtree.to_string());
            }
            if self.assign != Assign::Fetched {
                return fail("subtree", "none, unless train.assign is \"fetched\"", subtree.to_string());
            }
        }
        let rates = [
            ("learning_rate", self.learning_rate),
            ("memory_learning_rate", self.memory_learning_rate),
            ("eps", self.eps),
        ];
        if let Some((key, found)) = rates.into_iter().find(|&(_, x)| !(x.is_finite() && x > 0.0)) {
            return fail(key, "a number above 0", found.to_string());
        }
        let shares = [("generic_share", self.generic_share), ("final_share", self.final_share)];
        if let Some((key, found)) = shares.into_iter().find(|(_, x)| !(0.0..=1.0).contains(x)) {
            return fail(key, "a number in 0..=1", found.to_string());
        }
        let betas = [("beta1", self.beta1), ("beta2", self.beta2)];
        if let Some((key, found)) = betas.into_iter().find(|(_, x)| !(0.0..1.0).contains(x)) {
            return fail(key, "a number from 0 to below 1", found.to_string());
        }
        if self.warmup_steps > self.steps {
            let expected = format!("at most train.steps ({})", self.steps);
            return fail("warmup_steps", &expected, self.warmup_steps.to_string());
        }
        let not_negative = [
            ("weight_decay", self.weight_decay),
            ("memory_weight_decay", self.memory_weight_decay),
            ("clip", self.clip),
            ("z_loss", self.z_loss),
        ];
        if let Some((key, found)) = not_negative.into_iter().find(|&(_, x)| !(x.is_finite() && x >= 0.0)) {
            return fail(key, "0 or more", found.to_string());
        }
        Ok(())
    }

    /// The anchor's learning rate over the run.
    pub fn schedule(&self) -> Schedule {
        self.schedule_to(self.learning_rate)
    }

    /// The optimizer of memory blocks.
    pub fn memory_adamw(&self) -> memory_bank::AdamW {
        memory_bank::AdamW {
            schedule: self.schedule_to(self.memory_learning_rate),
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            weight_decay: self.memory_weight_decay,
            clip: (self.clip > 0.0).then_some(self.clip),
        }
    }

    fn schedule_to(&self, peak: f64) -> Schedule {
        Schedule {
            peak,
            floor: peak * self.final_share,
            warmup_steps: self.warmup_steps,
            total_steps: self.steps,
        }
    }
}
