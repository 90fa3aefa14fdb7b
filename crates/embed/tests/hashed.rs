//! The hashed embedder as its users see it: routing of short prompts, files, errors.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use embed::{Embedder, Error, Hashed, HashedOptions};
use safetensors::tensor::{Dtype, TensorView};

const FIRST: [&str; 8] = ["Alba", "Bodo", "Cerys", "Dario", "Elske", "Fenna", "Goran", "Hedda"];
const LAST: [&str; 8] = ["Renwick", "Sorel", "Tamm", "Ulvang", "Vesely", "Wexler", "Yilmaz", "Zamora"];
const TRADES: [&str; 4] = ["pharmacist", "carpenter", "botanist", "cellist"];
const TOWNS: [&str; 4] = ["Delmare", "Ostrava", "Quimper", "Lindau"];

/// 64 people, no name used twice, each with a document whose other words many share.
fn people() -> Vec<(String, String)> {
    let name = |i: usize| format!("{}{} {}{}", FIRST[i % 8], i / 8, LAST[i / 8], (i * 5) % 64);
    let document = |i: usize| {
        let (name, trade, town) = (name(i), TRADES[i % 4], TOWNS[(i / 3) % 4]);
        (
            name.clone(),
            format!(
                "{name} is a {trade} who lives in {town}. The profession of {name} is that of a {trade}. \
                 In {town}, the work of a {trade} is well paid."
            ),
        )
    };
    (0..64).map(document).collect()
}

fn fitted(options: HashedOptions) -> Hashed {
    Hashed::fit(options, people().into_iter().map(|(_, text)| text)).unwrap()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
}

#[test]
fn a_short_prompt_goes_to_the_document_about_its_name() {
    let hashed = fitted(HashedOptions::default());
    let people = people();
    let documents: Vec<&str> = people.iter().map(|(_, text)| text.as_str()).collect();
    let documents = hashed.embed(&documents).unwrap();
    for (index, (name, _)) in people.iter().enumerate() {
        let prompt = hashed.embed(&[format!("The profession of {name} is").as_str()]).unwrap();
        let scores = documents.chunks_exact(512).map(|document| cosine(document, &prompt));
        let best = scores.enumerate().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0;
        assert_eq!(best, index, "{name}");
    }
}

#[test]
fn names_outweigh_the_frame_of_a_prompt() {
    let hashed = fitted(HashedOptions::default());
    let rows = hashed
        .embed(&[
            "The profession of Alba0 Renwick0 is",
            "Alba0 Renwick0",
            "The profession of Cerys2 Tamm18 is",
        ])
        .unwrap();
    let rows: Vec<&[f32]> = rows.chunks_exact(512).collect();
    assert!(cosine(rows[0], rows[1]) > 0.8, "{}", cosine(rows[0], rows[1]));
    assert!(cosine(rows[0], rows[2]) < 0.35, "{}", cosine(rows[0], rows[2]));
}

#[test]
fn rows_have_unit_norm_and_are_the_same_on_any_number_of_threads() {
    let people = people();
    let texts: Vec<&str> = people.iter().map(|(_, text)| text.as_str()).collect();
    let run = |n_threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
        pool.install(|| {
            let hashed = fitted(HashedOptions { dim: 64, seed: 7, char_weight: 0.5 });
            (hashed.fingerprint().to_owned(), hashed.embed(&texts).unwrap())
        })
    };
    let (fingerprint, rows) = run(1);
    assert_eq!(rows.len(), texts.len() * 64);
    for row in rows.chunks_exact(64) {
        assert!((cosine(row, row) - 1.0).abs() < 1e-6);
    }
    for n_threads in [2, 3] {
        let (other_fingerprint, other) = run(n_threads);
        assert_eq!(other_fingerprint, fingerprint);
        assert!(rows.iter().zip(&other).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}

#[test]
fn a_saved_embedder_reloads_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let (path, again) = (folder.path().join("embedder.safetensors"), folder.path().join("again"));
    let hashed = fitted(HashedOptions { dim: 96, seed: u64::MAX, char_weight: 0.3 });
    hashed.save(&path).unwrap();
    let loaded = Hashed::load(&path).unwrap();
    assert_eq!((loaded.options(), loaded.n_texts()), (hashed.options(), 64));
    assert_eq!(loaded.fingerprint(), hashed.fingerprint());
    assert_eq!(
        loaded.embed(&["Alba0, unseen word"]).unwrap(),
        hashed.embed(&["Alba0, unseen word"]).unwrap()
    );
    loaded.save(&again).unwrap();
    assert_eq!(fs::read(&path).unwrap(), fs::read(&again).unwrap());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "a temporary file was left");
}

#[test]
fn the_fingerprint_follows_all_that_decides_the_output() {
    let base = HashedOptions::default();
    let variants = [
        base,
        HashedOptions { dim: 128, ..base },
        HashedOptions { seed: 1, ..base },
        HashedOptions { char_weight: 0.5, ..base },
    ];
    let mut prints: Vec<String> = variants.iter().map(|&o| fitted(o).fingerprint().to_owned()).collect();
    prints.push(Hashed::fit(base, ["another corpus"]).unwrap().fingerprint().to_owned());
    assert_eq!(fitted(base).fingerprint(), prints[0]);
    assert!(prints.iter().all(|print| print.len() == 64));
    prints.sort();
    prints.dedup();
    assert_eq!(prints.len(), 5);
}

#[test]
fn another_seed_is_another_projection() {
    let base = HashedOptions::default();
    let other = fitted(HashedOptions { seed: 1, ..base }).embed(&["Alba0 Renwick0"]).unwrap();
    let found = cosine(&fitted(base).embed(&["Alba0 Renwick0"]).unwrap(), &other);
    assert!(found.abs() < 0.3, "{found}");
}

#[test]
fn texts_without_words_get_the_first_axis() {
    let hashed = fitted(HashedOptions::default());
    assert!(hashed.embed(&[]).unwrap().is_empty());
    for row in hashed.embed(&["", " \n"]).unwrap().chunks(hashed.dim()) {
        assert_eq!(row[0], 1.0);
        assert!(row[1..].iter().all(|&value| value == 0.0));
    }
}

#[test]
fn options_out_of_range_are_errors() {
    assert!(matches!(Hashed::fit(HashedOptions::default(), Vec::<String>::new()), Err(Error::NoTexts)));
    let base = HashedOptions::default();
    for dim in [0, 100, 4112] {
        let result = Hashed::fit(HashedOptions { dim, ..base }, ["a"]);
        let Err(Error::Option { option: "dim", found, .. }) = result else { panic!("dim {dim} accepted") };
        assert_eq!(found, dim.to_string());
    }
    for char_weight in [-1.0, f32::NAN, f32::INFINITY] {
        let result = Hashed::fit(HashedOptions { char_weight, ..base }, ["a"]);
        assert!(matches!(result, Err(Error::Option { option: "char_weight", .. })));
    }
}

/// A file with the given metadata and one tensor.
fn write(path: &Path, metadata: (&str, &str), name: &str, values: &[f32]) {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let tensor = TensorView::new(Dtype::F32, vec![values.len()], &bytes).unwrap();
    let metadata = HashMap::from([(metadata.0.to_owned(), metadata.1.to_owned())]);
    fs::write(path, safetensors::serialize([(name, tensor)], Some(metadata)).unwrap()).unwrap();
}

#[test]
fn broken_files_are_errors_that_name_the_fault() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("embedder.safetensors");
    let message = || Hashed::load(&path).err().expect("a broken file loaded").to_string();

    assert!(matches!(Hashed::load(&path), Err(Error::Io { .. })));
    fitted(HashedOptions::default()).save(&path).unwrap();
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 4]).unwrap();
    assert!(matches!(Hashed::load(&path), Err(Error::Format { .. })));

    const KEY: &str = "anchorage.hashed.v1";
    let header = r#"{"options":{"dim":256,"seed":0,"char_weight":1.0},"n_texts":3}"#;
    let table = vec![1f32; 1 << 18];
    write(&path, (KEY, header), "idf", &table);
    assert!(Hashed::load(&path).is_ok());

    write(&path, ("anchorage.hashed.v2", header), "idf", &table);
    assert!(message().ends_with(r#"metadata "anchorage.hashed.v1" is missing, expected a JSON header"#));
    write(&path, (KEY, "{}"), "idf", &table);
    assert!(message().contains("expected options and n_texts as JSON"));
    write(&path, (KEY, &header.replace("256", "250")), "idf", &table);
    assert!(message().contains("dim is 250, expected a multiple of 16"));
    write(&path, (KEY, header), "weights", &table);
    assert!(message().ends_with(r#"tensor "idf" is missing, expected F32 [262144]"#));
    write(&path, (KEY, header), "idf", &table[1..]);
    assert!(message().ends_with(r#"tensor "idf" is F32 [262143], expected F32 [262144]"#));
    for bad in [f32::NAN, 0.0, f32::INFINITY] {
        let mut table = table.clone();
        table[5] = bad;
        write(&path, (KEY, header), "idf", &table);
        assert!(matches!(Hashed::load(&path), Err(Error::Value { row: 5, .. })), "{}", message());
    }
}

#[test]
fn a_failed_save_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("taken");
    fs::create_dir(&path).unwrap();
    assert!(matches!(fitted(HashedOptions::default()).save(&path), Err(Error::Io { .. })));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}
