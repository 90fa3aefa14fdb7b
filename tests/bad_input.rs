//! Every kind of wrong input ends in one line that says where and what, and leaves nothing that counts.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;

use parquet::data_type::ByteArrayType;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use crate::support::{Workdir, checkpoints, failure, files, half_written, write_npy};

/// A corpus of one file with this content: `prepare` fails with `parts`, and no stage counts as finished.
fn prepare_fails(name: &str, content: &[u8], parts: &[&str]) {
    let work = Workdir::new();
    fs::write(work.path(name), content).unwrap();
    let file = format!("corpus.files=[\"{name}\"]");
    work.fails(&["prepare", "run.toml", "--set", &file], parts);
    assert_nothing_counts(&work);
    work.fails(&["train", "run.toml", "--set", &file], parts);
    assert!(!work.path("run").exists());
}

fn assert_nothing_counts(work: &Workdir) {
    let stages = fs::read_to_string(work.path("prepared/stages.json")).unwrap_or("{}".into());
    assert_eq!(serde_json::from_str::<serde_json::Value>(&stages).unwrap(), serde_json::json!({}));
}

/// 200 lines of JSON, the last but one replaced.
fn lines_with(wrong: &[u8]) -> Vec<u8> {
    let mut bytes = vec![];
    for i in 0..198 {
        writeln!(bytes, r#"{{"id": "{i}", "label": "x", "text": "document {i} tells of nothing"}}"#).unwrap();
    }
    bytes.extend(wrong);
    bytes.extend(b"\n{\"id\": \"200\", \"label\": \"x\", \"text\": \"the last\"}\n");
    bytes
}

#[test]
fn no_documents() {
    let work = Workdir::new();
    let missing = ["prepare", "run.toml", "--set", "corpus.files=[\"facts/none.jsonl\"]"];
    work.fails(&missing, &["facts/none.jsonl"]);
    assert_nothing_counts(&work);
    work.fails(
        &["check", "run.toml", "--set", "corpus.files=[\"none/*.jsonl\"]"],
        &["none/*.jsonl: no file matches"],
    );
    prepare_fails("empty.jsonl", b"", &["empty.jsonl"]);
    prepare_fails("blank.jsonl", b"{\"id\": \"1\", \"text\": \"\"}\n", &["blank.jsonl"]);
}

#[test]
fn wrong_lines() {
    prepare_fails(
        "a.jsonl",
        &lines_with(b"{\"id\": \"x\", \"text\": \"\xff\"}"),
        &["a.jsonl:199: not utf-8"],
    );
    prepare_fails(
        "b.jsonl",
        &lines_with(b"{\"id\": \"x\", \"body\": \"y\"}"),
        &["b.jsonl:199: no key `text`"],
    );
    prepare_fails("c.jsonl", &lines_with(b"{\"id\": \"x\", \"text\": \"y"), &["c.jsonl:199: invalid json"]);
    prepare_fails("d.jsonl", &lines_with(b"{\"id\": \"x\", \"text\": 7}"), &["d.jsonl:199: `text` must be"]);
}

fn parquet_file() -> Vec<u8> {
    let schema = "message doc { required binary id (STRING); required binary label (STRING); required binary text (STRING); }";
    let (schema, properties) = (Arc::new(parse_message_type(schema).unwrap()), WriterProperties::new());
    let mut bytes = vec![];
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::new(properties)).unwrap();
    let mut group = writer.next_row_group().unwrap();
    while let Some(mut column) = group.next_column().unwrap() {
        let texts: Vec<_> = (0..500).map(|i| format!("text {i}").as_str().into()).collect();
        column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
    bytes
}

#[test]
fn truncated_files() {
    let parquet = parquet_file();
    prepare_fails("a.parquet", &parquet[..parquet.len() / 2], &["a.parquet"]);
    let text = lines_with(b"{\"id\": \"x\", \"text\": \"y\"}");
    let zstd = zstd::encode_all(&text[..], 1).unwrap();
    prepare_fails("b.jsonl.zst", &zstd[..zstd.len() - 9], &["b.jsonl.zst", "ends too early"]);
    let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    encoder.write_all(&text).unwrap();
    let gzip = encoder.finish().unwrap();
    prepare_fails("c.jsonl.gz", &gzip[..gzip.len() - 9], &["c.jsonl.gz", "ends too early"]);
}

#[test]
fn a_corpus_that_is_mended_is_prepared_as_if_it_had_been_whole() {
    let work = Workdir::new();
    let whole = fs::read(work.path("facts/corpus.jsonl")).unwrap();
    fs::write(work.path("facts/corpus.jsonl"), &whole[..whole.len() - 2]).unwrap();
    work.fails(&["prepare", "run.toml"], &["facts/corpus.jsonl:1010: invalid json"]);
    fs::write(work.path("facts/corpus.jsonl"), &whole).unwrap();
    work.ok(&["prepare", "run.toml"]);
    work.ok(&["prepare", "run.toml", "--set", "corpus.prepared=fresh"]);
    assert!(half_written(&work.path("prepared")).is_empty());
    assert!(files(&work.path("prepared")) == files(&work.path("fresh")), "the prepared folders differ");
}

#[test]
fn wrong_configurations() {
    let work = Workdir::new();
    let text = fs::read_to_string(work.path("run.toml")).unwrap();
    let line_of = |text: &str, key: &str| 1 + text.lines().position(|line| line.starts_with(key)).unwrap();
    let check = |text: &str, parts: &[&str]| {
        fs::write(work.path("wrong.toml"), text).unwrap();
        work.fails(&["train", "wrong.toml"], parts);
    };
    let wrong = text.replace("steps = 12", "steps = \"many\"");
    check(&wrong, &[&format!("wrong.toml: line {}: invalid type", line_of(&wrong, "steps")), "many"]);
    let wrong = text.replace("warmup_steps", "warmup_step");
    let place = format!(
        "wrong.toml: line {}: unknown key `warmup_step`, did you mean `warmup_steps`?",
        line_of(&wrong, "warmup_step")
    );
    check(&wrong, &[&place]);
    check(&text.replace("width = [64, 32]", "width = [64]"), &["memory.width", "(2), found 1"]);
    check("[run\n", &["wrong.toml: line 1"]);
    work.fails(&["train", "none.toml"], &["none.toml: No such file"]);
    let unknown = ["train", "run.toml", "--set", "tree.branchin=[2]"];
    work.fails(&unknown, &["--set tree.branchin=[2]: unknown key `branchin`, did you mean `branching`?"]);
    work.fails(
        &["train", "run.toml", "--set", "train.clip=-1"],
        &["train.clip: expected 0 or more, found -1"],
    );
    for (setting, part) in [
        ("tree.branching=[]", "[tree]: "),
        ("tree.max_share=7", "[tree]: "),
        ("corpus.window=0", "corpus.window: expected 1 to"),
        ("corpus.validation_permille=5000", "corpus.validation_permille: expected 0 to 999, found 5000"),
        ("embed.dim=0", "[embed]: "),
        ("generate.top_p=9", "[generate]: "),
        ("anchor.rope_base=0", "anchor.rope_base: 0 must be a number above 0"),
        ("anchor.norm_eps=nan", "anchor.norm_eps"),
        ("train.beta1=1.0", "train.beta1: expected a number from 0 to below 1, found 1"),
        ("train.warmup_steps=13", "train.warmup_steps: expected at most train.steps (12), found 13"),
        ("train.phase=cotrain", "anchor.init: expected a trained run"),
        ("anchor.init=run", "anchor.init: expected nothing"),
    ] {
        work.fails(&["check", "run.toml", "--set", setting], &[part]);
    }
    let overlap = ["check", "run.toml", "--set", "corpus.files=[\"facts/*.jsonl\"]"];
    work.fails(
        &overlap,
        &["facts/validation.jsonl: expected in files or in validation_files, found in both"],
    );
    work.fails(&["corpus", "facts", "x", "--set", "families=-1"], &["families"]);
    assert!(!work.path("run").exists() && !work.path("prepared").exists() && !work.path("x").exists());
}

#[test]
fn a_loss_that_is_no_number_ends_the_run_at_its_step() {
    let work = Workdir::new();
    let args = ["train", "run.toml", "--set", "train.learning_rate=1e30"];
    let error = work.fails(&args, &["diverged", "train.learning_rate"]);
    let step: u64 = error.strip_prefix("step ").unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!((1..=12).contains(&step), "{error}");
    let run = work.path("run");
    let saved = checkpoints(&run);
    assert!(saved.iter().all(|(name, whole)| *whole && name.parse::<u64>().unwrap() < step), "{saved:?}");
    let lines = crate::support::metrics(&run);
    assert!(lines.iter().all(|line| line["step"].as_u64().unwrap() < step && line["loss"].is_f64()));
}

#[test]
fn parts_of_another_run_are_refused() {
    let work = Workdir::new();
    work.ok(&["train", "run.toml"]);
    let other = ["train", "run.toml", "--set", "corpus.prepared=other", "--set", "run.dir=other_run"];
    work.ok(&[&other[..], &["--set", "corpus.vocab_size=330", "--set", "tree.seed=2"]].concat());
    let refused = |name: &str, from: &str, parts: &[&str]| {
        let (target, own) = (work.path(name), fs::read(work.path(name)).unwrap());
        fs::copy(work.path(from), &target).unwrap();
        for command in [&["eval", "run"][..], &["generate", "run", "gold is"]] {
            work.fails(command, parts);
        }
        fs::write(&target, own).unwrap();
    };
    refused("run/tree.safetensors", "other_run/tree.safetensors", &["tree.safetensors: expected the hash"]);
    refused("run/tokenizer.json", "other_run/tokenizer.json", &["tokenizer.json: expected the hash"]);
    // The manifest of this run's files, with what the other run says that its bank belongs to.
    let manifest = "checkpoints/00000012/memory/manifest.json";
    let read = |run: &str| -> serde_json::Value {
        serde_json::from_slice(&fs::read(work.path(&format!("{run}/{manifest}"))).unwrap()).unwrap()
    };
    let mut other = read("run");
    other["hashes"] = read("other_run")["hashes"].clone();
    fs::write(work.path(&format!("other_run/{manifest}")), other.to_string()).unwrap();
    refused(
        &format!("run/{manifest}"),
        &format!("other_run/{manifest}"),
        &["memory: bank of another tree or tokenizer"],
    );
    let anchor = "checkpoints/00000012/anchor.safetensors";
    refused(
        &format!("run/{anchor}"),
        &format!("other_run/{anchor}"),
        &["anchor of another run", "vocab_size: 320", "vocab_size: 330"],
    );

    let own = fs::read(work.path("prepared/tokenizer.json")).unwrap();
    fs::copy(work.path("other/tokenizer.json"), work.path("prepared/tokenizer.json")).unwrap();
    work.fails(&["train", "run.toml", "--set", "run.dir=new"], &["made with tokenizer"]);
    assert!(checkpoints(&work.path("new")).is_empty());
    fs::write(work.path("prepared/tokenizer.json"), own).unwrap();
    work.ok(&["eval", "run"]);
}

#[test]
fn a_run_keeps_to_its_corpus() {
    let work = Workdir::new();
    work.ok(&["train", "run.toml"]);
    let before = files(&work.path("run"));
    // Another run clusters the shared folder anew: the old tree's paths name other documents there.
    work.ok(&["prepare", "run.toml", "--set", "tree.seed=2"]);
    work.fails(&["eval", "run"], &["run was trained on another prepared", "the corpus differs in tree"]);
    work.ok(&["prepare", "run.toml"]);
    work.ok(&["eval", "run"]);

    let mut text = fs::read_to_string(work.path("facts/corpus.jsonl")).unwrap();
    text.push_str("{\"id\": \"new\", \"text\": \"One more document.\"}\n");
    fs::write(work.path("facts/corpus.jsonl"), text).unwrap();
    let parts =
        ["run goes on only with the corpus it began with", "the corpus differs in file", "corpus.jsonl"];
    work.fails(&["train", "run.toml"], &parts);
    work.fails(&["eval", "run"], &["the corpus differs in file"]);
    let mut after = files(&work.path("run"));
    after.retain(|name, _| before.contains_key(name));
    assert!(
        before.iter().all(|(name, bytes)| name.starts_with("report") || after[name] == *bytes),
        "a refused command changed the run"
    );
    work.ok(&["generate", "run", "gold is"]);
    let init = ["train", "run.toml", "--set", "run.dir=next", "--set", "train.phase=cotrain"];
    let other = ["--set", "anchor.init=run", "--set", "corpus.prepared=other"];
    let files = ["--set", "corpus.files=[\"facts/validation.jsonl\"]", "--set", "corpus.validation_files=[]"];
    work.fails(&[&init[..], &other, &files].concat(), &["run/tokenizer.json: tokenizer of another corpus"]);
}

#[test]
fn two_processes_in_one_folder() {
    let work = Workdir::new();
    work.ok(&["train", "run.toml"]);
    for (folder, message) in [
        ("prepared", "prepared: another process is preparing this folder"),
        ("run", "run: another process is training this run"),
    ] {
        let held = fs::File::open(work.path(folder).join(".lock")).unwrap();
        held.try_lock().unwrap();
        work.fails(&["train", "run.toml"], &[message]);
    }
    work.ok(&["train", "run.toml"]);
}

#[test]
fn damaged_checkpoints_are_refused() {
    let work = Workdir::new();
    work.ok(&["train", "run.toml"]);
    let cut = |name: &str, command: &[&str]| {
        let path = work.path("run/checkpoints/00000012").join(name);
        let own = fs::read(&path).unwrap();
        fs::write(&path, &own[..own.len() / 2]).unwrap();
        work.fails(command, &[name]);
        fs::write(&path, own).unwrap();
    };
    for command in [&["eval", "run"][..], &["generate", "run", "gold is"], &["train", "run.toml"]] {
        cut("memory/values.safetensors", command);
        cut("memory/manifest.json", command);
        cut("anchor.safetensors", command);
    }
    cut("optimizer.safetensors", &["train", "run.toml"]);
    cut("state.json", &["train", "run.toml"]);
    work.ok(&["eval", "run"]);
}

#[test]
fn a_run_goes_on_only_with_its_configuration() {
    let work = Workdir::new();
    work.ok(&["train", "run.toml"]);
    let before = files(&work.path("run"));
    work.fails(&["route", "run", " "], &["text 0 is empty"]);
    work.fails(&["generate", "run", ""], &["text 0 is empty"]);
    let changed = ["train", "run.toml", "--set", "train.learning_rate=0.5"];
    work.fails(&changed, &["run/config.toml: train.learning_rate was 0.002", "is 0.5 now"]);
    work.fails(&["train", "run.toml", "--set", "memory.width=[64,16]"], &["memory.width"]);
    assert!(before == files(&work.path("run")), "a refused command changed the run");
}

#[test]
fn folders_that_are_no_run() {
    let work = Workdir::new();
    for command in [&["eval", "facts"][..], &["route", "facts", "x"], &["generate", "facts", "x"]] {
        work.fails(command, &["facts: expected a run folder, found no config.toml"]);
    }
    work.fails(&["bank", "inspect", "facts"], &["facts"]);
    work.fails(&["eval", "none"], &["none: expected a run folder"]);
}

/// The program with files of at most `kib` KiB: a write beyond fails as one to a full disk does, and
/// no rights are needed to set it up.
fn without_space(work: &Workdir, kib: u32, args: &str) -> std::process::Output {
    let script = format!("trap '' XFSZ; ulimit -f {kib}; exec \"$0\" {args}");
    let mut command = Command::new("bash");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_anchorage")]).current_dir(work.path(""));
    command.stdin(Stdio::null()).output().unwrap()
}

#[test]
fn no_space_for_a_prepared_corpus() {
    let work = Workdir::new();
    failure(&without_space(&work, 100, "prepare run.toml"), &["prepared/", "File too large"]);
    assert_nothing_counts(&work);
    // With space again it goes on as if nothing had been.
    work.ok(&["train", "run.toml"]);
    assert!(half_written(&work.path("prepared")).is_empty());
}

#[test]
fn no_space_for_the_journal_of_a_tree() {
    let work = Workdir::new();
    write_npy(&work.path("points.npy"), 3000);
    let build = |out: &str| format!("tree build points.npy --set tree.branching=[6,5] --out {out}");
    let built = |out: &str| work.ok(&build(out).split(' ').collect::<Vec<_>>());
    built("whole");
    // Room for the root, 4 bytes a point noted, and not for all of its children.
    failure(&without_space(&work, 20, &build("again")), &["again.journal: File too large"]);
    assert!(!work.path("again").exists() && fs::metadata(work.path("again.journal")).unwrap().len() > 12_000);
    built("again");
    assert!(fs::read(work.path("again")).unwrap() == fs::read(work.path("whole")).unwrap());
    assert!(!work.path("again.journal").exists());
}

#[test]
fn no_space_for_a_run() {
    let work = Workdir::new();
    // Sizes so that each file of a run is larger than those written before it.
    let sizes = "--set anchor.ffn_width=2048 --set memory.width=[256,256] --set train.steps=4";
    let whole: Vec<&str> =
        ["train", "run.toml", "--set", "run.dir=whole"].into_iter().chain(sizes.split(' ')).collect();
    work.ok(&whole);
    let (run, train) = (work.path("run"), format!("train run.toml {sizes}"));
    failure(&without_space(&work, 4, &train), &["run/", "File too large"]);
    assert!(half_written(&run).is_empty(), "{:?}", half_written(&run));

    let last = "checkpoints/00000004";
    let kib = |name: &str| {
        u32::try_from(fs::metadata(work.path("whole").join(name)).unwrap().len() / 1024).unwrap()
    };
    let names = ["anchor.safetensors", "optimizer.safetensors", "memory/optimizer.safetensors"];
    let sizes =
        [kib("embedder.safetensors")].into_iter().chain(names.map(|name| kib(&format!("{last}/{name}"))));
    let sizes: Vec<u32> = sizes.collect();
    for (pair, name) in sizes.windows(2).zip(names) {
        assert!(pair[0] + 1 < pair[1], "{name} is no larger than the file before it: {sizes:?}");
        // The bank is written in a temporary folder beside its place, which the error names; of its
        // two files, either may be the first that finds no space.
        let place = format!("/00000004/{}", name.replace("memory/optimizer.safetensors", "memory.tmp/"));
        let output = without_space(&work, pair[0] + 1, &train);
        failure(&output, &["run/attempts/", &place, "File too large"]);
        assert!(checkpoints(&run).into_values().all(|whole| !whole));
        assert!(half_written(&run).is_empty(), "{:?}", half_written(&run));
    }
    work.ok(&train.split(' ').collect::<Vec<_>>());
    assert!(files(&run.join(last)) == files(&work.path("whole").join(last)), "the checkpoints differ");
}
