//! The invariants of the workspace, held by reading its manifests and its sources.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Crates by layer; each uses crates of lower layers only.
const LAYERS: [&[&str]; 8] = [
    &["atomic-file", "collective", "launch", "nearest"],
    &["cluster-tree", "embed", "ops"],
    &["bert", "corpus", "kmeans", "memory-bank"],
    &["anchor", "memory-service", "retrieve"],
    &["generate", "shard-host"],
    &["eval"],
    &["serve", "train"],
    &["cli"],
];

/// Every edge between our crates, tests aside. A new one is a decision, and it is written here.
const EDGES: [(&str, &[&str]); 20] = [
    ("anchor", &["atomic-file", "cluster-tree", "memory-bank", "ops"]),
    (
        "cli",
        &[
            "anchor",
            "atomic-file",
            "bert",
            "cluster-tree",
            "collective",
            "corpus",
            "embed",
            "eval",
            "generate",
            "kmeans",
            "launch",
            "memory-bank",
            "memory-service",
            "nearest",
            "ops",
            "retrieve",
            "serve",
            "shard-host",
            "train",
        ],
    ),
    ("atomic-file", &[]),
    ("bert", &["embed", "ops"]),
    ("cluster-tree", &["atomic-file", "nearest"]),
    ("collective", &[]),
    ("corpus", &["atomic-file", "cluster-tree"]),
    ("embed", &["atomic-file"]),
    ("eval", &["anchor", "cluster-tree", "corpus", "generate", "memory-bank"]),
    ("generate", &["anchor", "cluster-tree", "corpus", "memory-bank"]),
    ("kmeans", &["cluster-tree", "nearest"]),
    ("launch", &[]),
    ("memory-bank", &["atomic-file", "cluster-tree"]),
    ("memory-service", &["atomic-file", "cluster-tree", "memory-bank"]),
    ("nearest", &[]),
    ("ops", &[]),
    ("retrieve", &["cluster-tree", "embed", "nearest"]),
    (
        "serve",
        &[
            "anchor",
            "cluster-tree",
            "corpus",
            "eval",
            "generate",
            "memory-bank",
            "memory-service",
            "retrieve",
        ],
    ),
    ("shard-host", &["memory-bank", "memory-service"]),
    (
        "train",
        &[
            "anchor",
            "atomic-file",
            "cluster-tree",
            "collective",
            "corpus",
            "eval",
            "generate",
            "memory-bank",
            "ops",
        ],
    ),
];

/// Crates that build without a tensor library, so that hosts of data and memory need no GPU software.
const WITHOUT_TENSORS: [&str; 11] = [
    "atomic-file",
    "cluster-tree",
    "collective",
    "corpus",
    "embed",
    "kmeans",
    "launch",
    "memory-bank",
    "memory-service",
    "nearest",
    "shard-host",
];

/// The only crate of ours that knows gRPC, and what it knows it by.
const GRPC: (&str, [&str; 2]) = ("memory-service", ["tonic", "prost"]);

/// Where unsafe code may be beside maps of files: kernels that choose their instructions at run time.
const KERNELS: [&str; 2] = ["crates/ops/", "crates/nearest/src/kernel.rs"];

/// The one function outside the kernels each of these files may hold that is unsafe: it maps a file.
const MAPS: [&str; 3] = [
    "crates/anchor/src/hf/files.rs",
    "crates/corpus/src/prepared/files.rs",
    "crates/memory-bank/src/tensor_file.rs",
];

/// Lines a file may have, and the files that may have more.
const MAX_LINES: usize = 550;
const LONG_FILES: [&str; 0] = [];

/// Split, so that this file does not hold what it looks for.
const NEVER: [&str; 5] = [
    concat!("todo", "!("),
    concat!("unimplemented", "!("),
    concat!("dbg", "!("),
    concat!("#[", "ignore"),
    concat!("thread::", "sleep"),
];

fn root() -> &'static Path {
    // The manifest that this test belongs to is crates/cli/Cargo.toml.
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap()
}

/// Our packages as `cargo metadata` tells them, by name.
fn packages() -> BTreeMap<String, Value> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["metadata", "--no-deps", "--format-version", "1", "--offline"]).current_dir(root());
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    packages.iter().map(|package| (text(&package["name"]), package.clone())).collect()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

/// Names of the dependencies of a package; of a kind: none is a normal one, or "dev", or "build".
fn dependencies(package: &Value, kind: Option<&str>) -> BTreeSet<String> {
    let all = package["dependencies"].as_array().unwrap();
    all.iter().filter(|found| found["kind"].as_str() == kind).map(|found| text(&found["name"])).collect()
}

/// The lines of code of every Rust file of the workspace, with their numbers: no comments.
fn sources() -> Vec<(String, String)> {
    let mut found = vec![];
    let mut folders = vec![root().join("crates"), root().join("tests")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
                found.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    assert!(found.len() > 50, "found only {} sources", found.len());
    found
}

/// Where code (not a comment) of a file holds `what`, as indices of lines.
fn places(source: &str, what: &str) -> Vec<usize> {
    let code = |line: &str| !line.trim_start().starts_with("//") && line.contains(what);
    source.lines().enumerate().filter(|(_, line)| code(line)).map(|(i, _)| i).collect()
}

fn layer(name: &str) -> usize {
    let layer = LAYERS.iter().position(|crates| crates.contains(&name));
    layer.unwrap_or_else(|| panic!("{name} has no layer in tests/tidy.rs"))
}

#[test]
fn crates_use_lower_layers_by_listed_edges() {
    let packages = packages();
    let ours: BTreeSet<String> = packages.keys().cloned().collect();
    let allowed: BTreeMap<&str, BTreeSet<String>> =
        EDGES.iter().map(|(name, edges)| (*name, edges.iter().map(ToString::to_string).collect())).collect();
    assert_eq!(
        ours.iter().map(String::as_str).collect::<Vec<_>>(),
        allowed.keys().copied().collect::<Vec<_>>()
    );
    for (name, package) in &packages {
        let edges = |kind| &dependencies(package, kind) & &ours;
        assert_eq!(edges(None), allowed[name.as_str()], "edges of {name}");
        for used in edges(None).iter().chain(&edges(Some("dev"))) {
            assert!(
                layer(used) < layer(name),
                "{name} (layer {}) uses {used} ({})",
                layer(name),
                layer(used)
            );
        }
    }
}

#[test]
fn hosts_of_data_and_memory_need_no_tensor_library() {
    let lock: toml::Table = toml::from_str(&fs::read_to_string(root().join("Cargo.lock")).unwrap()).unwrap();
    let mut uses: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in lock["package"].as_array().unwrap() {
        let listed = package.get("dependencies").and_then(toml::Value::as_array).into_iter().flatten();
        // "name" or "name version": versions together are more than what is used, never less.
        let names = listed.map(|used| used.as_str().unwrap().split(' ').next().unwrap());
        uses.entry(package["name"].as_str().unwrap()).or_default().extend(names);
    }
    let all_of = |name: &'static str| {
        let (mut reached, mut open) = (BTreeSet::new(), vec![name]);
        while let Some(next) = open.pop() {
            if reached.insert(next) {
                open.extend(&uses[next]);
            }
        }
        reached
    };
    assert!(all_of("anchor").contains("candle-core"), "Cargo.lock is not read as it should be");
    for name in WITHOUT_TENSORS {
        assert!(!all_of(name).contains("candle-core"), "{name} depends on candle-core");
    }
}

#[test]
fn unsafe_code_is_in_kernels_and_three_maps_and_says_why_it_is_safe() {
    let word = concat!("un", "safe ");
    let mut maps = vec![];
    for (name, source) in sources() {
        let lines: Vec<&str> = source.lines().collect();
        for place in places(&source, word) {
            let says = |place: usize, reason| {
                lines[place.saturating_sub(6)..place].iter().any(|line| line.contains(reason))
            };
            // A function that is unsafe to call says what its caller owes instead, a method once in its trait.
            let function =
                lines[place].split_once("fn ").map(|(_, rest)| rest.split(['(', '<']).next().unwrap());
            let is_declaration = lines[place].contains("fn");
            let explained = match function {
                _ if says(place, if is_declaration { "# Safety" } else { "SAFETY:" }) => true,
                Some(function) => {
                    let same = places(&source, &format!("{word}fn {function}"));
                    same.into_iter().any(|place| says(place, "# Safety"))
                }
                None => false,
            };
            let reason = if is_declaration { "# Safety" } else { "SAFETY:" };
            assert!(explained, "{name}:{}: no comment with `{reason}` above", place + 1);
            if !KERNELS.iter().any(|kernels| name.starts_with(kernels)) {
                maps.push(name.clone());
                assert!(lines[place].contains("Mmap::map("), "{name}:{}: {}", place + 1, lines[place]);
            }
        }
    }
    assert_eq!(maps, MAPS);
}

#[test]
fn only_the_program_reads_the_environment_and_uses_anyhow() {
    for (name, source) in sources() {
        let library = name.contains("/src/") && !name.starts_with("crates/cli/");
        let environment = places(&source, "env::");
        match name.as_str() {
            // `init_process` tells candle how many threads to use; it has no other way.
            "crates/ops/src/lib.rs" => assert_eq!(environment.len(), 1, "{name}"),
            // The shard's own program: credentials of its object store.
            "crates/shard-host/src/main.rs" => assert_eq!(environment.len(), 1, "{name}"),
            _ => assert!(
                !library || environment.is_empty(),
                "{name}: lines {environment:?} read the environment"
            ),
        }
    }
    for (name, package) in packages() {
        let uses = dependencies(&package, None).contains("anyhow");
        assert_eq!(uses, name == "cli", "{name} and anyhow");
    }
}

/// `cargo run` at the top, as the README has it, knows which of the programs is meant.
#[test]
fn one_program_is_run_unless_told() {
    let packages = packages();
    let defaults: Vec<&str> =
        packages.values().filter_map(|package| package["default_run"].as_str()).collect();
    assert_eq!(defaults, ["anchorage"]);
}

#[test]
fn only_the_service_knows_grpc() {
    for (name, package) in packages() {
        for grpc in GRPC.1 {
            let uses = dependencies(&package, None).contains(grpc);
            assert_eq!(uses, name == GRPC.0, "{name} and {grpc}");
        }
    }
}

#[test]
fn the_shard_is_a_value() {
    let shard = fs::read_to_string(root().join("crates/memory-bank/src/shard.rs")).unwrap();
    for outside in ["std::fs", "std::io", "std::time", "std::thread", "tokio", "rayon"] {
        assert!(places(&shard, outside).is_empty(), "shard.rs uses {outside}");
    }
}

#[test]
fn files_are_short_and_finished() {
    let mut long = vec![];
    for (name, source) in sources() {
        if source.lines().count() > MAX_LINES {
            long.push(name.clone());
        }
        for never in NEVER {
            let places = places(&source, never);
            assert!(places.is_empty(), "{name}:{}: `{never}`", places[0] + 1);
        }
    }
    assert_eq!(long, LONG_FILES, "files of more than {MAX_LINES} lines");
}

#[test]
fn manifests_inherit_and_are_named_as_their_folders() {
    for (name, package) in packages() {
        let manifest = PathBuf::from(text(&package["manifest_path"]));
        assert_eq!(manifest, root().join("crates").join(&name).join("Cargo.toml"));
        let table: toml::Table = toml::from_str(&fs::read_to_string(&manifest).unwrap()).unwrap();
        let inherits = |value: Option<&toml::Value>| {
            value.and_then(|value| value.get("workspace")).and_then(toml::Value::as_bool) == Some(true)
        };
        for key in ["version", "edition", "rust-version", "license", "publish"] {
            assert!(
                inherits(table["package"].get(key)),
                "{name}: package.{key} is not that of the workspace"
            );
        }
        // A crate with unsafe code cannot inherit its denial.
        let own_lints = name == "ops" && table["lints"]["rust"]["missing_docs"].as_str() == Some("warn");
        assert!(own_lints || inherits(table.get("lints")), "{name}: lints are not those of the workspace");
        for (dependency, value) in
            table.get("dependencies").and_then(toml::Value::as_table).into_iter().flatten()
        {
            assert!(inherits(Some(value)), "{name}: dependency {dependency} has a version of its own");
        }
        assert!(
            !["common", "core", "util", "utils", "shared"].contains(&name.as_str()),
            "{name} says nothing"
        );
    }
}
