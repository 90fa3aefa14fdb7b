//! Every error of the stages and the reader.

use super::*;

fn tokenise_error(content: &str, options: &TokeniseOptions) -> String {
    let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = dir.path().join("a.txt");
    fs::write(&path, content).unwrap();
    let files = vec![path.to_str().unwrap().to_owned()];
    let source = SourceOptions { files, txt_split: TxtSplit::Line, ..SourceOptions::default() };
    let error = tokenise(&source, &tokenizer(), out.path(), options, &mut quiet).unwrap_err().to_string();
    error.replace(path.to_str().unwrap(), "a.txt")
}

#[test]
fn corpora_and_options_that_make_no_sense_are_errors() {
    assert_eq!(
        tokenise_error(" \n\n", &TOKENISE),
        "no documents in 1 files of a.txt (0 empty documents were skipped)"
    );
    let window = TokeniseOptions { window: 0, ..TOKENISE };
    assert_eq!(tokenise_error("a", &window), "window must be at least 1, found 0");
    let permille = TokeniseOptions { validation_permille: 1001, ..TOKENISE };
    assert_eq!(tokenise_error("a", &permille), "validation_permille must be at most 1000, found 1001");
}

#[test]
fn a_full_disk_is_named() {
    let (_files, source) = source(&[(0, 10)]);
    for name in ["tokens.bin", "documents.bin", "windows.bin"] {
        let dir = tempfile::tempdir().unwrap();
        let temporary = dir.path().join(format!("{name}.tmp"));
        std::os::unix::fs::symlink("/dev/full", &temporary).unwrap();
        let result = tokenise(&source, &tokenizer(), dir.path(), &TOKENISE, &mut quiet);
        let Err(Error::Io { path, source }) = result else { panic!("{result:?}") };
        assert_eq!((path, source.kind()), (temporary, std::io::ErrorKind::StorageFull));
        assert!(TokenStore::open(dir.path()).is_err());
    }
}

#[test]
fn one_process_holds_a_folder_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let held = lock(dir.path()).unwrap();
    assert!(matches!(lock(dir.path()), Err(Error::Locked { .. })));
    drop(held);
    lock(dir.path()).unwrap();
}

#[test]
fn a_tree_of_another_corpus_is_an_error() {
    let (dir, ..) = prepared(&[(0, 20)]);
    let store = TokenStore::open(dir.path()).unwrap();
    let n = store.n_windows();
    let error = |leaves: &[u32], branching: &[usize]| {
        pack(dir.path(), leaves, branching, &pack_options()).unwrap_err().to_string()
    };
    let other =
        format!("expected a leaf for each of {n} windows, found {}: the tree is of another corpus", n - 1);
    assert_eq!(error(&vec![0; n - 1], &BRANCHING), other);
    let mut leaves = vec![0; n];
    leaves[5] = 12;
    assert_eq!(error(&leaves, &BRANCHING), "window 5: leaf 12 is not below the number of leaves 12");
    for branching in [vec![], vec![3, 0], vec![1 << 16, 1 << 16], vec![usize::MAX, 2], vec![1; 256]] {
        assert!(error(&leaves, &branching).starts_with("branching must be "), "{branching:?}");
    }
    let none = PackOptions { seq_len: 0, ..pack_options() };
    assert!(matches!(
        pack(dir.path(), &leaves, &BRANCHING, &none),
        Err(Error::Option { key: "seq_len", .. })
    ));
    Corpus::open(dir.path()).expect("a pack that fails its checks leaves the folder as it was");
}

#[test]
fn a_corpus_without_training_documents_is_an_error() {
    let (_files, source) = source(&[(0, 10)]);
    let dir = tempfile::tempdir().unwrap();
    let options = TokeniseOptions { validation_permille: 1000, ..TOKENISE };
    tokenise(&source, &tokenizer(), dir.path(), &options, &mut quiet).unwrap();
    let leaves = leaves(&TokenStore::open(dir.path()).unwrap());
    let error = pack(dir.path(), &leaves, &BRANCHING, &pack_options()).unwrap_err().to_string();
    assert!(error.ends_with("no training sequence: 10 of 10 documents are validation"), "{error}");
}

#[test]
fn missing_and_truncated_files_are_errors() {
    let (dir, ..) = prepared(&[(0, 100)]);
    let open = || Corpus::open(dir.path()).map(drop);
    for name in ["tokens.bin", "documents.bin", "windows.bin", "train.pack", "validation.pack"] {
        let path = dir.path().join(name);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        let expected = (whole.len() as u64, whole.len() as u64 - 3);
        let Err(Error::Size { path: named, expected: e, found }) = open() else { panic!("{name}") };
        assert_eq!((named, (e, found)), (path.clone(), expected));
        fs::remove_file(&path).unwrap();
        assert!(matches!(open(), Err(Error::Io { .. })), "{name}");
        fs::write(&path, &whole).unwrap();
    }
    let path = dir.path().join("train.pack");
    let whole = fs::read(&path).unwrap();
    for content in [&whole[..50], &[b"x", &whole[1..]].concat()] {
        fs::write(&path, content).unwrap();
        assert!(matches!(open(), Err(Error::WrongFile { .. })));
    }
    fs::write(&path, &whole).unwrap();
    open().unwrap();
    for (name, stage) in
        [("tokens.json", "tokenise"), ("labels.json", "tokenise"), ("fingerprint.json", "pack")]
    {
        let path = dir.path().join(name);
        let whole = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let Err(Error::NotPrepared { path: named, stage: s }) = open() else { panic!("{name}") };
        assert_eq!((named, s), (path.clone(), stage));
        fs::write(&path, whole).unwrap();
    }
}

#[test]
fn files_of_two_corpora_do_not_mix() {
    let ((dir, ..), (other, ..)) = (prepared(&[(0, 100)]), prepared(&[(0, 99)]));
    fs::copy(other.path().join("train.pack"), dir.path().join("train.pack")).unwrap();
    let error = Corpus::open(dir.path()).err().unwrap().to_string();
    assert!(error.contains("train.pack: expected a pack file of corpus "), "{error}");
    let fingerprint = |dir: &TempDir| Fingerprint::load(dir.path()).unwrap();
    let error = fingerprint(&dir).compare(&fingerprint(&other)).unwrap_err().to_string();
    assert!(error.contains("file ") && error.contains("0.jsonl (") && error.contains("sha256:"), "{error}");
    fingerprint(&dir).compare(&fingerprint(&prepared(&[(0, 100)]).0)).unwrap();
}

#[test]
fn another_tokenizer_is_an_error() {
    let (dir, ..) = prepared(&[(0, 20)]);
    let other = Tokenizer::train([Ok(text(1))].into_iter(), 280, 1000).unwrap();
    let corpus = Corpus::open(dir.path()).unwrap();
    corpus.check_tokenizer(&tokenizer()).unwrap();
    let Err(Error::OtherTokenizer { expected, found, .. }) = corpus.check_tokenizer(&other) else { panic!() };
    assert_eq!((expected.as_str(), found.as_str()), (tokenizer().hash(), other.hash()));
    let path = dir.path().join("fingerprint.json");
    let json = fs::read_to_string(&path).unwrap().replace(tokenizer().hash(), other.hash());
    fs::write(&path, json).unwrap();
    assert!(matches!(Corpus::open(dir.path()), Err(Error::OtherTokenizer { .. })));
}

#[test]
fn a_token_outside_the_vocabulary_is_an_error() {
    let (dir, ..) = prepared(&[(0, 20)]);
    let path = dir.path().join("tokens.bin");
    let mut bytes = fs::read(&path).unwrap();
    bytes[2..4].copy_from_slice(&300_u16.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let error = TokenStore::open(dir.path()).unwrap().window_tokens(0).unwrap_err().to_string();
    assert!(error.ends_with("tokens.bin: token 300 at 1 is not below the vocabulary size 300"), "{error}");
    let corpus = Corpus::open(dir.path()).unwrap();
    let all: Result<Vec<_>> = (0..corpus.n_sequences()).map(|index| corpus.sequence(0, index)).collect();
    assert!(matches!(all, Err(Error::OutOfVocabulary { token: 300, position: 1, .. })));
}

#[test]
fn damaged_records_are_errors() {
    let (dir, ..) = prepared(&[(0, 100)]);
    let check = |name: &str, offset: usize| {
        let path = dir.path().join(name);
        let whole = fs::read(&path).unwrap();
        let mut damaged = whole.clone();
        damaged[offset..offset + 4].fill(0xff);
        fs::write(&path, damaged).unwrap();
        let corpus = Corpus::open(dir.path()).unwrap();
        let all: Result<Vec<_>> =
            (0..corpus.n_sequences()).map(|index| corpus.assemble_train(index)).collect();
        let failed = all.and_then(|_| corpus.label(0).map(drop)).is_err();
        fs::write(&path, whole).unwrap();
        failed
    };
    // The first record of a pack: leaf, piece, offset, length.
    for offset in [104, 108, 112, 116] {
        assert!(check("train.pack", offset), "train.pack at {offset}");
    }
    let pieces = fs::metadata(dir.path().join("train.pack")).unwrap().len() as usize - 4;
    assert!(check("train.pack", pieces), "the last piece");
    // Of a window: start, document.
    assert!(check("windows.bin", 4) && check("windows.bin", 8));
}

#[test]
fn indices_past_the_end_are_errors() {
    let (dir, ..) = prepared(&[(0, 20)]);
    let (store, corpus) = (TokenStore::open(dir.path()).unwrap(), Corpus::open(dir.path()).unwrap());
    assert!(matches!(store.window(store.n_windows()), Err(Error::OutOfRange { what: "window", .. })));
    assert!(matches!(store.label(20), Err(Error::OutOfRange { what: "document", index: 20, len: 20 })));
    assert!(matches!(store.is_validation(20), Err(Error::OutOfRange { .. })));
    let n = corpus.n_validation();
    let error = corpus.validation(n).unwrap_err().to_string();
    assert_eq!(error, format!("validation sequence {n} is not below {n}"));
    corpus.sequence(3, u64::MAX).expect("the training order has no end");
}
