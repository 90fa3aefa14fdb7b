use super::*;

const TEXTS: [&str; 3] =
    ["the cat sat on the mat, the cat sat.", "naïve façade: 東京 🦀", "a cat and a hat on a mat"];

fn train(vocab_size: usize) -> Tokenizer {
    let texts = TEXTS.iter().cycle().take(30).map(|text| Ok((*text).to_owned()));
    Tokenizer::train(texts, vocab_size, SAMPLE_BYTES).unwrap()
}

#[test]
fn training_is_deterministic_and_lossless() {
    let (one, two) = (train(290), train(290));
    assert_eq!(one.hash(), two.hash());
    assert_eq!((one.vocab_size(), one.eot()), (290, 0));
    let bytes: String = (0..0x500).filter_map(char::from_u32).collect();
    for text in TEXTS.iter().copied().chain([" two  spaces\n\ttab", bytes.as_str()]) {
        let tokens = one.encode(text).unwrap();
        assert!(tokens.iter().all(|&token| token != one.eot() && (token as usize) < 290));
        assert_eq!(one.decode(&tokens).unwrap(), text);
    }
    assert!(one.encode(TEXTS[0]).unwrap().len() < TEXTS[0].len() / 2, "no merges were learned");
}

#[test]
fn batches_equal_single_texts() {
    let tokenizer = train(290);
    let single: Vec<_> = TEXTS.iter().map(|text| tokenizer.encode(text).unwrap()).collect();
    assert_eq!(tokenizer.encode_batch(&TEXTS).unwrap(), single);
}

#[test]
fn the_vocabulary_is_as_large_as_the_text_allows() {
    let tokenizer = Tokenizer::train([Ok("ab".to_owned())].into_iter(), 5000, SAMPLE_BYTES).unwrap();
    assert_eq!(tokenizer.vocab_size(), 258);
}

#[test]
fn the_sample_ends_at_its_size() {
    let texts = || ["aé", "éa"].into_iter().map(|text| Ok(text.to_owned()));
    assert_eq!(sample(texts(), 5).unwrap(), ["aé", "é"]);
    assert_eq!(sample(texts(), 4).unwrap(), ["aé"]);
    assert_eq!(sample(texts(), 100).unwrap(), ["aé", "éa"]);
    let endless = std::iter::repeat_with(|| Ok("ab".to_owned()));
    assert_eq!(sample(endless, 3).unwrap(), ["ab", "a"]);
    assert!(matches!(sample(std::iter::empty(), 9), Err(Error::NoTrainingText)));
    let failing = [Ok("a".to_owned()), Err(Error::NoMatch { pattern: "x".to_owned() })].into_iter();
    assert!(matches!(sample(failing, 9), Err(Error::NoMatch { .. })));
}

#[test]
fn the_longest_token_bounds_how_few_tokens_a_text_has() {
    let tokenizer = train(290);
    let longest = tokenizer.longest().unwrap();
    for text in TEXTS.iter().map(|text| text.repeat(20)).chain([END_OF_TEXT.repeat(9)]) {
        assert!(tokenizer.encode(&text).unwrap().len() >= text.len() / longest, "{text}");
    }
    let shortening = [
        (r#""normalizer":null"#, r#""normalizer":{"type":"Strip","strip_left":true,"strip_right":true}"#),
        (r#""unk_token":null"#, r#""unk_token":"a""#),
    ];
    let json = String::from_utf8(tokenizer.json).unwrap();
    for (from, to) in shortening {
        let changed = json.replace(from, to);
        assert_ne!(changed, json);
        let tokenizer = Tokenizer::new(changed.into_bytes(), Path::new("made up"), &[END_OF_TEXT]).unwrap();
        assert_eq!(tokenizer.longest(), None, "{to}");
    }
}

#[test]
fn text_that_spells_a_special_token_stays_text() {
    let tokenizer = train(290);
    let tokens = tokenizer.encode("a<|endoftext|>b").unwrap();
    assert!(!tokens.contains(&tokenizer.eot()));
    assert_eq!(tokenizer.decode(&tokens).unwrap(), "a<|endoftext|>b");
    assert_eq!(tokenizer.decode(&[tokenizer.eot()]).unwrap(), END_OF_TEXT);
}

#[test]
fn a_saved_tokenizer_is_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let tokenizer = train(290);
    tokenizer.save(&path).unwrap();
    let loaded = Tokenizer::load(&path).unwrap();
    assert_eq!(loaded.hash(), tokenizer.hash());
    assert_eq!(loaded.encode(TEXTS[1]).unwrap(), tokenizer.encode(TEXTS[1]).unwrap());
    let again = dir.path().join("again.json");
    loaded.save(&again).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), std::fs::read(again).unwrap());
}

#[test]
fn a_foreign_tokenizer_finds_its_end_of_text() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let json = String::from_utf8(train(290).json).unwrap();
    // Not special in the file, with truncation on, and ids with a hole.
    let json = json
        .replace(END_OF_TEXT, "</s>")
        .replace("\"special\":true", "\"special\":false")
        .replace(
            "\"truncation\":null",
            "\"truncation\":{\"direction\":\"Right\",\"max_length\":2,\"strategy\":\"LongestFirst\",\"stride\":0}",
        );
    std::fs::write(&path, json.replace("\":289", "\":400")).unwrap();
    let tokenizer = Tokenizer::load(&path).unwrap();
    assert_eq!((tokenizer.eot(), tokenizer.vocab_size()), (0, 401));
    let tokens = tokenizer.encode("a</s>b and more").unwrap();
    assert!(!tokens.contains(&0) && tokens.len() > 2);

    std::fs::write(&path, json.replace("</s>", "<stop>")).unwrap();
    let error = Tokenizer::load(&path).err().unwrap().to_string();
    let wanted = format!("tokenizer.json: no end-of-text token, looked for {}", END_OF_TEXT_NAMES.join(", "));
    assert!(error.ends_with(&wanted), "{error}");
}

/// A tokenizer of the trained kind with more added tokens (spelling, id, whether special), and `before` put before
/// every text.
fn with_added(added: &[(&str, u32, bool)], before: Option<&str>) -> Tokenizer {
    let mut json: serde_json::Value = serde_json::from_slice(&train(290).json).unwrap();
    let tokens = json["added_tokens"].as_array_mut().unwrap();
    for &(content, id, special) in added {
        tokens.push(serde_json::json!({
            "id": id, "content": content, "special": special,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        }));
    }
    if let Some(name) = before {
        let id = added.iter().find(|(content, ..)| *content == name).unwrap().1;
        let token = serde_json::json!({"SpecialToken": {"id": name, "type_id": 0}});
        let text = serde_json::json!({"Sequence": {"id": "A", "type_id": 0}});
        json["post_processor"] = serde_json::json!({
            "type": "TemplateProcessing", "single": [token, text], "pair": [token, text, text],
            "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]}},
        });
    }
    Tokenizer::new(json.to_string().into_bytes(), Path::new("made up"), &END_OF_TEXT_NAMES[1..]).unwrap()
}

#[test]
fn a_file_says_what_begins_and_ends_texts() {
    let plain = train(290);
    assert_eq!((plain.bos(), plain.begin(), plain.ends()), (None, 0, &[0][..]));
    // As Gemma has them: what others end a text with strikes it through, and one token is for images alone.
    let added = [
        ("</s>", 290, false),
        ("<eos>", 291, true),
        ("<bos>", 292, true),
        ("<end_of_turn>", 293, true),
        ("<image>", 294, true),
    ];
    let tokenizer = with_added(&added, Some("<bos>"));
    assert_eq!((tokenizer.eot(), tokenizer.bos(), tokenizer.begin()), (291, Some(292), 292));
    assert_eq!(tokenizer.ends(), [291, 293]);
    assert_eq!((tokenizer.vocab_size(), tokenizer.n_needed()), (295, 293));
    assert!(tokenizer.is_special(293) && !tokenizer.is_special(290));
    // Text is text, and a template's tokens are tokens.
    let text = "<bos>a cat<end_of_turn>";
    assert!(tokenizer.encode(text).unwrap().iter().all(|&token| token < 290));
    let cat = tokenizer.encode("a cat").unwrap();
    assert_eq!(tokenizer.encode_marked(text).unwrap(), [&[292], &cat[..], &[293]].concat());
    // A text's beginning that is its end as well is none of its own.
    assert_eq!(with_added(&[("</s>", 290, true)], Some("</s>")).bos(), None);
}

#[test]
fn text_behind_a_token_keeps_its_space() {
    let mut json: serde_json::Value = serde_json::from_slice(&train(290).json).unwrap();
    json["decoder"] = serde_json::json!({"type": "Sequence", "decoders": [
        json["decoder"], {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]});
    let stripping =
        Tokenizer::new(json.to_string().into_bytes(), Path::new("made up"), &[END_OF_TEXT]).unwrap();
    for tokenizer in [train(290), stripping] {
        let (last, tokens) = (tokenizer.encode("mat").unwrap(), tokenizer.encode(" the cat").unwrap());
        assert_eq!(tokenizer.decode_behind(last.last().copied(), &tokens).unwrap(), " the cat");
        let mut stream = crate::TextStream::behind(&tokenizer, last.last().copied()).unwrap();
        let mut text = String::new();
        tokens.iter().for_each(|&token| text += &stream.push(&tokenizer, token).unwrap());
        assert_eq!(text + &stream.finish(&tokenizer).unwrap(), " the cat");
    }
}

#[test]
fn damaged_files_and_foreign_ids_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    assert!(matches!(Tokenizer::load(&path), Err(Error::Io { .. })));
    std::fs::write(&path, "{").unwrap();
    assert!(matches!(Tokenizer::load(&path), Err(Error::Tokenizer { .. })));
    let error = train(290).decode(&[5, 300]).unwrap_err().to_string();
    assert_eq!(error, "decoding: token 300 at 1 is not below the vocabulary size 290");
}
