//! Documents through every format, compression and kind of store, and every error on the way.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use ::parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use ::parquet::file::properties::WriterProperties;
use ::parquet::file::writer::SerializedFileWriter;
use ::parquet::schema::parser::parse_message_type;
use object_store::memory::InMemory;
use object_store::path::Path as StorePath;
use object_store::{ObjectStore, ObjectStoreExt};
use sha2::{Digest, Sha256};

use super::lines::Lines;
use super::listing::remote_files;
use super::remote::Remote;
use super::*;

const SCHEMA: &str = "message doc { required int64 id; optional binary label (STRING); optional double x;
    required binary text (STRING); }";

fn options(files: &[&Path]) -> SourceOptions {
    SourceOptions {
        files: files.iter().map(|path| path.to_str().unwrap().to_owned()).collect(),
        id_key: Some("id".to_owned()),
        label_key: Some("label".to_owned()),
        ..SourceOptions::default()
    }
}

fn document(index: usize) -> Document {
    Document {
        id: index.to_string(),
        label: (!index.is_multiple_of(3)).then(|| format!("label {}", index % 3)),
        text: format!("document {index}: é\n\"東京\" {}", "ab ".repeat(index % 50)),
    }
}

fn jsonl(documents: std::ops::Range<usize>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for index in documents {
        let Document { text, label, .. } = document(index);
        let line =
            serde_json::json!({"id": index, "meta": {"text": [1, null]}, "label": label, "text": text});
        writeln!(bytes, "{line}").unwrap();
    }
    bytes
}

fn parquet(documents: std::ops::Range<usize>) -> Vec<u8> {
    let schema = Arc::new(parse_message_type(SCHEMA).unwrap());
    // Several pages a column, several row groups a file.
    let properties = WriterProperties::builder().set_data_page_row_count_limit(7).set_write_batch_size(7);
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::new(properties.build())).unwrap();
    for start in documents.clone().step_by(40) {
        let rows: Vec<usize> = (start..documents.end.min(start + 40)).collect();
        let ids: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let labels: Vec<Option<String>> = rows.iter().map(|&row| document(row).label).collect();
        let levels: Vec<i16> = labels.iter().map(|label| i16::from(label.is_some())).collect();
        let labels: Vec<ByteArray> = labels.iter().flatten().map(|label| label.as_str().into()).collect();
        let texts: Vec<ByteArray> = rows.iter().map(|&row| document(row).text.as_str().into()).collect();
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&labels, Some(&levels), None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let none = vec![0; rows.len()];
        column.typed::<::parquet::data_type::DoubleType>().write_batch(&[], Some(&none), None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    ::zstd::encode_all(bytes, 1).unwrap()
}

/// All documents of the files of `options`.
fn read_all(options: &SourceOptions) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    for file in list(options)? {
        for document in read(&file, options)? {
            documents.push(document?);
        }
    }
    Ok(documents)
}

/// The error of reading one file with this name and content, without its folder.
fn error(name: &str, content: &[u8], change: impl FnOnce(&mut SourceOptions)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, content).unwrap();
    let mut options = options(&[&path]);
    change(&mut options);
    let error = read_all(&options).unwrap_err().to_string();
    let folder = format!("{}/", dir.path().canonicalize().unwrap().display());
    assert!(error.starts_with(&folder), "{error}");
    assert!(!error.contains('\n'), "{error}");
    error.replace(&folder, "")
}

fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

#[test]
fn every_format_and_compression_gives_the_same_documents() {
    let dir = tempfile::tempdir().unwrap();
    let all = 0..100;
    let expected: Vec<_> = all.clone().map(document).collect();
    let members = [jsonl(0..30), jsonl(30..100)];
    let contents = [
        ("a.jsonl", jsonl(all.clone())),
        ("a.ndjson.gz", members.iter().flat_map(|bytes| gzip(bytes)).collect()),
        ("a.json.zst", members.iter().flat_map(|bytes| zstd(bytes)).collect()),
        ("a.parquet", parquet(all.clone())),
        ("a.parquet.gz", gzip(&parquet(all.clone()))),
        ("a.parquet.zst", zstd(&parquet(all))),
    ];
    for (name, content) in contents {
        let path = dir.path().join(name);
        fs::write(&path, &content).unwrap();
        let options = options(&[&path]);
        let files = list(&options).unwrap();
        let mut documents = read(&files[0], &options).unwrap();
        let found: Vec<_> = (&mut documents).map(Result::unwrap).collect();
        assert_eq!(found, expected, "{name}");
        let record = documents.finish().unwrap();
        assert_eq!((record.bytes, record.hash), (content.len() as u64, sha256(&content)), "{name}");
    }
}

#[test]
fn a_document_without_an_id_is_named_after_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        let mut options = options(&[&path]);
        options.id_key = None;
        let documents = read_all(&options).unwrap();
        documents.into_iter().map(|document| document.id).collect::<Vec<_>>()
    };
    let lines = b"\n{\"text\":\"a\"}\n \n{\"text\":\"b\"}";
    assert_eq!(write("a.jsonl", lines), ["a.jsonl:2", "a.jsonl:4"]);
    assert_eq!(write("a.parquet", &parquet(0..2)), ["a.parquet:1", "a.parquet:2"]);
}

#[test]
fn one_key_may_serve_twice_and_escapes_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    fs::write(&path, "{\"\\u0069d\":\"x\\n\",\"text\":\"a\"}").unwrap();
    let mut options = options(&[&path]);
    options.label_key = Some("id".to_owned());
    let expected = Document { id: "x\n".to_owned(), label: Some("x\n".to_owned()), text: "a".to_owned() };
    assert_eq!(read_all(&options).unwrap(), [expected]);
}

#[test]
fn plain_text_is_one_document_or_many() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.txt");
    fs::write(&path, "\none\r\ntwo\n \n\nthree\n").unwrap();
    let read = |txt_split| {
        let options = SourceOptions { txt_split, ..options(&[&path]) };
        let documents = read_all(&options).unwrap();
        documents.into_iter().map(|document| (document.id, document.text)).collect::<Vec<_>>()
    };
    let owned = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(id, text)| ((*id).to_owned(), (*text).to_owned())).collect::<Vec<_>>()
    };
    assert_eq!(read(TxtSplit::File), owned(&[("a.txt:1", "\none\r\ntwo\n \n\nthree\n")]));
    assert_eq!(read(TxtSplit::Line), owned(&[("a.txt:2", "one"), ("a.txt:3", "two"), ("a.txt:6", "three")]));
    assert_eq!(read(TxtSplit::Paragraph), owned(&[("a.txt:2", "one\r\ntwo"), ("a.txt:6", "three")]));
}

#[test]
fn empty_documents_are_skipped_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    fs::write(&path, "{\"id\":1,\"text\":\"\"}\n{\"id\":2,\"text\":\" a\"}\n{\"id\":3,\"text\":\" \\n\"}\n")
        .unwrap();
    let options = options(&[&path]);
    let mut documents = read(&list(&options).unwrap()[0], &options).unwrap();
    let texts: Vec<_> = (&mut documents).map(|document| document.unwrap().text).collect();
    assert_eq!((texts, documents.n_empty()), (vec![" a".to_owned()], 2));
}

#[test]
fn listing_sorts_and_takes_each_file_once() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    fs::create_dir_all(root.join("sub/.hidden")).unwrap();
    for name in
        ["b.jsonl", "a.jsonl", "a.txt.gz", "sub/c.jsonl", "readme.md", ".x.jsonl", "sub/.hidden/d.txt"]
    {
        fs::write(root.join(name), "").unwrap();
    }
    let names = |patterns: &[&str], format| {
        let files = patterns.iter().map(|pattern| format!("{}/{pattern}", root.display())).collect();
        let files = list(&SourceOptions { files, format, ..SourceOptions::default() }).unwrap();
        let strip =
            |file: SourceFile| file.url.strip_prefix(&format!("{}/", root.display())).unwrap().to_owned();
        files.into_iter().map(strip).collect::<Vec<_>>()
    };
    assert_eq!(names(&["*.jsonl"], None), ["a.jsonl", "b.jsonl"]);
    assert_eq!(names(&["b.jsonl", "?.jsonl", "sub/../a.jsonl"], None), ["a.jsonl", "b.jsonl"]);
    assert_eq!(names(&["**/*.jsonl"], None), ["a.jsonl", "b.jsonl", "sub/c.jsonl"]);
    assert_eq!(names(&[""], None), ["a.jsonl", "a.txt.gz", "b.jsonl", "sub/c.jsonl"]);
    assert_eq!(names(&["readme.md"], None), ["readme.md"]);
    assert!(names(&[""], Some(Format::Txt)).contains(&"readme.md".to_owned()));

    let url = format!("file://{}/b.jsonl", root.display());
    let files = list(&SourceOptions { files: vec![url], ..SourceOptions::default() }).unwrap();
    assert_eq!(files[0].url, format!("{}/b.jsonl", root.display()));
    let url = format!("file://{}/*.jsonl", root.display());
    assert_eq!(list(&SourceOptions { files: vec![url], ..SourceOptions::default() }).unwrap().len(), 2);
}

#[test]
fn a_link_is_read_under_its_own_name() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("blob"), jsonl(0..2)).unwrap();
    std::os::unix::fs::symlink(dir.path().join("blob"), dir.path().join("a.jsonl")).unwrap();
    assert_eq!(read_all(&options(&[&dir.path().join("a.jsonl")])).unwrap().len(), 2);
}

#[test]
fn what_cannot_be_listed_is_named() {
    let error = |pattern: &str| {
        let options = SourceOptions { files: vec![pattern.to_owned()], ..SourceOptions::default() };
        list(&options).unwrap_err().to_string()
    };
    assert_eq!(error("/no/such.jsonl"), "/no/such.jsonl: no file matches");
    assert_eq!(error("/no/such/*.jsonl"), "/no/such/*.jsonl: no file matches");
    assert_eq!(error("memory:///a.jsonl"), "memory:///a.jsonl: no file matches");
    assert!(error("/tmp/[a.jsonl").starts_with("/tmp/[a.jsonl: "));
    assert!(error("nfs://host/a.jsonl").starts_with("nfs://host/a.jsonl: "));
    assert_eq!(
        error("https://host/a.jsonl?x=1"),
        "https://host/a.jsonl?x=1: a url with `?` or `#` is not supported"
    );
    let none = list(&SourceOptions::default()).unwrap_err().to_string();
    assert_eq!(none, "files must be at least one, found none");
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("readme.md"), "").unwrap();
    let folder = dir.path().to_str().unwrap();
    assert_eq!(error(folder), format!("{folder}: no file matches"));
}

#[test]
fn bad_records_are_named_by_file_and_line() {
    let same = |_: &mut SourceOptions| {};
    let line = |line: &str| [b"{\"id\":1,\"text\":\"a\"}\n", line.as_bytes()].concat();
    let cases = [
        ("{\"id\":2,\"body\":\"a\"}", "a.jsonl:2: no key `text`, found `id`, `body`"),
        ("{}", "a.jsonl:2: no key `text`, found no keys"),
        ("{\"text\":\"a\"}", "a.jsonl:2: no key `id`, found `text`"),
        ("{\"id\":2,\"text\":7}", "a.jsonl:2: `text` must be a string, found a number"),
        ("{\"id\":2,\"text\":null}", "a.jsonl:2: `text` must be a string, found null"),
        ("{\"id\":[],\"text\":\"a\"}", "a.jsonl:2: `id` must be a string or a number, found an array"),
        (
            "{\"id\":2,\"text\":\"a\",\"label\":{}}",
            "a.jsonl:2: `label` must be a string, a number or a boolean, found an object",
        ),
    ];
    for (content, expected) in cases {
        assert_eq!(error("a.jsonl", &line(content), same), expected);
    }
    for content in ["{\"id\":2,\"text\":\"a\"", "[1]", "{\"id\":2,\"text\":\"a\"} x", "nonsense"] {
        let error = error("a.jsonl", &line(content), same);
        assert!(error.starts_with("a.jsonl:2: invalid json: "), "{error}");
    }
    assert_eq!(error("a.jsonl", b"\n{\"id\":2,\"\xff", same), "a.jsonl:2: not utf-8 at byte 9 of the record");
    assert_eq!(error("a.txt", b"a\nb\xff", same), "a.txt:2: not utf-8 at byte 1 of the record");
    assert_eq!(
        error("a.md", b"a", same),
        format!("a.md: unknown format: expected {EXTENSIONS}, or an explicit format")
    );
}

#[test]
fn reading_ends_after_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    fs::write(&path, "x\n{\"id\":1,\"text\":\"a\"}\n").unwrap();
    let options = options(&[&path]);
    let mut documents = read(&list(&options).unwrap()[0], &options).unwrap();
    assert!(documents.next().unwrap().is_err());
    assert!(documents.next().is_none());
}

#[test]
fn parquet_columns_are_checked() {
    let content = parquet(0..2);
    let missing = error("a.parquet", &content, |options| options.text_key = "body".to_owned());
    assert_eq!(missing, "a.parquet:0: no key `body`, found `id`, `label`, `x`, `text`");
    let missing = error("a.parquet", &content, |options| options.id_key = Some("key".to_owned()));
    assert_eq!(missing, "a.parquet:0: no key `key`, found `id`, `label`, `x`, `text`");
    let wrong = error("a.parquet", &content, |options| options.text_key = "id".to_owned());
    assert_eq!(wrong, "a.parquet:0: `id` must be a string, found INT64 column");
    let null = error("a.parquet", &content, |options| options.text_key = "label".to_owned());
    assert_eq!(null, "a.parquet:1: `label` must be a string, found null");
    let null = error("a.parquet", &content, |options| options.id_key = Some("x".to_owned()));
    assert_eq!(null, "a.parquet:1: `x` must be a string, an integer or a boolean, found null");
}

#[test]
fn truncated_and_damaged_files_are_errors() {
    let same = |_: &mut SourceOptions| {};
    let text = jsonl(0..200);
    for (name, content) in [("a.jsonl.gz", gzip(&text)), ("a.jsonl.zst", zstd(&text))] {
        let found = error(name, &content[..content.len() - 9], same);
        assert!(found.starts_with(&format!("{name}:")) && found.contains("ends too early"), "{found}");
        let found = error(name, &[&content[..], b"rubbish"].concat(), same);
        assert!(found.starts_with(&format!("{name}:201: ")), "{found}");
        let found = error(name, b"rubbish, not compressed", same);
        assert!(found.starts_with(&format!("{name}:1: ")), "{found}");
    }
    let table = parquet(0..100);
    let found = error("a.parquet", &table[..table.len() - 9], same);
    assert!(found.starts_with("a.parquet:0: "), "{found}");
    assert!(error("a.parquet", b"", same).starts_with("a.parquet:0: "));
    let found = error("a.parquet.gz", &gzip(&table)[..500], same);
    assert!(found.starts_with("a.parquet.gz:0: the file ends too early"), "{found}");
    // Damage in the data, under a whole footer: a wrong page header or a wrong length.
    let mut damaged = table.clone();
    damaged[4..400].fill(0xff);
    assert!(error("a.parquet", &damaged, same).starts_with("a.parquet:1: "));
}

#[test]
fn a_file_that_vanishes_or_shrinks_after_listing_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    fs::write(&path, jsonl(0..50)).unwrap();
    let options = options(&[&path]);
    let files = list(&options).unwrap();
    fs::write(&path, jsonl(0..5)).unwrap();
    let error = read(&files[0], &options).unwrap().next().unwrap().unwrap_err();
    assert!(matches!(error, Error::Truncated { record: 1, .. }), "{error}");
    fs::remove_file(&path).unwrap();
    assert!(matches!(read(&files[0], &options), Err(Error::Io { .. })));
}

#[test]
fn long_lines_and_documents_are_errors() {
    let mut lines = Lines::new(&b"1234\n12345\n"[..], "a.jsonl", 5);
    assert_eq!(lines.next_line().unwrap(), Some((1, "1234\n")));
    assert_eq!(lines.next_line().unwrap_err().to_string(), "a.jsonl:2: longer than 5 bytes");
    let lines = Lines::new(&b"1234\n1\n"[..], "a.txt", 5);
    let error = txt::TxtDocuments::new(lines, TxtSplit::File, 5).next().unwrap().unwrap_err();
    assert_eq!(error.to_string(), "a.txt:2: longer than 5 bytes");
}

/// A store with these objects, and a view of it at `path`.
fn memory(objects: &[(&str, Vec<u8>)], path: &str) -> Remote {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let remote = Remote::new(store.clone(), StorePath::from(path)).unwrap();
    for (name, content) in objects {
        let (store, path, content) = (store.clone(), StorePath::from(*name), content.clone());
        let put = remote.start(async move { store.put(&path, content.into()).await });
        put.recv().unwrap().unwrap();
    }
    remote
}

#[test]
fn an_object_store_is_read_in_blocks() {
    let expected: Vec<_> = (0..100).map(document).collect();
    let contents = [
        ("d/a.jsonl", jsonl(0..100)),
        ("d/a.jsonl.gz", gzip(&jsonl(0..100))),
        ("d/a.parquet", parquet(0..100)),
        ("d/a.parquet.zst", zstd(&parquet(0..100))),
    ];
    for (name, content) in contents {
        for (block_bytes, etag) in [(64, None), (1000, Some("\"1\"".to_owned())), (1 << 20, None)] {
            let remote = memory(&[(name, content.clone())], name);
            let url = format!("s3://bucket/{name}");
            let bytes = content.len() as u64;
            let file = SourceFile { url: url.clone(), bytes, etag: etag.clone(), modified_ns: None };
            let object = Arc::new(Object::in_store(&file, remote, block_bytes));
            let mut documents = documents(object, &options(&[])).unwrap();
            let found: Vec<_> = (&mut documents).map(Result::unwrap).collect();
            assert_eq!(found, expected, "{name} in blocks of {block_bytes}");
            let hash = etag.map_or_else(|| sha256(&content), |etag| format!("etag:{etag}"));
            assert_eq!(documents.finish().unwrap(), FileRecord { url, bytes, hash });
        }
    }
}

#[test]
fn an_object_that_is_gone_is_an_error() {
    let remote = memory(&[], "d/a.jsonl");
    let file = SourceFile { url: "s3://b/d/a.jsonl".to_owned(), bytes: 9, etag: None, modified_ns: None };
    let object = Arc::new(Object::in_store(&file, remote, 64));
    let error = documents(object, &options(&[])).unwrap().next().unwrap().unwrap_err().to_string();
    assert!(error.starts_with("s3://b/d/a.jsonl:1: "), "{error}");
}

#[test]
fn an_object_store_is_listed_by_name_prefix_and_glob() {
    let objects = ["d/b.jsonl", "d/a.jsonl", "d/e/c.jsonl", "d/readme.md", "dd/x.jsonl", "d/.h.txt"]
        .map(|name| (name, b"{}".to_vec()));
    let names = |pattern: &str, base: &str| {
        let path = base.strip_prefix("s3://bucket").unwrap().trim_matches('/');
        let remote = memory(&objects, path);
        let files = remote_files(&remote, pattern, base.len(), &SourceOptions::default()).unwrap();
        let mut names: Vec<_> = files.into_iter().map(|file| file.url).collect();
        names.sort();
        names
    };
    let (a, b, c) = ("s3://bucket/d/a.jsonl", "s3://bucket/d/b.jsonl", "s3://bucket/d/e/c.jsonl");
    assert_eq!(names(a, a), [a]);
    assert_eq!(names("s3://bucket/d", "s3://bucket/d"), [a, b, c]);
    assert_eq!(names("s3://bucket/d/", "s3://bucket/d/"), [a, b, c]);
    assert_eq!(names("s3://bucket", "s3://bucket"), [a, b, c, "s3://bucket/dd/x.jsonl"]);
    assert_eq!(names("s3://bucket/d/*.jsonl", "s3://bucket/d/"), [a, b]);
    assert_eq!(names("s3://bucket/d/[ab].jsonl", "s3://bucket/d/"), [a, b]);
    assert_eq!(names("s3://bucket/*/**/*.jsonl", "s3://bucket/"), [a, b, c, "s3://bucket/dd/x.jsonl"]);
    assert_eq!(names("s3://bucket/d/no", "s3://bucket/d/no"), [""; 0]);
}

#[test]
fn reading_works_inside_an_async_context() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let n = runtime.block_on(async {
        let file = SourceFile { url: "s3://b/a.jsonl".to_owned(), bytes: 0, etag: None, modified_ns: None };
        let content = jsonl(0..20);
        let file = SourceFile { bytes: content.len() as u64, ..file };
        let object = Object::in_store(&file, memory(&[("a.jsonl", content)], "a.jsonl"), 100);
        documents(Arc::new(object), &options(&[])).unwrap().count()
    });
    assert_eq!(n, 20);
}

#[test]
fn an_identity_tells_changed_files() {
    let file = |bytes| SourceFile { url: "/a".to_owned(), bytes, etag: None, modified_ns: Some(1) };
    assert_eq!(identity(&[file(1)]), identity(&[file(1)]));
    assert_ne!(identity(&[file(1)]), identity(&[file(2)]));
    assert_ne!(identity(&[file(1)]), identity(&[file(1), file(1)]));
}

#[test]
fn a_copy_is_whole_or_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("a.txt"), folder.path().join("copy"));
    let content: Vec<u8> = (0..9_000_000u32).map(|i| ((i * i) >> 7) as u8).collect();
    fs::write(&from, &content).unwrap();
    let options = SourceOptions { files: vec![from.display().to_string()], ..SourceOptions::default() };
    let file = super::list(&options).unwrap().remove(0);
    let mut told = vec![];
    super::copy(&file, &[], &to, &mut |done| told.push(done)).unwrap();
    assert!(fs::read(&to).unwrap() == content);
    assert!(told.is_sorted() && told.last() == Some(&9_000_000), "{told:?}");
    // Cut short after it was listed.
    fs::write(&from, &content[..5_000_000]).unwrap();
    let other = folder.path().join("other");
    let error = super::copy(&file, &[], &other, &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("a.txt"), "{error}");
    assert!(!other.exists());
}
