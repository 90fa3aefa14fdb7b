//! The same documents give the same tree, however they are laid out in files.

use std::fs;

use crate::support::Workdir;

fn tree(work: &Workdir, prepared: &str, files: &str) -> Vec<u8> {
    let (to, from) = (format!("corpus.prepared={prepared}"), format!("corpus.files={files}"));
    // Fewer windows than there are: which ones are counted must not depend on the files either.
    let sample = "embed.sample_windows=100";
    work.ok(&["prepare", "run.toml", "--set", &to, "--set", &from, "--set", sample]);
    fs::read(work.path(prepared).join("tree.safetensors")).unwrap()
}

#[test]
fn shuffled_and_divided_files_give_the_same_tree() {
    let work = Workdir::new();
    let text = fs::read_to_string(work.path("facts/corpus.jsonl")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let expected = tree(&work, "whole", "[\"facts/corpus.jsonl\"]");
    // 997 is prime: where it does not divide their number, every line is taken once.
    assert!(!lines.len().is_multiple_of(997), "{} lines", lines.len());
    let shuffled: Vec<&str> = (0..lines.len()).map(|i| lines[(i * 997 + 5) % lines.len()]).collect();
    fs::write(work.path("shuffled.jsonl"), shuffled.join("\n")).unwrap();
    let (a, rest) = shuffled.split_at(shuffled.len() / 7);
    let (b, c) = rest.split_at(rest.len() / 2);
    for (name, part) in [("z", a), ("m", b), ("a", c)] {
        fs::write(work.path(&format!("{name}.jsonl")), part.join("\n")).unwrap();
    }
    assert!(tree(&work, "shuffled", "[\"shuffled.jsonl\"]") == expected, "another order, another tree");
    let parts = "[\"z.jsonl\", \"m.jsonl\", \"a.jsonl\"]";
    assert!(tree(&work, "parts", parts) == expected, "other files, another tree");
    // The test can fail: another document makes another tree.
    fs::write(work.path("fewer.jsonl"), lines[1..].join("\n")).unwrap();
    assert!(tree(&work, "fewer", "[\"fewer.jsonl\"]") != expected);
}
