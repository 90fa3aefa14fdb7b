//! Tables from the tensors of published checkpoints to an anchor's parameters, for both ways.

use std::collections::BTreeMap;

use crate::AnchorConfig;

/// How a part of a tensor is a part of a parameter.
#[derive(Clone, Copy)]
enum How {
    /// All of it.
    Whole,
    /// Its i-th third: M1 or M2 of an FFN.
    Third(usize),
    /// Its last third, transposed: M3 of an FFN.
    LastThird,
    /// Its i-th half.
    Half(usize),
}

use How::{Half, LastThird, Third, Whole};

/// A tensor of a layer, and of which parameters its rows are, in order. It is there if the first of these is.
type Entry = (&'static str, &'static [(&'static str, How)]);

/// The names of one kind of checkpoint.
pub(super) struct Names {
    /// What comes before all names, unless a file has another prefix.
    pub(super) prefix: &'static str,
    pub(super) embedding: &'static str,
    final_norm: &'static str,
    /// Beside the prefix.
    output: &'static str,
    /// Of the layers, each behind `layers.N.`.
    layer: &'static [&'static [Entry]],
    /// Whether norms hold what is added to 1.
    gains_from_one: bool,
    /// Tensors of a layer that no result depends on, [rows, D].
    unused: &'static [(&'static str, usize)],
}

const ATTENTION: &[Entry] = &[
    ("input_layernorm.weight", &[("attention_norm", Whole)]),
    ("self_attn.q_proj.weight", &[("query", Whole)]),
    ("self_attn.k_proj.weight", &[("key", Whole)]),
    ("self_attn.v_proj.weight", &[("value", Whole)]),
    ("self_attn.q_proj.bias", &[("query_bias", Whole)]),
    ("self_attn.k_proj.bias", &[("key_bias", Whole)]),
    ("self_attn.v_proj.bias", &[("value_bias", Whole)]),
    ("self_attn.q_norm.weight", &[("query_norm", Whole)]),
    ("self_attn.k_norm.weight", &[("key_norm", Whole)]),
    ("self_attn.o_proj.weight", &[("attention_output", Whole)]),
    ("self_attn.o_proj.bias", &[("attention_output_bias", Whole)]),
];

const FFN: &[Entry] = &[
    ("mlp.gate_proj.weight", &[("ffn", Third(0))]),
    ("mlp.up_proj.weight", &[("ffn", Third(1))]),
    ("mlp.down_proj.weight", &[("ffn", LastThird)]),
    ("mlp.gate_proj.bias", &[("ffn_inner_bias", Half(0))]),
    ("mlp.up_proj.bias", &[("ffn_inner_bias", Half(1))]),
    ("mlp.down_proj.bias", &[("ffn_outer_bias", Whole)]),
];

/// Norms before attention and before the FFN.
pub(super) const LLAMA: Names = Names {
    prefix: "model.",
    embedding: "embed_tokens.weight",
    final_norm: "norm.weight",
    output: "lm_head.weight",
    layer: &[ATTENTION, &[("post_attention_layernorm.weight", &[("ffn_norm", Whole)])], FFN],
    gains_from_one: false,
    unused: &[],
};

/// Norms before and after both.
pub(super) const GEMMA: Names = Names {
    layer: &[
        ATTENTION,
        &[
            ("post_attention_layernorm.weight", &[("attention_post_norm", Whole)]),
            ("pre_feedforward_layernorm.weight", &[("ffn_norm", Whole)]),
            ("post_feedforward_layernorm.weight", &[("ffn_post_norm", Whole)]),
        ],
        FFN,
    ],
    gains_from_one: true,
    ..LLAMA
};

/// The FFN as the only expert.
pub(super) const OLMOE: Names = Names {
    layer: &[
        ATTENTION,
        &[
            ("post_attention_layernorm.weight", &[("ffn_norm", Whole)]),
            ("mlp.experts.0.gate_proj.weight", &[("ffn", Third(0))]),
            ("mlp.experts.0.up_proj.weight", &[("ffn", Third(1))]),
            ("mlp.experts.0.down_proj.weight", &[("ffn", LastThird)]),
        ],
    ],
    // Chooses among the one expert.
    unused: &[("mlp.gate.weight", 1)],
    ..LLAMA
};

/// Joined matrices.
pub(super) const OPENELM: Names = Names {
    prefix: "transformer.",
    embedding: "token_embeddings.weight",
    layer: &[&[
        ("attn_norm.weight", &[("attention_norm", Whole)]),
        ("attn.qkv_proj.weight", &[("query", Whole), ("key", Whole), ("value", Whole)]),
        ("attn.q_norm.weight", &[("query_norm", Whole)]),
        ("attn.k_norm.weight", &[("key_norm", Whole)]),
        ("attn.out_proj.weight", &[("attention_output", Whole)]),
        ("ffn_norm.weight", &[("ffn_norm", Whole)]),
        ("ffn.proj_1.weight", &[("ffn", Third(0)), ("ffn", Third(1))]),
        ("ffn.proj_2.weight", &[("ffn", LastThird)]),
    ]],
    ..LLAMA
};

/// A part of a parameter: consecutive numbers of it, and those of a tensor.
pub(super) struct Piece {
    /// The parameter.
    pub(super) ours: String,
    /// The first number of it, and how many.
    pub(super) offset: usize,
    pub(super) len: usize,
    /// The first number of the tensor.
    pub(super) theirs: usize,
    /// Columns of these numbers of the parameter, when the tensor has them transposed.
    pub(super) transposed: Option<usize>,
}

/// A tensor of a checkpoint.
pub(super) struct Stored {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    /// None: nothing depends on it.
    pub(super) pieces: Vec<Piece>,
    /// What is added to its numbers to make the parameter's.
    pub(super) shift: f32,
}

/// Where the names of a checkpoint begin.
pub(super) struct Prefixes<'a> {
    /// Of all but the output.
    pub(super) model: &'a str,
    /// Of the output.
    pub(super) output: &'a str,
}

/// Every tensor of a checkpoint with these names that holds this anchor.
pub(super) fn stored(config: &AnchorConfig, names: &Names, prefixes: &Prefixes) -> Vec<Stored> {
    let parameters: BTreeMap<String, Vec<usize>> = config.parameters().into_iter().collect();
    let model = prefixes.model;
    let mut all = vec![];
    let mut add = |name: String, parts: &[(String, How)]| {
        if parameters.contains_key(&parts[0].0) {
            all.push(tensor(name, parts, &parameters, names.gains_from_one));
        }
    };
    let whole = |ours: &str| [(ours.to_string(), Whole)];
    add(format!("{model}{}", names.embedding), &whole("token_embedding"));
    for layer in 0..config.n_layers {
        for &(theirs, parts) in names.layer.iter().copied().flatten() {
            let parts: Vec<_> =
                parts.iter().map(|&(ours, how)| (format!("layers.{layer}.{ours}"), how)).collect();
            add(format!("{model}layers.{layer}.{theirs}"), &parts);
        }
    }
    add(format!("{model}{}", names.final_norm), &whole("final_norm"));
    add(format!("{}{}", prefixes.output, names.output), &whole("output"));
    for layer in 0..config.n_layers {
        for &(theirs, rows) in names.unused {
            let (name, shape) = (format!("{model}layers.{layer}.{theirs}"), vec![rows, config.d_model]);
            all.push(Stored { name, shape, pieces: vec![], shift: 0.0 });
        }
    }
    all
}

fn tensor(
    name: String,
    parts: &[(String, How)],
    parameters: &BTreeMap<String, Vec<usize>>,
    gains_from_one: bool,
) -> Stored {
    let mut shape: Vec<usize> = vec![];
    let mut pieces = vec![];
    let mut theirs = 0;
    for (ours, how) in parts {
        let of = &parameters[ours];
        let all: usize = of.iter().product();
        let (rows_of, offset, transposed) = match (how, &of[..]) {
            (Whole, _) => (of.clone(), 0, None),
            (Third(i), &[_, f, d]) => (vec![f, d], i * f * d, None),
            (LastThird, &[_, f, d]) => (vec![d, f], 2 * f * d, Some(d)),
            (Half(i), _) => (vec![all / 2], i * all / 2, None),
            (Third(_) | LastThird, _) => unreachable!("only an FFN has thirds"),
        };
        let len = rows_of.iter().product();
        pieces.push(Piece { ours: ours.clone(), offset, len, theirs, transposed });
        theirs += len;
        match shape.first_mut() {
            Some(rows) => *rows += rows_of[0],
            None => shape = rows_of,
        }
    }
    let is_gain = parts[0].0.ends_with("norm");
    Stored { name, shape, pieces, shift: if gains_from_one && is_gain { 1.0 } else { 0.0 } }
}

/// The transpose of `values`, which are rows of `columns` numbers.
pub(crate) fn transpose(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns;
    (0..values.len()).map(|i| values[i % rows * columns + i / rows]).collect()
}
