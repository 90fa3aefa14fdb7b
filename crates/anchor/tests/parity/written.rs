//! Folders that are written, read again.

use anchor::{Anchor, AnchorConfig, Form, QkNorm, hf};
use safetensors::SafeTensors;

use crate::reference::*;

fn same_parameters(a: &Anchor, b: &Anchor) {
    assert!(a.parameters().keys().eq(b.parameters().keys()));
    for (name, x) in a.parameters() {
        let numbers = |anchor: &Anchor| -> Vec<u32> {
            let values = anchor.parameters()[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
            values.iter().map(|x| x.to_bits()).collect()
        };
        assert_eq!(x.dims(), b.parameters()[name].dims(), "{name}");
        assert_eq!(numbers(a), numbers(b), "{name}");
    }
}

#[test]
fn what_is_written_is_read_again_to_the_bit() {
    for family in FAMILIES {
        let (anchor, about) = hf::read(&folder(family), CPU).unwrap();
        let to = tempfile::tempdir().unwrap();
        let model_type = hf::write(&anchor, to.path(), &about.tokens).unwrap();
        let (again, about_again) = hf::read(to.path(), CPU).unwrap();
        assert_eq!(again.config(), anchor.config(), "{family}");
        assert_eq!((model_type, &about_again.tokens), (&about.model_type[..], &about.tokens), "{family}");
        same_parameters(&anchor, &again);
    }
}

fn native(n_heads: usize, tied_embeddings: bool, qk_norm: QkNorm) -> AnchorConfig {
    let mut form = Form::default();
    form.attention.qk_norm = qk_norm;
    AnchorConfig {
        vocab_size: 31,
        d_model: 24,
        n_layers: 2,
        n_heads,
        head_width: 6,
        ffn_width: 20,
        tied_embeddings,
        max_seq_len: 64,
        rope_base: 10_000.0,
        norm_eps: 1e-5,
        form,
    }
}

#[test]
fn native_anchors_are_written_where_a_family_holds_them() {
    for (config, expected) in [
        (native(4, true, QkNorm::Full), "olmoe"),
        (native(4, false, QkNorm::Full), "olmoe"),
        (native(3, true, QkNorm::Head), "qwen3"),
        (native(3, true, QkNorm::None), "llama"),
    ] {
        let anchor = Anchor::new(config.clone(), 3, CPU).unwrap();
        let to = tempfile::tempdir().unwrap();
        assert_eq!(hf::write(&anchor, to.path(), &hf::SpecialTokens::default()).unwrap(), expected);
        let mut wanted = config.clone();
        wanted.form.rope.single = true;
        let again = read(to.path());
        assert_eq!(again.config(), &wanted);
        same_parameters(&anchor, &again);
        let bytes = std::fs::read(to.path().join("model.safetensors")).unwrap();
        let has_output = SafeTensors::deserialize(&bytes).unwrap().tensor("lm_head.weight").is_ok();
        assert_eq!(has_output, !config.tied_embeddings, "a tied output is left out");
    }
}

#[test]
fn an_anchor_that_no_family_holds_is_refused_with_the_reason() {
    let anchor = Anchor::new(native(3, true, QkNorm::Full), 3, CPU).unwrap();
    let to = tempfile::tempdir().unwrap();
    let error = hf::write(&anchor, to.path(), &hf::SpecialTokens::default()).unwrap_err().to_string();
    let expected = "no family of transformers holds this anchor: the nearest, llama, has \
                    form.attention.qk_norm \"none\" where the anchor has \"full\"";
    assert!(error.ends_with(expected), "{error}");
    assert!(std::fs::read_dir(to.path()).unwrap().next().is_none(), "nothing is written");
}
