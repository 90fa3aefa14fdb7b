use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Sizes of an anchor (arXiv 2510.02375 App. A; method.md §4).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnchorConfig {
    /// Tokens of the vocabulary, V.
    pub vocab_size: usize,
    /// Width of the residual stream, D.
    pub d_model: usize,
    /// Decoder blocks.
    pub n_layers: usize,
    /// Attention heads.
    pub n_heads: usize,
    /// Width of a head; n_heads · head_width may differ from d_model.
    pub head_width: usize,
    /// Width of the gated FFN, F.
    pub ffn_width: usize,
    /// Whether the output projection is the token embedding.
    pub tied_embeddings: bool,
    /// Longest sequence the rotary table covers.
    pub max_seq_len: usize,
    /// Base of the rotary position embedding.
    pub rope_base: f64,
    /// Added to the mean square in every norm.
    pub norm_eps: f64,
}

impl AnchorConfig {
    /// Width of queries, keys and values: n_heads · head_width.
    pub fn attention_width(&self) -> usize {
        self.n_heads * self.head_width
    }

    /// V·D·(1|2) + L·(4·D·H·K + 3·D·F + 2·D + 2·H·K) + D: embeddings, per block the four attention
    /// matrices, the FFN, two norms and the two QK-norms, and the final norm.
    pub fn n_parameters(&self) -> u64 {
        let [v, d, l, a, f] =
            [self.vocab_size, self.d_model, self.n_layers, self.attention_width(), self.ffn_width]
                .map(|x| x as u64);
        let embeddings = if self.tied_embeddings { 1 } else { 2 };
        v * d * embeddings + l * (4 * d * a + 3 * d * f + 2 * d + 2 * a) + d
    }

    /// FLOPs of the matrix products of forward and backward for one token, in sequences of `len` tokens of one
    /// document each: 6 per weight, and of attention 6·L·(len + 1)·H·K, the causal half of its scores
    /// (Kaplan et al., arXiv 2001.08361 §2.1; PaLM, arXiv 2204.02311 App. B). `memory_width` is the sum of the
    /// widths of the blocks that a token fetches.
    pub fn training_flops(&self, len: usize, memory_width: usize) -> u64 {
        let [v, d, l, a, f, len, r] = [
            self.vocab_size,
            self.d_model,
            self.n_layers,
            self.attention_width(),
            self.ffn_width,
            len,
            memory_width,
        ]
        .map(|x| x as u64);
        6 * (v * d + l * (4 * d * a + 3 * d * (f + r))) + 6 * l * (len + 1) * a
    }

    /// Checks that a model can be built.
    ///
    /// # Errors
    /// Names the key that is zero, or the odd head width.
    pub fn check(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("d_model", self.d_model),
            ("n_layers", self.n_layers),
            ("n_heads", self.n_heads),
            ("head_width", self.head_width),
            ("ffn_width", self.ffn_width),
            ("max_seq_len", self.max_seq_len),
        ];
        if let Some((key, found)) = sizes.into_iter().find(|&(_, size)| size == 0) {
            let found = found.to_string();
            return Err(Error::Config { key, found, problem: "must be at least 1".into() });
        }
        if self.head_width % 2 == 1 {
            let problem = "must be even: rotary embedding turns pairs".into();
            return Err(Error::Config { key: "head_width", found: self.head_width.to_string(), problem });
        }
        for (key, found) in [("rope_base", self.rope_base), ("norm_eps", self.norm_eps)] {
            if !(found.is_finite() && found > 0.0) {
                let problem = "must be a number above 0".into();
                return Err(Error::Config { key, found: found.to_string(), problem });
            }
        }
        Ok(())
    }

    /// Name and shape of every parameter, in a fixed order.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let (d, a, f) = (self.d_model, self.attention_width(), self.ffn_width);
        let mut all = vec![("token_embedding".to_string(), vec![self.vocab_size, d])];
        for layer in 0..self.n_layers {
            let mut add = |name: &str, shape: Vec<usize>| all.push((format!("layers.{layer}.{name}"), shape));
            add("attention_norm", vec![d]);
            add("query", vec![a, d]);
            add("key", vec![a, d]);
            add("value", vec![a, d]);
            add("query_norm", vec![a]);
            add("key_norm", vec![a]);
            add("attention_output", vec![d, a]);
            add("ffn_norm", vec![d]);
            add("ffn", vec![3, f, d]);
        }
        all.push(("final_norm".into(), vec![d]));
        if !self.tied_embeddings {
            all.push(("output".into(), vec![self.vocab_size, d]));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paper(
        d_model: usize,
        n_layers: usize,
        heads: (usize, usize),
        ffn_width: usize,
        tied: bool,
    ) -> AnchorConfig {
        AnchorConfig {
            vocab_size: 50_432,
            d_model,
            n_layers,
            n_heads: heads.0,
            head_width: heads.1,
            ffn_width,
            tied_embeddings: tied,
            max_seq_len: 8192,
            rope_base: 100_000.0,
            norm_eps: 1e-5,
        }
    }

    #[test]
    fn parameter_counts_of_the_paper() {
        let sizes = [
            (paper(512, 35, (12, 32), 2048, true), 163_510_016),
            (paper(1024, 24, (16, 64), 2816, false), 411_665_408),
            (paper(2048, 24, (16, 128), 5632, false), 1_439_893_504),
        ];
        for (config, expected) in sizes {
            assert_eq!(config.n_parameters(), expected);
            let listed: u64 =
                config.parameters().iter().map(|(_, s)| s.iter().map(|&x| x as u64).product::<u64>()).sum();
            assert_eq!(listed, expected, "the listed shapes add up to the formula");
        }
    }

    #[test]
    fn impossible_sizes_name_their_key() {
        let mut config = paper(512, 35, (12, 31), 2048, true);
        assert!(config.check().unwrap_err().to_string().contains("anchor.head_width: 31 must be even"));
        config.n_layers = 0;
        assert!(config.check().unwrap_err().to_string().contains("anchor.n_layers: 0"));
    }
}
