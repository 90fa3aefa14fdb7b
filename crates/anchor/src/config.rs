use memory_bank::{BlockSpec, LayerWidths, MemoryKind, MemoryLayers};
use serde::{Deserialize, Serialize};

use crate::{AttentionBias, Error, Form, LayerSizes, QkNorm, Result, RopeScaling};

/// Sizes of an anchor (arXiv 2510.02375 App. A; method.md §4), and what it differs in from the native one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnchorConfig {
    /// Tokens of the vocabulary, V.
    pub vocab_size: usize,
    /// Width of the residual stream, D.
    pub d_model: usize,
    /// Decoder blocks.
    pub n_layers: usize,
    /// Attention heads; the most of a layer, when layers differ.
    pub n_heads: usize,
    /// Width of a head; n_heads · head_width may differ from d_model.
    pub head_width: usize,
    /// Width of the gated FFN, F; the largest of a layer, when layers differ.
    pub ffn_width: usize,
    /// Whether the output projection is the token embedding.
    pub tied_embeddings: bool,
    /// Longest sequence the rotary table covers.
    pub max_seq_len: usize,
    /// Base of the rotary position embedding.
    pub rope_base: f64,
    /// Added to the mean square in every norm.
    pub norm_eps: f64,
    /// What it differs in from the native anchor.
    #[serde(default, skip_serializing_if = "Form::is_native")]
    pub form: Form,
}

/// One layer of an anchor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// Heads of queries, H.
    pub heads: usize,
    /// Heads of keys and values, G.
    pub kv_heads: usize,
    /// Width of a head, K.
    pub head_width: usize,
    /// Width of the gated FFN, F.
    pub ffn_width: usize,
    /// Positions that a token sees, its own the last; none is all.
    pub window: Option<usize>,
}

impl LayerShape {
    /// Width of queries: H·K.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_width
    }

    /// Width of keys, and of values: G·K.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_width
    }

    /// What sizes of memory in this layer follow from.
    pub fn widths(&self) -> LayerWidths {
        LayerWidths {
            query: self.query_width(),
            key_value: self.kv_width(),
            head: self.head_width,
            ffn: self.ffn_width,
        }
    }
}

impl AnchorConfig {
    /// Width of queries, and of as many keys and values: n_heads · head_width.
    pub fn attention_width(&self) -> usize {
        self.n_heads * self.head_width
    }

    /// The layer of this index.
    pub fn layer(&self, index: usize) -> LayerShape {
        let of_all = LayerSizes {
            n_heads: self.n_heads,
            kv_heads: self.form.attention.kv_heads.unwrap_or(self.n_heads),
            ffn_width: self.ffn_width,
        };
        let LayerSizes { n_heads: heads, kv_heads, ffn_width } =
            self.form.layers.get(index).copied().unwrap_or(of_all);
        let local = self.form.local.as_ref().filter(|local| local.layers.contains(&index));
        let window = local.map(|local| local.window);
        LayerShape { heads, kv_heads, head_width: self.head_width, ffn_width, window }
    }

    /// The sizes of a bank for this anchor: memory of a kind in some layers, of these widths and branchings by level.
    pub fn block_spec(
        &self,
        kind: MemoryKind,
        layers: MemoryLayers,
        (width, branching): (Vec<usize>, Vec<usize>),
    ) -> BlockSpec {
        let mut inner: Vec<LayerWidths> = match kind {
            MemoryKind::Ffn => vec![],
            _ => self.layers().map(|layer| layer.widths()).collect(),
        };
        if inner.windows(2).all(|pair| pair[0] == pair[1]) {
            inner.truncate(1);
        }
        BlockSpec { kind, layers, inner, ..BlockSpec::ffn(self.n_layers, self.d_model, width, branching) }
    }

    /// All layers, in order.
    pub fn layers(&self) -> impl Iterator<Item = LayerShape> + '_ {
        (0..self.n_layers).map(|index| self.layer(index))
    }

    /// Elements of [`AnchorConfig::parameters`]: embeddings, per block the attention matrices, the FFN, its norms, and
    /// the final norm. Of the native anchor V·D·(1|2) + L·(4·D·H·K + 3·D·F + 2·D + 2·H·K) + D.
    pub fn n_parameters(&self) -> u64 {
        self.parameters().iter().map(|(_, shape)| shape.iter().map(|&x| x as u64).product::<u64>()).sum()
    }

    /// FLOPs of the matrix products of forward and backward for one token, in sequences of `len` tokens of one
    /// document each: 6 per weight, and of attention 6·L·(len + 1)·H·K, the causal half of its scores, or what a
    /// window leaves of it (Kaplan et al., arXiv 2001.08361 §2.1; PaLM, arXiv 2204.02311 App. B). `fetch_len` is the
    /// number of parameters of the memory that a token fetches ([`BlockSpec::fetch_len`]), each of which is a weight
    /// like others.
    pub fn training_flops(&self, len: usize, fetch_len: u64) -> u64 {
        let (v, d) = (self.vocab_size as u64, self.d_model as u64);
        let layer = |shape: LayerShape| {
            let [a, e, f] = [shape.query_width(), shape.kv_width(), shape.ffn_width].map(|x| x as u64);
            let (t, w) = (len as u64, shape.window.map_or(len, |window| window.min(len)) as u64);
            // Twice the positions that a token sees on average.
            let seen = if w == t { t + 1 } else { (w * (w + 1) + 2 * (t - w) * w) / t };
            6 * (2 * d * a + 2 * d * e + 3 * d * f) + 6 * seen * a
        };
        6 * (v * d + fetch_len) + self.layers().map(layer).sum::<u64>()
    }

    /// Checks that a model can be built.
    ///
    /// # Errors
    /// Names the key that is zero, or does not fit the others.
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
            return wrong(key, found, "must be at least 1");
        }
        if self.head_width % 2 == 1 {
            return wrong("head_width", self.head_width, "must be even: rotary embedding turns pairs");
        }
        let local_base = self.form.local.as_ref().and_then(|local| local.rope_base);
        let (factor, low, ramp) = match self.form.rope.scaling {
            RopeScaling::None => (None, None, None),
            RopeScaling::Linear { factor } => (Some(factor), None, None),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, .. } => {
                (Some(factor), Some(low_freq_factor), Some(high_freq_factor - low_freq_factor))
            }
        };
        let numbers = [
            ("form.rope.scaling.factor", factor),
            ("form.rope.scaling.low_freq_factor", low),
            ("form.rope.scaling.high_freq_factor - low_freq_factor", ramp),
            ("rope_base", Some(self.rope_base)),
            ("norm_eps", Some(self.norm_eps)),
            ("form.attention.factor", self.form.attention.factor),
            ("form.attention.cap", self.form.attention.cap),
            ("form.local.rope_base", local_base),
            ("form.embedding_scale", self.form.embedding_scale),
            ("form.logit_cap", self.form.logit_cap),
        ];
        for (key, found) in numbers {
            if let Some(found) = found.filter(|found| !(found.is_finite() && *found > 0.0)) {
                return wrong(key, found, "must be a number above 0");
            }
        }
        self.check_layers()
    }

    fn check_layers(&self) -> Result<()> {
        if let Some(local) = &self.form.local {
            if local.window == 0 {
                return wrong("form.local.window", 0, "must be at least 1");
            }
            let ascend = local.layers.windows(2).all(|pair| pair[0] < pair[1]);
            if !ascend || local.layers.last().is_some_and(|&last| last >= self.n_layers) {
                let problem = format!("must ascend and be below {} layers", self.n_layers);
                return wrong("form.local.layers", format!("{:?}", local.layers), problem);
            }
        }
        let sizes = &self.form.layers;
        if !sizes.is_empty() {
            if sizes.len() != self.n_layers {
                return wrong("form.layers", sizes.len(), format!("must be {}, one a layer", self.n_layers));
            }
            let most = |of: fn(&LayerSizes) -> usize| sizes.iter().map(of).max().unwrap_or(0);
            let (heads, width) = (most(|sizes| sizes.n_heads), most(|sizes| sizes.ffn_width));
            if heads != self.n_heads {
                return wrong("n_heads", self.n_heads, format!("must be {heads}, the most of a layer"));
            }
            if width != self.ffn_width {
                return wrong(
                    "ffn_width",
                    self.ffn_width,
                    format!("must be {width}, the largest of a layer"),
                );
            }
        }
        for (i, shape) in self.layers().enumerate() {
            let LayerShape { heads, kv_heads, ffn_width, .. } = shape;
            if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) || ffn_width == 0 {
                let problem =
                    format!("of layer {i} cannot share {kv_heads} heads of keys, or its FFN has no width");
                return wrong("n_heads", heads, problem);
            }
        }
        Ok(())
    }

    /// Name and shape of every parameter, in a fixed order.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let (d, form) = (self.d_model, &self.form);
        let mut all = vec![("token_embedding".to_string(), vec![self.vocab_size, d])];
        for (layer, shape) in self.layers().enumerate() {
            let (a, e, f) = (shape.query_width(), shape.kv_width(), shape.ffn_width);
            let mut add = |name: &str, shape: Vec<usize>| all.push((format!("layers.{layer}.{name}"), shape));
            add("attention_norm", vec![d]);
            add("query", vec![a, d]);
            add("key", vec![e, d]);
            add("value", vec![e, d]);
            if form.attention.bias != AttentionBias::None {
                add("query_bias", vec![a]);
                add("key_bias", vec![e]);
                add("value_bias", vec![e]);
            }
            match form.attention.qk_norm {
                QkNorm::Full => {
                    add("query_norm", vec![a]);
                    add("key_norm", vec![e]);
                }
                QkNorm::Head => {
                    add("query_norm", vec![shape.head_width]);
                    add("key_norm", vec![shape.head_width]);
                }
                QkNorm::None => {}
            }
            add("attention_output", vec![d, a]);
            if form.attention.bias == AttentionBias::All {
                add("attention_output_bias", vec![d]);
            }
            if form.post_norms {
                add("attention_post_norm", vec![d]);
            }
            add("ffn_norm", vec![d]);
            add("ffn", vec![3, f, d]);
            if form.ffn_bias {
                add("ffn_inner_bias", vec![2 * f]);
                add("ffn_outer_bias", vec![d]);
            }
            if form.post_norms {
                add("ffn_post_norm", vec![d]);
            }
        }
        all.push(("final_norm".into(), vec![d]));
        if !self.tied_embeddings {
            all.push(("output".into(), vec![self.vocab_size, d]));
        }
        all
    }
}

fn wrong(key: &'static str, found: impl ToString, problem: impl Into<String>) -> Result<()> {
    Err(Error::Config { key, found: found.to_string(), problem: problem.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LocalLayers;

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
            form: Form::default(),
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
            let [v, d, l, a, f] = [
                config.vocab_size,
                config.d_model,
                config.n_layers,
                config.attention_width(),
                config.ffn_width,
            ]
            .map(|x| x as u64);
            let ends = v * d * if config.tied_embeddings { 1 } else { 2 } + d;
            assert_eq!(ends + l * (4 * d * a + 3 * d * f + 2 * d + 2 * a), expected, "the formula");
            assert_eq!(
                config.training_flops(2048, 0),
                6 * (v * d + l * (4 * d * a + 3 * d * f)) + 6 * l * 2049 * a
            );
        }
    }

    #[test]
    fn impossible_sizes_name_their_key() {
        let mut config = paper(512, 35, (12, 31), 2048, true);
        assert!(config.check().unwrap_err().to_string().contains("anchor.head_width: 31 must be even"));
        config.n_layers = 0;
        assert!(config.check().unwrap_err().to_string().contains("anchor.n_layers: 0"));
    }

    #[test]
    fn a_native_anchor_is_written_as_it_always_was() {
        let config = paper(512, 35, (12, 32), 2048, true);
        let json = r#"{"vocab_size":50432,"d_model":512,"n_layers":35,"n_heads":12,"head_width":32,"ffn_width":2048,"tied_embeddings":true,"max_seq_len":8192,"rope_base":100000.0,"norm_eps":0.00001}"#;
        assert_eq!(serde_json::to_string(&config).unwrap(), json);
        assert_eq!(serde_json::from_str::<AnchorConfig>(json).unwrap(), config);
    }

    #[test]
    fn another_form_is_written_whole_and_read_again() {
        let mut config = paper(16, 2, (4, 4), 24, true);
        config.form.attention.kv_heads = Some(2);
        config.form.rope.scaling = RopeScaling::Linear { factor: 8.0 };
        config.form.local = Some(LocalLayers { window: 5, layers: vec![0], rope_base: Some(1e4) });
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<AnchorConfig>(&json).unwrap(), config, "{json}");
        assert_eq!(config.layer(0).window, Some(5));
        assert_eq!((config.layer(1).window, config.layer(1).kv_width()), (None, 8));
    }

    #[test]
    fn forms_that_do_not_fit_name_their_key() {
        let message = |change: &dyn Fn(&mut AnchorConfig)| {
            let mut config = paper(16, 2, (4, 4), 24, true);
            change(&mut config);
            config.check().unwrap_err().to_string()
        };
        let sizes = |n_heads, ffn_width| LayerSizes { n_heads, kv_heads: 2, ffn_width };
        let local = |window, layer| Some(LocalLayers { window, layers: vec![layer], rope_base: None });
        let found = [
            message(&|config| config.form.attention.kv_heads = Some(3)),
            message(&|config| config.form.logit_cap = Some(0.0)),
            message(&|config| config.form.rope.scaling = RopeScaling::Linear { factor: 0.0 }),
            message(&|config| config.form.local = local(0, 1)),
            message(&|config| config.form.local = local(4, 2)),
            message(&|config| config.form.layers = vec![sizes(4, 24)]),
            message(&|config| config.form.layers = vec![sizes(4, 8), sizes(2, 20)]),
        ];
        let expected = [
            "anchor.n_heads: 4 of layer 0 cannot share 3 heads of keys, or its FFN has no width",
            "anchor.form.logit_cap: 0 must be a number above 0",
            "anchor.form.rope.scaling.factor: 0 must be a number above 0",
            "anchor.form.local.window: 0 must be at least 1",
            "anchor.form.local.layers: [2] must ascend and be below 2 layers",
            "anchor.form.layers: 1 must be 2, one a layer",
            "anchor.ffn_width: 24 must be 20, the largest of a layer",
        ];
        assert_eq!(found, expected);
    }
}
