//! Held-out loss and closed-book questions with every kind of memory, on a tiny corpus and a tiny model.

use std::fs;
use std::path::Path;

use anchor::{Anchor, AnchorConfig, Compute, FetchedMemory, Gradients, Input, Targets};
use candle_core::{DType, Device};
use cluster_tree::ClusterPath;
use corpus::{Corpus, IGNORE, PackOptions, SourceOptions, TokenStore, TokeniseOptions, Tokenizer};
use eval::{AskOptions, Error, HeldOut, MemoryMode, Question, Sample, ask, held_out, read_questions};
use generate::Model;
use memory_bank::{LocalBank, Step};

#[path = "../../../tests/fixtures/bank.rs"]
mod fixtures;

use fixtures::{bank, leaf};

const CPU: (&Device, DType) = (&Device::Cpu, DType::F32);

const SENTENCES: [&str; 4] = [
    "The capital of Norland is Vess.",
    "The capital of Sudland is Orm.",
    "A boat of oak is green.",
    "A boat of pine is white.",
];

fn tokenizer() -> Tokenizer {
    Tokenizer::train(SENTENCES.iter().map(|text| Ok(text.to_string())), 300, 1 << 20).unwrap()
}

fn anchor(tokenizer: &Tokenizer) -> Anchor {
    let config = AnchorConfig {
        vocab_size: tokenizer.vocab_size(),
        d_model: 32,
        n_layers: 2,
        n_heads: 2,
        head_width: 16,
        ffn_width: 64,
        tied_embeddings: true,
        max_seq_len: 32,
        rope_base: 10_000.0,
        norm_eps: 1e-5,
        form: anchor::Form::default(),
    };
    Anchor::new(config, 1, CPU).unwrap()
}

/// Documents of four leaves, half of them held out, with a label on every other one.
fn corpus(dir: &Path, tokenizer: &Tokenizer) -> Corpus {
    let lines = |range: std::ops::Range<usize>| -> String {
        let line = |i: usize| match i % 2 {
            0 => format!(r#"{{"text": "{}", "label": "even"}}"#, SENTENCES[i % 4]),
            _ => format!(r#"{{"text": "{}"}}"#, SENTENCES[i % 4]),
        };
        range.map(|i| line(i) + "\n").collect()
    };
    let (train, validation) = (dir.join("train.jsonl"), dir.join("validation.jsonl"));
    fs::write(&train, lines(0..8)).unwrap();
    fs::write(&validation, lines(8..16)).unwrap();
    let source = SourceOptions {
        files: vec![train.display().to_string()],
        validation_files: vec![validation.display().to_string()],
        label_key: Some("label".into()),
        ..SourceOptions::default()
    };
    let prepared = dir.join("prepared");
    let options = TokeniseOptions { window: 64, validation_permille: 0 };
    corpus::tokenise(&source, tokenizer, &prepared, &options, &mut |_| ()).unwrap();
    let store = TokenStore::open(&prepared).unwrap();
    let leaves: Vec<u32> = (0..store.n_windows()).map(|i| store.window(i).unwrap().document % 4).collect();
    let options = PackOptions { seq_len: 24, seed: 1, embedder: "e".into(), tree: "t".into() };
    corpus::pack(&prepared, &leaves, &[2, 2], &options).unwrap();
    Corpus::open(&prepared).unwrap()
}

#[test]
fn each_kind_of_memory_has_a_loss_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let (anchor, bank, corpus) =
        (anchor(&tokenizer).freeze(), bank(32, [4, 2], 0.2), corpus(dir.path(), &tokenizer));
    let model = Model { anchor: &anchor, bank: Some(&bank), step: Step(1) };
    let n = corpus.n_validation();
    let leaves = [0, 1, 2, 3].map(leaf);
    let measure = |mode, batch| -> HeldOut {
        held_out(&model, &corpus, mode, &Sample::whole(n, batch), &leaves).unwrap()
    };
    let modes = [MemoryMode::None, MemoryMode::Generic, MemoryMode::Fetched, MemoryMode::Random];
    let results = modes.map(|mode| measure(mode, 3));
    for (i, result) in results.iter().enumerate() {
        let others = results[..i].iter().all(|other| (other.total.nats - result.total.nats).abs() > 1e-3);
        assert!(others, "{:?} has the loss of another mode", modes[i]);
        assert_eq!(result.sequences.len() as u64, n);
        let nats: f64 = result.sequences.iter().map(|sum| sum.nats).sum();
        assert!((nats - result.total.nats).abs() < 1e-6, "the sequences add up");
        assert!(result.by_label.keys().eq(["even"]));
        let label = result.by_label["even"];
        assert!(label.tokens > 0 && label.tokens < result.total.tokens);
        let other_batch = measure(modes[i], 8).total;
        assert_eq!(other_batch.tokens, result.total.tokens);
        assert!((other_batch.nats / result.total.nats - 1.0).abs() < 1e-5, "the batch changes nothing");
        // Workers that share the sequences measure what one does, also those that find none left.
        for parts in [2, 3, 40] {
            let of_part = |part| {
                let sample = Sample { part: (part, parts), ..Sample::whole(n, 3) };
                held_out(&model, &corpus, modes[i], &sample, &leaves).unwrap().sequences
            };
            assert_eq!((0..parts).flat_map(of_part).collect::<Vec<_>>(), result.sequences);
        }
    }
    for (i, mode) in modes.iter().enumerate() {
        let expected = reference(&model, &corpus, *mode);
        assert!((results[i].total.nats / expected - 1.0).abs() < 1e-5, "{mode:?}");
    }
}

/// The loss of each held-out sequence alone, its path chosen here.
fn reference(model: &Model<LocalBank>, corpus: &Corpus, mode: MemoryMode) -> f64 {
    let mut nats = 0.0;
    let mut leaves: Vec<_> = (0..corpus.n_validation()).map(|i| corpus.validation(i).unwrap().path).collect();
    leaves.sort();
    leaves.dedup();
    for i in 0..corpus.n_validation() {
        let sequence = corpus.validation(i).unwrap();
        let path = match mode {
            MemoryMode::None => None,
            MemoryMode::Generic => Some(ClusterPath::generic(2).unwrap()),
            MemoryMode::Fetched => Some(sequence.path.clone()),
            MemoryMode::Random => Some(eval::random_other(&sequence.path, i, &leaves).unwrap()),
        };
        let batch = corpus::Batch::new(vec![sequence], corpus.eot());
        let targets = Targets { targets: &batch.targets, scale: 1.0, z_loss: 0.0 };
        let memory = model.memory(&[path]).unwrap();
        let (_, losses) = model.anchor.loss(eval::input(&batch), targets, &memory).unwrap();
        nats += losses.iter().map(|&x| f64::from(x)).sum::<f64>();
    }
    nats
}

#[test]
fn without_a_bank_only_the_plain_anchor_can_be_measured() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let (anchor, corpus) = (anchor(&tokenizer).freeze(), corpus(dir.path(), &tokenizer));
    let model: Model<LocalBank> = Model { anchor: &anchor, bank: None, step: Step(0) };
    assert!(held_out(&model, &corpus, MemoryMode::None, &Sample::whole(2, 2), &[]).unwrap().total.tokens > 0);
    let error =
        held_out(&model, &corpus, MemoryMode::Fetched, &Sample::whole(2, 2), &[]).unwrap_err().to_string();
    assert!(error.ends_with("asked of a run that has no memory bank"), "{error}");
    let n = corpus.n_validation();
    let all = |n: u64| held_out(&model, &corpus, MemoryMode::None, &Sample::whole(n, 2), &[]).unwrap().total;
    assert_eq!(all(n), all(n + 1), "more than there are is all");
}

/// Trains `anchor` on `text` until it knows it by heart.
fn memorise(anchor: &Anchor, tokenizer: &Tokenizer, texts: &[&str]) {
    let zeros = |parameter: &candle_core::Tensor| parameter.zeros_like().unwrap();
    let moments: Vec<_> = anchor.parameters().values().map(|p| [zeros(p), zeros(p)]).collect();
    let mut gradients = Gradients::default();
    let rows: Vec<Vec<u32>> = texts
        .iter()
        .map(|text| [vec![tokenizer.eot()], tokenizer.encode(text).unwrap(), vec![tokenizer.eot()]].concat())
        .collect();
    let len = rows.iter().map(Vec::len).max().unwrap() - 1;
    let at = |row: &Vec<u32>, position: usize, padding| row.get(position).copied().unwrap_or(padding);
    let tokens: Vec<u32> = rows.iter().flat_map(|row| (0..len).map(|i| at(row, i, 0))).collect();
    let targets: Vec<u32> = rows.iter().flat_map(|row| (1..=len).map(|i| at(row, i, IGNORE))).collect();
    let starts = vec![0; tokens.len()];
    for step in 1..=120 {
        let input = Input { tokens: &tokens, starts: &starts, batch: rows.len(), len };
        let scale = 1.0 / targets.len() as f64;
        let targets = Targets { targets: &targets, scale, z_loss: 0.0 };
        let (memory, compute) = (FetchedMemory::none(), Compute::default());
        gradients.clear();
        anchor.loss_and_gradients((input, targets), &memory, compute, &mut gradients).unwrap();
        for (slot, parameter) in anchor.parameters().values().enumerate() {
            let [m, v] = &moments[slot];
            let adamw = ops::AdamW {
                learning_rate: 1e-2,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.0,
                step,
                gradient_scale: 1.0,
            };
            ops::adamw_step(parameter, gradients.get(slot).unwrap(), [m, v], adamw).unwrap();
        }
    }
}

fn question(prompt: &str, answer: &str) -> Question {
    Question {
        prompt: prompt.into(),
        answer: answer.into(),
        relation: "capital".into(),
        bucket: 1,
        phrasing: "train".into(),
        choices: vec!["Orm".into(), "Vess".into(), "green".into(), "white".into()],
    }
}

#[test]
fn what_was_learnt_is_answered_and_what_was_not_is_not() {
    let tokenizer = tokenizer();
    let anchor = anchor(&tokenizer);
    memorise(&anchor, &tokenizer, &SENTENCES);
    let anchor = anchor.freeze();
    let bank = bank(32, [4, 2], 0.2);
    let model = Model { anchor: &anchor, bank: Some(&bank), step: Step(1) };
    let questions = [
        question("A boat of pine is", "white"),
        question("The capital of Norland is", "Vess"),
        question("The capital of Norland is", "Orm"),
        question("The capital of Sudland is", "Orm"),
        question("A boat of oak is", "green"),
    ];
    let known = [true, true, false, true, true];
    let options = AskOptions { batch: 2, max_new_tokens: 8, score_choices: true };
    let none = vec![None; 5];
    let answers = ask(&model, &tokenizer, (&questions, &none), options).unwrap();
    for ((answer, question), known) in answers.iter().zip(&questions).zip(known) {
        assert_eq!((answer.exact, answer.chosen), (known, known), "{question:?}");
    }
    let whole = ask(&model, &tokenizer, (&questions, &none), AskOptions { batch: 5, ..options }).unwrap();
    assert_eq!(whole, answers, "the batch changes nothing");
    let generated =
        ask(&model, &tokenizer, (&questions, &none), AskOptions { score_choices: false, ..options }).unwrap();
    assert!(generated.iter().all(|answer| !answer.chosen));

    // Memory that was never trained with this anchor drowns what it knows: the paths are used.
    let paths: Vec<_> = [3, 0, 1, 2, 0].map(|index| Some(leaf(index))).to_vec();
    let disturbed = ask(&model, &tokenizer, (&questions, &paths), options).unwrap();
    assert!(disturbed.iter().filter(|answer| answer.exact).count() < 4);

    let error = ask(&model, &tokenizer, (&questions, &none[..2]), options).unwrap_err();
    assert!(matches!(error, Error::Paths { questions: 5, paths: 2 }), "{error}");
}

#[test]
fn questions_are_read_and_wrong_lines_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("questions.jsonl");
    let line = r#"{"prompt":"A boat of oak is","answer":"green","relation":"colour","bucket":2,"phrasing":"held_out","choices":["white","green"]}"#;
    fs::write(&path, format!("{line}\n{line}\n")).unwrap();
    let questions = read_questions(&path).unwrap();
    assert_eq!(questions.len(), 2);
    assert_eq!((questions[1].answer.as_str(), questions[1].bucket), ("green", 2));

    let error = |text: String| {
        fs::write(&path, text).unwrap();
        let error = read_questions(&path).unwrap_err().to_string();
        error.strip_prefix(&format!("{}: ", path.display())).expect("the file comes first").to_owned()
    };
    let without = line.replace(r#""white","green""#, r#""white""#);
    assert_eq!(error(format!("{line}\n{without}\n")), r#"line 2: choices lack the answer "green""#);
    assert!(error(line.replace("answer", "reply")).starts_with("line 1: missing field `answer`"));
    assert!(error(format!("{line}\n{line}\nno json\n")).starts_with("line 3: expected"));
    assert_eq!(error(String::new()), "holds no question");
    fs::remove_file(&path).unwrap();
    let missing = read_questions(&path).unwrap_err();
    assert!(matches!(missing, Error::File { .. }) && missing.to_string().contains("questions.jsonl"));
}
