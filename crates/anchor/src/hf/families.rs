//! The families whose config.json is known: what each says, as an [`AnchorConfig`], and back.

use serde_json::{Value, json};

use super::settings::Settings;
use super::tensors::{GEMMA, LLAMA, Names, OLMOE, OPENELM};
use crate::{
    Activation, AnchorConfig, AttentionBias, Form, LayerSizes, LocalLayers, QkNorm, Result, RopeScaling,
    Rotation,
};

/// One family.
pub(super) struct Family {
    /// What `model_type` says.
    pub(super) model_type: &'static str,
    /// What `architectures` says.
    pub(super) architecture: &'static str,
    pub(super) names: &'static Names,
    /// What its settings are where a file leaves them out.
    pub(super) defaults: fn() -> Value,
    /// The anchor that these settings, over the defaults, describe.
    pub(super) read: fn(&Settings) -> Result<AnchorConfig>,
    /// Settings of an anchor as far as the family has them: what [`Family::read`] makes of them tells whether they
    /// are all.
    pub(super) write: fn(&AnchorConfig) -> Value,
}

/// All of them; an anchor is written as the first that it fits.
pub(super) const FAMILIES: [Family; 8] = [
    Family {
        model_type: "llama",
        architecture: "LlamaForCausalLM",
        names: &LLAMA,
        defaults: || json!({"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4}),
        read: |s| {
            let mut config = usual(s, "hidden_act")?;
            config.form.attention.bias = all_biases(s)?;
            config.form.ffn_bias = s.flag("mlp_bias")?;
            Ok(config)
        },
        write: |config| {
            let bias = config.form.attention.bias == AttentionBias::All;
            settings(config, json!({"attention_bias": bias, "mlp_bias": config.form.ffn_bias}))
        },
    },
    Family {
        model_type: "mistral",
        architecture: "MistralForCausalLM",
        names: &LLAMA,
        defaults: || {
            json!({"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096,
                   "num_key_value_heads": 8})
        },
        read: |s| {
            let mut config = usual(s, "hidden_act")?;
            config.form.local = local_layers(s, config.n_layers, |_| true)?;
            Ok(config)
        },
        write: |config| settings(config, json!({"sliding_window": window(config)})),
    },
    Family {
        model_type: "qwen2",
        architecture: "Qwen2ForCausalLM",
        names: &LLAMA,
        defaults: || {
            json!({"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096,
                   "max_window_layers": 28, "num_key_value_heads": 32})
        },
        read: |s| {
            let mut config = usual(s, "hidden_act")?;
            config.form.attention.bias = AttentionBias::Qkv;
            config.form.local = upper_local_layers(s, config.n_layers)?;
            Ok(config)
        },
        write: |config| settings(config, upper_window(config)),
    },
    Family {
        model_type: "qwen3",
        architecture: "Qwen3ForCausalLM",
        names: &LLAMA,
        defaults: || {
            json!({"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096,
                   "max_window_layers": 28, "num_key_value_heads": 32, "head_dim": 128})
        },
        read: |s| {
            let mut config = usual(s, "hidden_act")?;
            config.form.attention.qk_norm = QkNorm::Head;
            config.form.attention.bias = all_biases(s)?;
            config.form.local = upper_local_layers(s, config.n_layers)?;
            Ok(config)
        },
        write: |config| {
            let mut more = upper_window(config);
            more["attention_bias"] = json!(config.form.attention.bias == AttentionBias::All);
            settings(config, more)
        },
    },
    Family {
        model_type: "gemma2",
        architecture: "Gemma2ForCausalLM",
        names: &GEMMA,
        defaults: || {
            json!({"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": 1e4,
                   "sliding_window": 4096, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
                   "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "tie_word_embeddings": true})
        },
        read: |s| {
            let mut config = scaled(s)?;
            config.form.attention.cap = s.maybe_number("attn_logit_softcapping")?;
            config.form.local = local_layers(s, config.n_layers, |layer| layer % 2 == 0)?;
            Ok(config)
        },
        write: |config| {
            let mut more = scaled_settings(config);
            more["attn_logit_softcapping"] = json!(config.form.attention.cap);
            settings(config, more)
        },
    },
    Family {
        model_type: "gemma3_text",
        architecture: "Gemma3ForCausalLM",
        names: &GEMMA,
        // Published files rely on all of these.
        defaults: || {
            json!({"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
                   "rope_local_base_freq": 1e4, "vocab_size": 262_208, "hidden_size": 2304,
                   "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
                   "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131_072,
                   "sliding_window": 4096, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
                   "tie_word_embeddings": true})
        },
        read: |s| {
            // transformers ignores it.
            s.only("attn_logit_softcapping", &Value::Null)?;
            let mut config = scaled(s)?;
            config.form.attention.qk_norm = QkNorm::Head;
            let pattern = s.size("sliding_window_pattern")?;
            config.form.local = local_layers(s, config.n_layers, |layer| (layer + 1) % pattern != 0)?;
            if let Some(local) = &mut config.form.local {
                local.rope_base = Some(local_base(s)?);
            }
            Ok(config)
        },
        write: |config| {
            let mut more = scaled_settings(config);
            let local = config.form.local.as_ref().and_then(|local| local.rope_base);
            more["rope_local_base_freq"] = json!(local.unwrap_or(config.rope_base));
            settings(config, more)
        },
    },
    Family {
        // Of one expert it is a decoder without experts, and the one family with a norm of whole queries and keys
        // that norms before, not after.
        model_type: "olmoe",
        architecture: "OlmoeForCausalLM",
        names: &OLMOE,
        defaults: || json!({"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "num_experts": 64}),
        read: |s| {
            for key in ["num_experts", "num_experts_per_tok"] {
                s.only(key, &json!(1))?;
            }
            s.only("attention_bias", &json!(false))?;
            s.only("clip_qkv", &Value::Null)?;
            let mut config = usual(s, "hidden_act")?;
            config.form.attention.qk_norm = QkNorm::Full;
            config.head_width = config.d_model / config.n_heads;
            Ok(config)
        },
        write: |config| {
            settings(config, json!({"num_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": false}))
        },
    },
    Family {
        model_type: "openelm",
        architecture: "OpenELMForCausalLM",
        names: &OPENELM,
        defaults: || json!({"activation_fn_name": "swish", "rope_freq_constant": 1e4}),
        read: by_layer,
        write: by_layer_settings,
    },
];

/// What nearly all families say in the same words.
fn usual(s: &Settings, activation: &str) -> Result<AnchorConfig> {
    let (d_model, n_heads) = (s.size("hidden_size")?, s.size("num_attention_heads")?);
    let head_width = match s.maybe_size("head_dim")? {
        Some(width) => width,
        None if d_model.is_multiple_of(n_heads) => d_model / n_heads,
        None => return s.unexpected("hidden_size", format!("a multiple of {n_heads} heads")),
    };
    let kv_heads = s.maybe_size("num_key_value_heads")?.unwrap_or(n_heads);
    let (rope_base, scaling) = rope(s, "full_attention")?;
    let mut form = Form::default();
    form.attention.kv_heads = (kv_heads != n_heads).then_some(kv_heads);
    form.attention.qk_norm = QkNorm::None;
    form.rope = Rotation { scaling, single: true };
    form.activation = match s.text(activation)? {
        "silu" | "swish" => Activation::Silu,
        "gelu_pytorch_tanh" | "gelu_new" => Activation::GeluTanh,
        "gelu" => Activation::Gelu,
        _ => return s.unexpected(activation, "silu, gelu or gelu_pytorch_tanh"),
    };
    Ok(AnchorConfig {
        vocab_size: s.size("vocab_size")?,
        d_model,
        n_layers: s.size("num_hidden_layers")?,
        n_heads,
        head_width,
        ffn_width: s.size("intermediate_size")?,
        tied_embeddings: s.flag("tie_word_embeddings")?,
        max_seq_len: s.size("max_position_embeddings")?,
        rope_base,
        norm_eps: s.number("rms_norm_eps")?,
        form,
    })
}

/// The usual settings in the words of transformers 4, which 5 reads too, and `more`.
fn settings(config: &AnchorConfig, more: Value) -> Value {
    let form = &config.form;
    let activation = match form.activation {
        Activation::Silu => "silu",
        Activation::Gelu => "gelu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
        Activation::Relu => "relu",
    };
    let scaling = match form.rope.scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_len } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_len,
        }),
    };
    let mut all = json!({
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": form.attention.kv_heads.unwrap_or(config.n_heads),
        "head_dim": config.head_width,
        "hidden_act": activation,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tied_embeddings,
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        all[key] = value.clone();
    }
    all
}

/// The base and the scaling of the rotation, of layers of this type where they differ.
fn rope(s: &Settings, layer_type: &str) -> Result<(f64, RopeScaling)> {
    s.only("partial_rotary_factor", &json!(1.0))?;
    let parameters = s.within("rope_parameters");
    let of_type = parameters.as_ref().and_then(|parameters| parameters.within(layer_type));
    let scaling = match of_type.or(parameters).or_else(|| s.within("rope_scaling")) {
        Some(scaling) => scaling,
        None => return Ok((s.number("rope_theta")?, RopeScaling::None)),
    };
    let base = match scaling.maybe_number("rope_theta")? {
        Some(base) => base,
        None => s.number("rope_theta")?,
    };
    scaling.only("partial_rotary_factor", &json!(1.0))?;
    let kind = if scaling.has("rope_type") { "rope_type" } else { "type" };
    let scaling = match if scaling.has(kind) { scaling.text(kind)? } else { "default" } {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: scaling.number("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: scaling.number("factor")?,
            low_freq_factor: scaling.number("low_freq_factor")?,
            high_freq_factor: scaling.number("high_freq_factor")?,
            original_len: match scaling.maybe_size("original_max_position_embeddings")? {
                Some(len) => len,
                None => s.size("max_position_embeddings")?,
            },
        },
        _ => return scaling.unexpected(kind, "default, linear or llama3"),
    };
    Ok((base, scaling))
}

/// The base of the rotation of local layers.
fn local_base(s: &Settings) -> Result<f64> {
    let parameters =
        s.within("rope_parameters").and_then(|parameters| parameters.within("sliding_attention"));
    let Some(parameters) = parameters else { return s.number("rope_local_base_freq") };
    parameters.only("rope_type", &json!("default"))?;
    match parameters.maybe_number("rope_theta")? {
        Some(base) => Ok(base),
        None => s.number("rope_local_base_freq"),
    }
}

/// The layers with a window: those that the file lists, or by its family's rule.
fn local_layers(s: &Settings, n_layers: usize, rule: impl Fn(usize) -> bool) -> Result<Option<LocalLayers>> {
    let Some(window) = s.maybe_size("sliding_window")? else { return Ok(None) };
    let mut is_local: Vec<bool> = (0..n_layers).map(rule).collect();
    if s.has("layer_types") {
        let types = s.texts("layer_types")?;
        if types.len() != n_layers
            || types.iter().any(|kind| !["sliding_attention", "full_attention"].contains(kind))
        {
            return s.unexpected(
                "layer_types",
                format!("sliding_attention or full_attention for {n_layers} layers"),
            );
        }
        is_local = types.iter().map(|kind| *kind == "sliding_attention").collect();
    }
    let layers: Vec<usize> = (0..n_layers).filter(|&layer| is_local[layer]).collect();
    Ok((!layers.is_empty()).then_some(LocalLayers { window, layers, rope_base: None }))
}

/// Windows from some layer on, where they are used at all.
fn upper_local_layers(s: &Settings, n_layers: usize) -> Result<Option<LocalLayers>> {
    if !s.flag("use_sliding_window")? {
        return Ok(None);
    }
    let first = s.maybe_size("max_window_layers")?.unwrap_or(0);
    local_layers(s, n_layers, |layer| layer >= first)
}

fn window(config: &AnchorConfig) -> Option<usize> {
    config.form.local.as_ref().map(|local| local.window)
}

fn layer_types(config: &AnchorConfig) -> Vec<&'static str> {
    let kind = |window: Option<usize>| if window.is_some() { "sliding_attention" } else { "full_attention" };
    config.layers().map(|layer| kind(layer.window)).collect()
}

fn upper_window(config: &AnchorConfig) -> Value {
    let first = config.layers().position(|layer| layer.window.is_some());
    json!({
        "use_sliding_window": first.is_some(),
        "sliding_window": window(config),
        "max_window_layers": first.unwrap_or(config.n_layers),
        "layer_types": layer_types(config),
    })
}

fn all_biases(s: &Settings) -> Result<AttentionBias> {
    Ok(if s.flag("attention_bias")? { AttentionBias::All } else { AttentionBias::None })
}

/// Scaled embeddings, gates by GELU, norms before and after, a factor of scores of its own and capped logits.
fn scaled(s: &Settings) -> Result<AnchorConfig> {
    s.only("use_bidirectional_attention", &json!(false))?;
    let mut config = usual(s, "hidden_activation")?;
    let scalar = s.number("query_pre_attn_scalar")?;
    config.form.attention.bias = all_biases(s)?;
    config.form.attention.factor = (scalar != config.head_width as f64).then(|| scalar.powf(-0.5));
    config.form.post_norms = true;
    config.form.embedding_scale = Some((config.d_model as f64).sqrt());
    config.form.logit_cap = s.maybe_number("final_logit_softcapping")?;
    Ok(config)
}

fn scaled_settings(config: &AnchorConfig) -> Value {
    let factor = config.form.attention.factor;
    // Exact where it was a whole number.
    let scalar = factor.map_or(config.head_width as f64, |factor| {
        let scalar = factor.powi(-2);
        if (scalar.round() - scalar).abs() < 1e-9 * scalar { scalar.round() } else { scalar }
    });
    json!({
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": if scalar.fract() == 0.0 { json!(scalar as u64) } else { json!(scalar) },
        "sliding_window": window(config),
        "layer_types": layer_types(config),
        "final_logit_softcapping": config.form.logit_cap,
        "attention_bias": config.form.attention.bias == AttentionBias::All,
    })
}

/// Heads and widths by layer.
fn by_layer(s: &Settings) -> Result<AnchorConfig> {
    s.only("activation_fn_name", &json!("swish"))?;
    s.only("ffn_with_glu", &json!(true))?;
    s.only("normalization_layer_name", &json!("rms_norm"))?;
    let (d_model, n_layers) = (s.size("model_dim")?, s.size("num_transformer_layers")?);
    let (heads, kv_heads) = (s.sizes("num_query_heads")?, s.sizes("num_kv_heads")?);
    let (multipliers, divisor) = (s.numbers("ffn_multipliers")?, s.size("ffn_dim_divisor")?);
    for (key, len) in [
        ("num_query_heads", heads.len()),
        ("num_kv_heads", kv_heads.len()),
        ("ffn_multipliers", multipliers.len()),
    ] {
        if len != n_layers {
            return s.unexpected(key, format!("{n_layers} numbers, one a layer"));
        }
    }
    let layer = |i: usize| LayerSizes {
        n_heads: heads[i],
        kv_heads: kv_heads[i],
        ffn_width: make_divisible(multipliers[i] * d_model as f64, divisor),
    };
    let mut form = Form { layers: (0..n_layers).map(layer).collect(), ..Form::default() };
    form.attention.qk_norm = if s.flag("normalize_qk_projections")? { QkNorm::Head } else { QkNorm::None };
    form.rope.single = true;
    Ok(AnchorConfig {
        vocab_size: s.size("vocab_size")?,
        d_model,
        n_layers,
        n_heads: form.layers.iter().map(|sizes| sizes.n_heads).max().unwrap_or(0),
        head_width: s.size("head_dim")?,
        ffn_width: form.layers.iter().map(|sizes| sizes.ffn_width).max().unwrap_or(0),
        tied_embeddings: s.flag("share_input_output_layers")?,
        max_seq_len: s.size("max_context_length")?,
        rope_base: s.number("rope_freq_constant")?,
        norm_eps: 1e-6,
        form,
    })
}

fn by_layer_settings(config: &AnchorConfig) -> Value {
    let layers = || config.layers();
    let multiplier = |width: usize| width as f64 / config.d_model as f64;
    json!({
        "model_dim": config.d_model,
        "num_transformer_layers": config.n_layers,
        "head_dim": config.head_width,
        "num_query_heads": layers().map(|layer| layer.heads).collect::<Vec<_>>(),
        "num_kv_heads": layers().map(|layer| layer.kv_heads).collect::<Vec<_>>(),
        "ffn_multipliers": layers().map(|layer| multiplier(layer.ffn_width)).collect::<Vec<_>>(),
        "ffn_dim_divisor": 1,
        "ffn_with_glu": true,
        "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": config.form.attention.qk_norm == QkNorm::Head,
        "activation_fn_name": "swish",
        "share_input_output_layers": config.tied_embeddings,
        "max_context_length": config.max_seq_len,
        "rope_max_length": 2 * config.max_seq_len,
        "rope_freq_constant": config.rope_base,
        "vocab_size": config.vocab_size,
    })
}

/// The multiple of `divisor` nearest to the value, at least one, and not below nine tenths of it.
fn make_divisible(value: f64, divisor: usize) -> usize {
    let near = ((value + divisor as f64 / 2.0) as usize / divisor * divisor).max(divisor);
    if (near as f64) < 0.9 * value { near + divisor } else { near }
}
