//! A small corpus, a small configuration, and the program run on them in a folder of their own.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

pub(crate) use crate::fixtures::files;

/// The configuration of every test: trained in a fraction of a second, a checkpoint every 4 steps.
const CONFIG: &str = r#"[run]
dir = "run"

[corpus]
prepared = "prepared"
files = ["facts/corpus.jsonl"]
validation_files = ["facts/validation.jsonl"]
id_key = "id"
label_key = "label"
vocab_size = 320
tokenizer_sample_mib = 1
window = 64
seq_len = 64
validation_permille = 0

[embed]
dim = 64

[tree]
branching = [4, 4]

[anchor]
d_model = 32
n_layers = 2
n_heads = 2
head_width = 16
ffn_width = 64
max_seq_len = 128

[memory]
width = [64, 32]

[train]
phase = "joint"
steps = 12
batch_size = 8
micro_batch = 4
warmup_steps = 2
log_every = 1
save_every = 4
validate_every = 6
validate_sequences = 8

[eval]
questions = "facts/questions.jsonl"
questions_per_bucket = 2
batch = 8
max_answer_tokens = 4
"#;

/// A temporary folder that holds `facts/` and `run.toml`; the program runs in it.
pub(crate) struct Workdir {
    folder: TempDir,
    /// Variables of every command's environment.
    pub(crate) environment: Vec<(&'static str, String)>,
}

impl Workdir {
    pub(crate) fn new() -> Self {
        let workdir = Self { folder: tempfile::tempdir().unwrap(), environment: vec![] };
        fs::write(workdir.path("run.toml"), CONFIG).unwrap();
        let small = ["--set", "families=16", "--set", "ladder=[1,2,3,4,5]"];
        workdir.ok(&[&["corpus", "facts", "facts"], &small[..]].concat());
        workdir
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The program with its standard streams captured, not started yet.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_anchorage"));
        command.args(args).current_dir(self.folder.path());
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs to a success; the standard output and the standard error.
    pub(crate) fn ok(&self, args: &[&str]) -> (String, String) {
        let output = self.command(args).output().unwrap();
        let (out, err) = texts(&output);
        assert!(output.status.success(), "{args:?}: {}\n{err}", output.status);
        (out, err)
    }

    /// Runs to a failure that is told as it should be: exit code 1 and a last line `error: …` that holds
    /// each of `parts`. Returns that line without its prefix.
    pub(crate) fn fails(&self, args: &[&str], parts: &[&str]) -> String {
        failure(&self.command(args).output().unwrap(), parts)
    }
}

/// As [`Workdir::fails`], of a command that has ended.
pub(crate) fn failure(output: &Output, parts: &[&str]) -> String {
    let (_, err) = texts(output);
    assert_eq!(output.status.code(), Some(1), "expected exit code 1, found {}\n{err}", output.status);
    let errors: Vec<&str> = err.lines().filter_map(|line| line.strip_prefix("error: ")).collect();
    assert!(errors.len() == 1, "expected one line `error: …`, found {}:\n{err}", errors.len());
    assert!(err.ends_with(&format!("error: {}\n", errors[0])), "something follows the error:\n{err}");
    for part in parts {
        assert!(errors[0].contains(part), "expected `{part}` in: {}", errors[0]);
    }
    let causes: Vec<&str> = errors[0].split(": ").collect();
    let repeated = causes.windows(2).find(|pair| pair[0] == pair[1]);
    assert!(repeated.is_none(), "{repeated:?} is told twice: {}", errors[0]);
    errors[0].to_owned()
}

fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// Files whose name says that they are being written.
pub(crate) fn half_written(folder: &Path) -> Vec<PathBuf> {
    let is_temporary =
        |path: &PathBuf| path.components().any(|part| part.as_os_str().to_string_lossy().ends_with("tmp"));
    if folder.exists() { files(folder).into_keys().filter(is_temporary).collect() } else { vec![] }
}

/// Steps of the checkpoints of a run, and whether each is whole.
pub(crate) fn checkpoints(run: &Path) -> BTreeMap<String, bool> {
    let Ok(entries) = fs::read_dir(run.join("checkpoints")) else { return BTreeMap::new() };
    let checkpoint = |entry: fs::DirEntry| {
        (entry.file_name().to_string_lossy().into_owned(), entry.path().join("DONE").exists())
    };
    entries.map(|entry| checkpoint(entry.unwrap())).collect()
}

/// The lines of a run's metrics.jsonl without what depends on the clock.
pub(crate) fn metrics(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        // Of a bank in shards alone.
        value.as_object_mut().unwrap().remove("traffic");
        for key in ["time", "tokens_per_s", "seconds"] {
            assert!(value.as_object_mut().unwrap().remove(key).is_some(), "no {key} in {line}");
        }
        value
    };
    text.lines().map(line).collect()
}

/// A `.npy` file of `rows` vectors of 8 numbers.
pub(crate) fn write_npy(path: &Path, rows: usize) {
    let shape = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, 8), }}");
    let header = format!("{shape:<117}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    // Deterministic and all different.
    let value = |i: usize| {
        ((i * 7919 % 4093) as f32 / 4093.0 - 0.5 + (i % 8 == i / 500 % 8) as u8 as f32).to_le_bytes()
    };
    bytes.extend((0..rows * 8).flat_map(value));
    fs::write(path, bytes).unwrap();
}
