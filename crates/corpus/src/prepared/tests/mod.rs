//! The stages and the reader on small corpora, compared number by number.

mod errors;

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::corpus::{Corpus, Sequence};
use super::files::lock;
use super::fingerprint::Fingerprint;
use super::pack::{PackOptions, PackSummary, pack};
use super::stages::{finish_stage, stage_is_current};
use super::tokenise::{Job, TokeniseOptions, TokeniseProgress, TokeniseSummary, id_hash, run, tokenise};
use super::tokens::{TokenStore, is_validation};
use crate::source::{SourceOptions, TxtSplit};
use crate::tokenizer::Tokenizer;
use crate::{Batch, Error, Result};

const N_DOCUMENTS: usize = 300;
const BRANCHING: [usize; 2] = [3, 4];
const TOKENISE: TokeniseOptions = TokeniseOptions { window: 16, validation_permille: 100 };

fn text(index: usize) -> String {
    let words = ["anchor", "memory", "leaf", "token", "cluster", "bank", "block"];
    // One of each kind: shorter than a window, of several windows.
    let n = 1 + index * 7 % 40;
    (0..n).map(|i| format!("{} {} ", words[(index + i * i) % words.len()], index * i)).collect()
}

fn line(index: usize) -> String {
    let label = if index.is_multiple_of(2) { "even" } else { "odd" };
    serde_json::json!({"id": format!("doc {index}"), "label": label, "text": text(index)}).to_string() + "\n"
}

fn tokenizer() -> Tokenizer {
    Tokenizer::train((0..50).map(|index| Ok(text(index))), 300, 1 << 20).unwrap()
}

/// A folder with source files, each of the documents `first..end`.
fn source(ranges: &[(usize, usize)]) -> (TempDir, SourceOptions) {
    let dir = tempfile::tempdir().unwrap();
    for (index, &(first, end)) in ranges.iter().enumerate() {
        let content: String = (first..end).map(line).collect();
        fs::write(dir.path().join(format!("{index}.jsonl")), content).unwrap();
    }
    let options = SourceOptions {
        files: vec![dir.path().to_str().unwrap().to_owned()],
        id_key: Some("id".to_owned()),
        label_key: Some("label".to_owned()),
        ..SourceOptions::default()
    };
    (dir, options)
}

fn quiet(_: TokeniseProgress) {}

fn pack_options() -> PackOptions {
    PackOptions { seq_len: 24, seed: 7, embedder: "embedder".to_owned(), tree: "tree".to_owned() }
}

fn leaves(store: &TokenStore) -> Vec<u32> {
    (0..store.n_windows()).map(|window| (window as u32).wrapping_mul(2_654_435_761) % 11).collect()
}

/// A folder prepared from `ranges`.
fn prepared(ranges: &[(usize, usize)]) -> (TempDir, TokeniseSummary, PackSummary) {
    let (_files, source) = source(ranges);
    let dir = tempfile::tempdir().unwrap();
    let tokens = tokenise(&source, &tokenizer(), dir.path(), &TOKENISE, &mut quiet).unwrap();
    let store = TokenStore::open(dir.path()).unwrap();
    let packed = pack(dir.path(), &leaves(&store), &BRANCHING, &pack_options()).unwrap();
    (dir, tokens, packed)
}

/// The files of a folder by name, less the lock.
fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let read = |path: PathBuf| (path.file_name().unwrap().into(), fs::read(&path).unwrap());
    paths.filter(|path| !path.ends_with(".lock")).map(read).collect()
}

#[test]
fn tokens_are_those_of_the_documents() {
    let (dir, summary, _) = prepared(&[(0, 100), (100, N_DOCUMENTS)]);
    let (store, tokenizer) = (TokenStore::open(dir.path()).unwrap(), tokenizer());
    assert_eq!(store.n_documents(), N_DOCUMENTS);
    assert_eq!((summary.n_documents, summary.n_files, summary.n_empty), (300, 2, 0));
    let mut documents = vec![Vec::new(); N_DOCUMENTS];
    for index in 0..store.n_windows() {
        let window = store.window(index).unwrap();
        let tokens = store.window_tokens(index).unwrap();
        assert_eq!(tokens.len(), window.len as usize);
        assert!((1..=TOKENISE.window).contains(&window.len));
        let document = &mut documents[window.document as usize];
        assert_eq!(store.begins_document(&window).unwrap(), document.is_empty());
        document.extend(tokens);
    }
    let mut n_tokens = 0;
    for (index, tokens) in documents.iter().enumerate() {
        assert_eq!(*tokens, tokenizer.encode(&text(index)).unwrap());
        let label = if index.is_multiple_of(2) { "even" } else { "odd" };
        assert_eq!(store.label(index as u32).unwrap(), Some(label));
        n_tokens += tokens.len() as u64;
    }
    assert_eq!((store.n_tokens(), summary.n_tokens), (n_tokens, n_tokens));
    assert_eq!(summary.n_windows, store.n_windows() as u64);
    assert_eq!(store.labels(), ["even", "odd"]);
    assert_eq!((store.vocab_size(), store.eot()), (300, 0));
    store.check_tokenizer(&tokenizer).unwrap();
}

#[test]
fn a_large_vocabulary_takes_four_bytes_a_token() {
    let (_files, source) = source(&[(0, 20)]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    tokenizer().save(&path).unwrap();
    let json = fs::read_to_string(&path).unwrap();
    let id = tokenizer().encode(" memory").unwrap();
    assert_eq!(id.len(), 1, "the word must be one token");
    fs::write(&path, json.replace(&format!(":{},", id[0]), ":70000,")).unwrap();
    let tokenizer = Tokenizer::load(&path).unwrap();
    assert_eq!(tokenizer.vocab_size(), 70_001);

    let out = dir.path().join("prepared");
    let summary = tokenise(&source, &tokenizer, &out, &TOKENISE, &mut quiet).unwrap();
    assert_eq!(fs::metadata(out.join("tokens.bin")).unwrap().len(), 4 * summary.n_tokens);
    let store = TokenStore::open(&out).unwrap();
    let mut all = Vec::new();
    (0..store.n_windows()).for_each(|index| all.extend(store.window_tokens(index).unwrap()));
    let expected: Vec<u32> = (0..20).flat_map(|index| tokenizer.encode(&text(index)).unwrap()).collect();
    assert!(all.contains(&70_000));
    assert_eq!(all, expected);
}

/// The stream of each leaf, put together from its sequences in packing order.
fn streams(sequences: &[Sequence], seq_len: usize) -> BTreeMap<String, Vec<u32>> {
    let mut streams: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    for sequence in sequences {
        assert!((2..=seq_len + 1).contains(&sequence.tokens.len()));
        let stream = streams.entry(sequence.path.to_string()).or_default();
        if stream.is_empty() {
            stream.push(sequence.tokens[0]);
        }
        // Full sequences overlap in one token, which is an input of one and a target of the other.
        assert_eq!(stream.last(), sequence.tokens.first());
        stream.extend(&sequence.tokens[1..]);
    }
    streams
}

/// What the windows of each leaf hold, sorted, with an end-of-text token before first windows.
fn expected_tokens(store: &TokenStore, validation: bool) -> BTreeMap<String, Vec<u32>> {
    let mut expected: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    for (index, leaf) in leaves(store).into_iter().enumerate() {
        let window = store.window(index).unwrap();
        if store.is_validation(window.document).unwrap() == validation {
            let tokens = expected.entry(format!("{}/{leaf}", leaf / 4)).or_default();
            if store.begins_document(&window).unwrap() {
                tokens.push(store.eot());
            }
            tokens.extend(store.window_tokens(index).unwrap());
        }
    }
    expected.values_mut().for_each(|tokens| tokens.sort_unstable());
    expected
}

#[test]
fn packing_makes_each_token_a_target_once() {
    let (dir, _, summary) = prepared(&[(0, N_DOCUMENTS)]);
    let (store, corpus) = (TokenStore::open(dir.path()).unwrap(), Corpus::open(dir.path()).unwrap());
    let train: Vec<_> =
        (0..corpus.n_sequences()).map(|index| corpus.assemble_train(index).unwrap()).collect();
    let validation: Vec<_> =
        (0..corpus.n_validation()).map(|index| corpus.validation(index).unwrap()).collect();
    for (set, is_validation) in [(&train, false), (&validation, true)] {
        let mut streams = streams(set, corpus.seq_len());
        streams.values_mut().for_each(|tokens| tokens.sort_unstable());
        assert_eq!(streams, expected_tokens(&store, is_validation));
    }
    let n_targets: u64 = train.iter().map(|sequence| sequence.tokens.len() as u64 - 1).sum();
    let n_stream = expected_tokens(&store, false).values().map(Vec::len).sum::<usize>() as u64;
    assert_eq!(n_targets, n_stream - summary.n_used_leaves);
    assert_eq!((summary.n_train_tokens, corpus.n_train_tokens()), (n_targets, n_targets));
    assert_eq!((summary.n_sequences, summary.n_validation), (corpus.n_sequences(), corpus.n_validation()));
    assert_eq!((summary.n_leaves, summary.n_used_leaves), (12, 11));
    assert!(train.iter().any(|sequence| sequence.tokens.len() < corpus.seq_len() + 1));
}

#[test]
fn pieces_are_marked_with_their_documents() {
    let (dir, ..) = prepared(&[(0, N_DOCUMENTS)]);
    let corpus = Corpus::open(dir.path()).unwrap();
    let texts: Vec<Vec<u32>> =
        (0..N_DOCUMENTS).map(|index| tokenizer().encode(&text(index)).unwrap()).collect();
    let (mut n_begin, mut n_continued) = (0, 0);
    for index in 0..corpus.n_sequences() {
        let sequence = corpus.sequence(1, index).unwrap();
        assert_eq!(sequence.doc_starts[0], 0);
        assert_eq!(sequence.doc_starts.len(), sequence.documents.len());
        assert!(sequence.doc_starts.is_sorted_by(|a, b| a < b));
        let ends = sequence.doc_starts[1..].iter().copied().chain([sequence.tokens.len() as u32]);
        for ((&start, end), &document) in sequence.doc_starts.iter().zip(ends).zip(&sequence.documents) {
            let piece = &sequence.tokens[start as usize..end as usize];
            let own = &texts[document as usize];
            match piece.strip_prefix(&[corpus.eot()]) {
                Some(rest) => {
                    n_begin += 1;
                    assert!(own.starts_with(rest));
                }
                None => {
                    n_continued += 1;
                    assert!(own.windows(piece.len()).any(|window| window == piece));
                }
            }
            assert!(!is_validation(id_hash(&format!("doc {document}")), TOKENISE.validation_permille));
            let label = if document.is_multiple_of(2) { "even" } else { "odd" };
            assert_eq!(corpus.label(document).unwrap(), Some(label));
        }
    }
    assert!(n_begin > 100 && n_continued > 100);
}

#[test]
fn windows_and_sequences_begin_as_the_tokenizer_begins_texts() {
    let (_files, source) = source(&[(0, N_DOCUMENTS)]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    tokenizer().save(&path).unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let token = serde_json::json!({"SpecialToken": {"id": "!", "type_id": 0}});
    let text = serde_json::json!({"Sequence": {"id": "A", "type_id": 0}});
    json["post_processor"] = serde_json::json!({
        "type": "TemplateProcessing", "single": [token, text], "pair": [token, text, text],
        "special_tokens": {"!": {"id": "!", "ids": [1], "tokens": ["!"]}},
    });
    fs::write(&path, json.to_string()).unwrap();
    let tokenizer = Tokenizer::load(&path).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eot()), (Some(1), 0));
    let out = dir.path().join("prepared");
    let made = tokenise(&source, &tokenizer, &out, &TOKENISE, &mut quiet).unwrap();
    let store = TokenStore::open(&out).unwrap();
    pack(&out, &leaves(&store), &BRANCHING, &pack_options()).unwrap();
    let corpus = Corpus::open(&out).unwrap();
    let mut n_pieces = 0;
    let mut targets = 0;
    for index in 0..corpus.n_sequences() {
        let sequence = corpus.sequence(1, index).unwrap();
        for (i, &start) in sequence.doc_starts.iter().enumerate() {
            assert_eq!(sequence.tokens[start as usize], 1, "sequence {index}, piece {i}");
            n_pieces += 1;
        }
        assert!(!sequence.tokens.contains(&corpus.eot()));
        let batch = Batch::new(vec![sequence], corpus.eot());
        // What begins a text is not predicted by what stands before it.
        assert!(!batch.targets.contains(&1));
        targets += batch.n_scored();
    }
    assert!(n_pieces > 300, "{n_pieces}");
    let held_out: usize = (0..corpus.n_validation())
        .map(|index| Batch::new(vec![corpus.validation(index).unwrap()], corpus.eot()).n_scored())
        .sum();
    // Behind a beginning every token of every window is a target once.
    assert_eq!((targets + held_out) as u64, made.n_tokens);
}

#[test]
fn sequences_are_pure_and_each_epoch_is_a_permutation() {
    let (dir, ..) = prepared(&[(0, N_DOCUMENTS)]);
    let (one, two) = (Corpus::open(dir.path()).unwrap(), Corpus::open(dir.path()).unwrap());
    let n = one.n_sequences();
    let epoch = |seed, epoch: u64| -> Vec<Sequence> {
        (0..n).map(|index| one.sequence(seed, epoch * n + index).unwrap()).collect()
    };
    let key = |sequence: &Sequence| (sequence.path.to_string(), sequence.tokens.clone());
    let sorted = |mut sequences: Vec<Sequence>| {
        sequences.sort_by_key(key);
        sequences
    };
    let orders = [epoch(1, 0), epoch(1, 1), epoch(2, 0)];
    assert_eq!(orders[0], epoch(1, 0));
    for index in (0..n).rev() {
        assert_eq!(two.sequence(1, n + index).unwrap(), orders[1][index as usize]);
    }
    let packed: Vec<_> = (0..n).map(|index| one.assemble_train(index).unwrap()).collect();
    for (index, order) in orders.iter().enumerate() {
        assert!(orders[..index].iter().all(|other| other != order));
        assert_ne!(*order, packed);
        assert_eq!(sorted(order.clone()), sorted(packed.clone()));
    }
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let (_files, source) = source(&[(0, N_DOCUMENTS)]);
    let prepare = |n_threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
        pool.install(|| {
            let dir = tempfile::tempdir().unwrap();
            tokenise(&source, &tokenizer(), dir.path(), &TOKENISE, &mut quiet).unwrap();
            let store = TokenStore::open(dir.path()).unwrap();
            pack(dir.path(), &leaves(&store), &BRANCHING, &pack_options()).unwrap();
            contents(dir.path())
        })
    };
    let one = prepare(1);
    assert_eq!(one.len(), 8, "{:?}", one.keys());
    assert!(one == prepare(5));
}

#[test]
fn the_order_of_windows_depends_on_the_seed() {
    let (dir, ..) = prepared(&[(0, N_DOCUMENTS)]);
    let before = contents(dir.path());
    let store = TokenStore::open(dir.path()).unwrap();
    pack(dir.path(), &leaves(&store), &BRANCHING, &PackOptions { seed: 8, ..pack_options() }).unwrap();
    let after = contents(dir.path());
    let pieces = |contents: &BTreeMap<PathBuf, Vec<u8>>| contents[Path::new("train.pack")][104..].to_vec();
    assert_ne!(pieces(&before), pieces(&after));
    pack(dir.path(), &leaves(&store), &BRANCHING, &pack_options()).unwrap();
    assert!(contents(dir.path()) == before);
}

#[test]
fn the_division_into_files_does_not_change_the_split() {
    let split = |ranges: &[(usize, usize)]| {
        let (dir, summary, _) = prepared(ranges);
        let store = TokenStore::open(dir.path()).unwrap();
        let mut texts = [Vec::new(), Vec::new()];
        for index in 0..store.n_windows() {
            let document = store.window(index).unwrap().document;
            let set = usize::from(store.is_validation(document).unwrap());
            texts[set].push(store.window_tokens(index).unwrap());
        }
        texts.iter_mut().for_each(|set| set.sort());
        (texts, summary.n_validation_documents)
    };
    let (texts, n_validation) = split(&[(0, N_DOCUMENTS)]);
    assert!((10..60).contains(&n_validation), "{n_validation} of 300 for 100 of 1000");
    assert_eq!(split(&[(200, N_DOCUMENTS), (0, 57), (57, 200)]), (texts, n_validation));
}

#[test]
fn a_killed_run_goes_on_to_the_same_bytes() {
    let (_files, source) = source(&[(0, 80), (80, 90), (90, 200), (200, N_DOCUMENTS)]);
    let (whole, tokenizer) = (tempfile::tempdir().unwrap(), tokenizer());
    tokenise(&source, &tokenizer, whole.path(), &TOKENISE, &mut quiet).unwrap();
    // Killed at every report, with a journal after every file and after some.
    for journal_tokens in [0, 5000] {
        let dir = tempfile::tempdir().unwrap();
        let job = Job {
            source: &source,
            tokenizer: &tokenizer,
            dir: dir.path(),
            options: &TOKENISE,
            journal_tokens,
        };
        let mut begun_at: Vec<usize> = Vec::new();
        for n_reports in 1.. {
            let mut seen = Vec::new();
            let mut stop = |progress: TokeniseProgress| {
                seen.push(progress.n_files_done);
                assert!(seen.len() < n_reports, "killed");
            };
            let killed = catch_unwind(AssertUnwindSafe(|| run(&job, &mut stop)));
            begun_at.extend(seen.first());
            match killed {
                Ok(result) => {
                    result.unwrap();
                    break;
                }
                Err(_) => assert!(matches!(
                    TokenStore::open(dir.path()),
                    Err(Error::NotPrepared { stage: "tokenise", .. })
                )),
            }
        }
        assert!(contents(dir.path()) == contents(whole.path()));
        assert!(*begun_at.last().unwrap() > 1, "began at {begun_at:?}");
    }
}

#[test]
fn a_journal_of_other_inputs_or_without_its_files_is_of_no_use() {
    let (_files, source) = source(&[(0, 80), (80, 160)]);
    let (dir, tokenizer) = (tempfile::tempdir().unwrap(), tokenizer());
    let kill_and_finish = |options: &TokeniseOptions, between: &dyn Fn()| {
        let job = |options| Job {
            source: &source,
            tokenizer: &tokenizer,
            dir: dir.path(),
            options,
            journal_tokens: 0,
        };
        let mut stop = |progress: TokeniseProgress| assert!(progress.n_files_done < 1, "killed");
        catch_unwind(AssertUnwindSafe(|| run(&job(&TOKENISE), &mut stop))).unwrap_err();
        assert!(dir.path().join("tokenise.journal.json").exists());
        between();
        let mut first = None;
        run(&job(options), &mut |progress| first = first.or(Some(progress.n_files_done))).unwrap();
        first.unwrap()
    };
    assert_eq!(kill_and_finish(&TOKENISE, &|| ()), 1);
    assert_eq!(kill_and_finish(&TokeniseOptions { window: 8, ..TOKENISE }, &|| ()), 0);
    let shorten = || {
        let tokens = fs::OpenOptions::new().write(true).open(dir.path().join("tokens.bin.tmp")).unwrap();
        tokens.set_len(10).unwrap();
    };
    assert_eq!(kill_and_finish(&TOKENISE, &shorten), 0);
    assert_eq!(
        kill_and_finish(&TOKENISE, &|| fs::remove_file(dir.path().join("windows.bin.tmp")).unwrap()),
        0
    );
    assert!(!dir.path().join("tokenise.journal.json").exists());
    assert!(TokenStore::open(dir.path()).is_ok());
}

#[test]
fn a_stage_that_runs_again_invalidates_what_follows() {
    let (dir, ..) = prepared(&[(0, 100)]);
    let store = TokenStore::open(dir.path()).unwrap();
    for stage in ["tokenise", "cluster", "pack"] {
        finish_stage(dir.path(), stage, "x").unwrap();
    }
    let current = |stage| stage_is_current(dir.path(), stage, "x").unwrap();
    pack(dir.path(), &leaves(&store), &BRANCHING, &pack_options()).unwrap();
    assert!(current("cluster") && !current("pack"));
    let (_files, source) = source(&[(0, 100)]);
    tokenise(&source, &tokenizer(), dir.path(), &TOKENISE, &mut quiet).unwrap();
    assert!(!current("tokenise") && !current("cluster"));
    assert!(matches!(Corpus::open(dir.path()), Err(Error::NotPrepared { stage: "pack", .. })));
}

#[test]
fn progress_reaches_the_end() {
    let (_files, source) = source(&[(0, 10), (10, 30)]);
    let (dir, mut seen) = (tempfile::tempdir().unwrap(), Vec::new());
    let summary =
        tokenise(&source, &tokenizer(), dir.path(), &TOKENISE, &mut |progress| seen.push(progress)).unwrap();
    let last = *seen.last().unwrap();
    assert_eq!((last.n_files_done, last.n_files, last.bytes_done), (2, 2, last.bytes));
    assert_eq!((last.n_documents, last.n_tokens), (summary.n_documents, summary.n_tokens));
    assert!(seen.is_sorted_by_key(|progress| (progress.n_files_done, progress.n_tokens)));
}

#[test]
fn the_path_is_that_of_the_leaf() {
    let (_files, source) = source(&[(0, 20)]);
    let dir = tempfile::tempdir().unwrap();
    let options = TokeniseOptions { validation_permille: 0, ..TOKENISE };
    tokenise(&source, &tokenizer(), dir.path(), &options, &mut quiet).unwrap();
    let leaves = vec![2 * 20 + 3 * 4 + 1; TokenStore::open(dir.path()).unwrap().n_windows()];
    pack(dir.path(), &leaves, &[3, 5, 4], &pack_options()).unwrap();
    let corpus = Corpus::open(dir.path()).unwrap();
    assert_eq!(corpus.branching(), [3, 5, 4]);
    assert_eq!(corpus.n_validation(), 0);
    assert_eq!(corpus.sequence(0, 0).unwrap().path.to_string(), "2/13/53");
}
