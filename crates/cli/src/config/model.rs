//! The section about the anchor: its sizes, or what it is read from.

use std::path::PathBuf;

use anchor::{AnchorConfig, Form, QkNorm};
use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::checkpoint;

/// Sizes of the anchor; the vocabulary is the tokenizer's. Or a checkpoint, which has its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct AnchorSection {
    /// A run whose last checkpoint this one begins with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) init: Option<PathBuf>,
    /// What this run begins with, sizes and tokenizer too: a model folder of the Hugging Face hub, a run, or a
    /// llama2.c file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) checkpoint: Option<PathBuf>,
    pub(crate) d_model: usize,
    pub(crate) n_layers: usize,
    pub(crate) n_heads: usize,
    pub(crate) head_width: usize,
    pub(crate) ffn_width: usize,
    pub(crate) tied_embeddings: bool,
    pub(crate) max_seq_len: usize,
    pub(crate) rope_base: f64,
    pub(crate) norm_eps: f64,
    /// What of queries and keys is normed: `full` rows, each `head`, or `none`. Families of transformers hold `head`.
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) qk_norm: QkNorm,
    /// What the checkpoint is; written, never asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sizes: Option<AnchorConfig>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Default for AnchorSection {
    /// The 160M anchor of arXiv 2510.02375.
    fn default() -> Self {
        Self {
            init: None,
            checkpoint: None,
            d_model: 512,
            n_layers: 35,
            n_heads: 12,
            head_width: 32,
            ffn_width: 2048,
            tied_embeddings: true,
            max_seq_len: 8192,
            rope_base: 100_000.0,
            norm_eps: 1e-5,
            qk_norm: QkNorm::Full,
            sizes: None,
        }
    }
}

impl AnchorSection {
    /// Reads what the checkpoint is, unless that is known.
    pub(super) fn resolve(&mut self) -> Result<()> {
        let (Some(path), None) = (&self.checkpoint, &self.sizes) else { return Ok(()) };
        if let Some(init) = &self.init {
            bail!("anchor.init: expected nothing beside anchor.checkpoint, found {}", init.display());
        }
        let own = Self { checkpoint: None, ..self.clone() };
        if own != Self::default() {
            bail!(
                "anchor.checkpoint: expected no sizes beside it in [anchor]: they are those of {}",
                path.display()
            );
        }
        self.sizes = Some(checkpoint::describe(path)?.config);
        Ok(())
    }

    /// What an error calls the key that decides the anchor's positions.
    pub(super) fn key_of_positions(&self) -> &'static str {
        if self.checkpoint.is_some() { "positions of anchor.checkpoint" } else { "anchor.max_seq_len" }
    }

    /// The anchor of a vocabulary, which a checkpoint may have rows to spare for.
    pub(crate) fn config(&self, vocab_size: usize) -> AnchorConfig {
        if let Some(sizes) = &self.sizes {
            return sizes.clone();
        }
        let mut form = Form::default();
        form.attention.qk_norm = self.qk_norm;
        AnchorConfig {
            vocab_size,
            d_model: self.d_model,
            n_layers: self.n_layers,
            n_heads: self.n_heads,
            head_width: self.head_width,
            ffn_width: self.ffn_width,
            tied_embeddings: self.tied_embeddings,
            max_seq_len: self.max_seq_len,
            rope_base: self.rope_base,
            norm_eps: self.norm_eps,
            form,
        }
    }
}
