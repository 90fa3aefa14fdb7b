//! `anchorage tree`: what it tells of a small corpus, and edits that undo each other.

use std::fs;

use cluster_tree::ClusterTree;
use serde_json::Value;

use crate::support::{Workdir, half_written, write_npy};

fn prepared() -> Workdir {
    let work = Workdir::new();
    work.ok(&["prepare", "run.toml"]);
    work
}

fn tree(work: &Workdir) -> ClusterTree {
    ClusterTree::load(&work.path("prepared/tree.safetensors")).unwrap()
}

fn json(work: &Workdir, args: &[&str]) -> Value {
    let (out, _) = work.ok(args);
    serde_json::from_str(out.lines().last().unwrap()).unwrap()
}

/// The largest leaf and the two smallest of its siblings, as paths.
fn leaves(tree: &ClusterTree) -> [String; 3] {
    let counts = tree.counts(1);
    let largest = (0..16).max_by_key(|&leaf| counts[leaf]).unwrap();
    let parent = largest / 4;
    let mut siblings: Vec<usize> = (parent * 4..parent * 4 + 4).filter(|&leaf| leaf != largest).collect();
    siblings.sort_by_key(|&leaf| counts[leaf]);
    assert!(counts[siblings[0]] > 0, "{counts:?}");
    [largest, siblings[0], siblings[1]].map(|leaf| format!("{parent}/{leaf}"))
}

#[test]
fn inspect_and_purity_tell_of_every_level() {
    let work = prepared();
    let tree = tree(&work);
    let [leaf, ..] = leaves(&tree);
    let whole = json(&work, &["tree", "inspect", "run.toml", "--cluster", &leaf, "--json"]);
    assert_eq!(whole["tree"], tree.hash());
    let rows = whole["levels"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for (level, row) in rows.iter().enumerate() {
        let counts = tree.counts(level);
        assert_eq!(row["clusters"], counts.len());
        assert_eq!(row["max"], *counts.iter().max().unwrap());
        assert_eq!(row["cap"], 1.5 / 4.0);
        assert!(row["distance"].as_f64().is_some_and(|distance| distance > 0.0 && distance < 2.0), "{row}");
    }
    // A finer level is nearer to its texts, and purer.
    assert!(rows[1]["distance"].as_f64() < rows[0]["distance"].as_f64());
    let cluster = &whole["cluster"];
    let index: usize = leaf.split_once('/').unwrap().1.parse().unwrap();
    assert_eq!(cluster["points"], tree.counts(1)[index]);
    let n_terms = cluster["terms"].as_array().unwrap().len();
    assert!((1..=12).contains(&n_terms), "{cluster}");
    let distance = |key: &str| cluster[key][0]["distance"].as_f64().unwrap();
    assert!(distance("nearest") < distance("farthest"), "{cluster}");
    let parent = leaf.split_once('/').unwrap().0;
    let (text, _) = work.ok(&["tree", "inspect", "run.toml", "--cluster", parent]);
    assert_eq!(text.lines().filter(|line| line.starts_with("child ")).count(), 4, "{text}");

    let purity = json(&work, &["tree", "purity", "run.toml", "--json"]);
    assert_eq!(purity["levels"][1], rows[1]["labels"]);
    let of = |level: usize| purity["levels"][level]["purity"].as_f64().unwrap();
    assert!(of(0) > 0.2 && of(0) <= of(1) && of(1) <= 1.0, "{purity}");

    let (_, err) = work.ok(&["tree", "inspect", "run.toml", "--html"]);
    assert!(err.contains("prepared/tree.html"), "{err}");
    let page = fs::read_to_string(work.path("prepared/tree.html")).unwrap();
    assert!(page.contains("Cluster tree") && page.contains("\"branching\":[4,4]"));
    assert!(!page.contains("http:") && !page.contains("https:"));
    work.ok(&["tree", "inspect", "run.toml", "--html", "elsewhere.html"]);
    assert_eq!(page, fs::read_to_string(work.path("elsewhere.html")).unwrap());
    assert!(half_written(&work.path("prepared")).is_empty());
}

#[test]
fn a_split_and_a_merge_give_the_counts_back() {
    let work = prepared();
    let before = tree(&work);
    let [largest, a, b] = leaves(&before);
    work.fails(
        &["tree", "split", "run.toml", &largest],
        &[&format!("leaf {largest}: none of the 4 slots under its parent is empty"), "merge"],
    );
    // Without --write or --out nothing changes.
    let (_, told) = work.ok(&["tree", "merge", "run.toml", &a, &b]);
    assert!(told.contains("nothing written") && tree(&work).hash() == before.hash(), "{told}");
    work.ok(&["tree", "merge", "run.toml", &a, &b, "--out", "merged.safetensors"]);
    assert_eq!(tree(&work).hash(), before.hash());

    let (_, told) = work.ok(&["tree", "merge", "run.toml", &a, &b, "--write"]);
    let merged = tree(&work);
    assert_eq!(merged.hash(), ClusterTree::load(&work.path("merged.safetensors")).unwrap().hash());
    assert_eq!((merged.counts(0), merged.n_leaves()), (before.counts(0), 16));
    assert_eq!(merged.counts(1).iter().filter(|&&count| count == 0).count(), 1);
    assert!(told.contains(&before.hash()[..8]) && told.contains("refused"), "{told}");
    let kept = format!("prepared/tree.before-{}.safetensors", &before.hash()[..8]);
    assert_eq!(ClusterTree::load(&work.path(&kept)).unwrap().hash(), before.hash());

    // The corpus is packed again with the new tree, which is not clustered anew.
    let (_, prepared) = work.ok(&["prepare", "run.toml"]);
    assert!(prepared.contains("cluster: up to date") && !prepared.contains("pack: up to date"), "{prepared}");
    assert_eq!(tree(&work).hash(), merged.hash());

    let (out, _) = work.ok(&["tree", "split", "run.toml", &largest, "--write"]);
    let split = tree(&work);
    let free = (0..16).find(|&leaf| merged.counts(1)[leaf] == 0).unwrap();
    let (parent, _) = largest.split_once('/').unwrap();
    assert!(out.contains(&format!("{parent}/{free} takes {}", split.counts(1)[free])), "{out}");
    assert_eq!((split.counts(0), split.counts(1).contains(&0)), (before.counts(0), false));
    work.fails(&["tree", "split", "run.toml", "--over", "0.26"], &["none of the 4 slots under its parent"]);
    work.ok(&["tree", "merge", "run.toml", &format!("{parent}/{free}"), &largest, "--write"]);
    let sorted = |tree: &ClusterTree| {
        let mut counts = tree.counts(1).to_vec();
        counts.sort_unstable();
        counts
    };
    assert_eq!(sorted(&tree(&work)), sorted(&merged));
    let (out, _) = work.ok(&["tree", "split", "run.toml", "--over", "0.26"]);
    assert!(out.starts_with("split ") && out.contains("not split: leaf "), "{out}");
    let (out, _) = work.ok(&["tree", "split", "run.toml", "--over", "0.99"]);
    assert_eq!(out, "no leaf holds more than 99.0 % of its parent\n");
    assert!(half_written(&work.path("prepared")).is_empty());
}

#[test]
fn documents_that_are_there_already_lie_where_they_lie() {
    let work = prepared();
    let files = ["facts/corpus.jsonl", "facts/validation.jsonl"];
    let whole = json(&work, &[&["tree", "add", "run.toml", "--json"], &files[..]].concat());
    let corpus = json(&work, &["tree", "inspect", "run.toml", "--json"]);
    assert_eq!(whole["windows"], corpus["windows"]);
    assert_eq!(whole["distance"], whole["corpus_distance"]);
    let n = whole["windows"].as_u64().unwrap();
    let beyond = whole["new_topics"].as_u64().unwrap();
    // Several windows may lie as far as the 99th percentile, but some lie farther.
    assert!(beyond > 0 && beyond <= n - (n * 99).div_ceil(100), "{whole}");
}

#[test]
fn added_documents_count_on_their_path() {
    let work = prepared();
    let before = tree(&work);
    let known = fs::read_to_string(work.path("facts/corpus.jsonl")).unwrap();
    let known: Vec<&str> = known.lines().take(20).collect();
    let new = r#"{"id": "strange", "text": "Zymurgy qwertz vuvuzela xylophone jazz quokka."}"#;
    fs::write(work.path("new.jsonl"), format!("{}\n{new}\n", known.join("\n"))).unwrap();
    let (out, err) = work.ok(&["tree", "add", "run.toml", "new.jsonl", "--json"]);
    assert!(err.contains("nothing written"), "{err}");
    let lines: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (documents, whole) = (&lines[..21], &lines[21]);
    assert_eq!((whole["documents"].as_u64(), tree(&work).hash()), (Some(21), before.hash()));
    let sum = |key: &str| documents.iter().map(|line| line[key].as_u64().unwrap()).sum::<u64>();
    assert_eq!(
        (sum("windows"), sum("new_topics")),
        (whole["windows"].as_u64().unwrap(), whole["new_topics"].as_u64().unwrap())
    );
    let median = whole["corpus_distance"][0].as_f64().unwrap();
    assert_eq!(documents[20]["id"], "strange");
    assert!(documents[20]["distance"].as_f64().unwrap() > median, "{out}");

    work.ok(&["tree", "add", "run.toml", "new.jsonl", "--write"]);
    let after = tree(&work);
    for level in 0..2 {
        let all = |tree: &ClusterTree| tree.counts(level).iter().sum::<u64>();
        assert_eq!(all(&after), all(&before) + sum("windows"));
    }
    let grown = |line: &Value| {
        let leaf: usize = line["path"].as_str().unwrap().split_once('/').unwrap().1.parse().unwrap();
        after.counts(1)[leaf] > before.counts(1)[leaf]
            && after.counts(0)[leaf / 4] > before.counts(0)[leaf / 4]
    };
    assert!(documents.iter().all(grown), "{out}");
}

#[test]
fn wrong_clusters_and_missing_parts_are_told() {
    let work = prepared();
    let fails = |args: &[&str], part: &str| {
        let (command, rest) = args.split_first().unwrap();
        work.fails(&[&["tree", command, "run.toml"], rest].concat(), &[part])
    };
    fails(&["inspect", "--cluster", "7"], "no cluster 7: level 1 has the indices 0 to 3");
    fails(&["inspect", "--cluster", "0/5"], "no cluster 0/5: cluster 5 of level 2 is 1/5");
    fails(&["inspect", "--cluster", "gold"], "\"gold\" is not a cluster");
    fails(&["split", "2"], "2 is not a leaf: expected 2 indices, found 1");
    fails(&["split", "--over", "1.5"], "--over 1.5: expected a share above 0 and below 1");
    fails(&["merge", "0/0", "1/4"], "leaves 0/0 and 1/4 are not siblings");
    fails(&["merge", "0/0", "0/0"], "not siblings");
    fails(&["add", "nothing.jsonl"], "nothing.jsonl");
    work.fails(&["tree", "inspect", "none.toml"], &["none.toml"]);
    work.fails(&["tree", "inspect", "run.toml", "--set", "corpus.prepared=other"], &["other", "tokenise"]);

    let corpus =
        "{\"text\": \"a tale of salt and rain\"}\n{\"text\": \"gold in the river bed\"}\n".repeat(60);
    fs::write(work.path("plain.jsonl"), corpus).unwrap();
    let unlabelled = ["--set", "corpus.files=[\"plain.jsonl\"]", "--set", "corpus.prepared=plain"];
    fs::write(
        work.path("plain.toml"),
        fs::read_to_string(work.path("run.toml"))
            .unwrap()
            .replace("id_key = \"id\"\nlabel_key = \"label\"\n", "")
            .replace("validation_files = [\"facts/validation.jsonl\"]\n", ""),
    )
    .unwrap();
    work.ok(&[&["prepare", "plain.toml"], &unlabelled[..]].concat());
    work.fails(
        &[&["tree", "purity", "plain.toml"], &unlabelled[..]].concat(),
        &["plain: no document has a label"],
    );
}

#[test]
fn a_tree_of_embeddings_made_elsewhere() {
    let work = Workdir::new();
    write_npy(&work.path("points.npy"), 3000);
    let build = ["tree", "build", "points.npy", "--set", "tree.branching=[6, 5]", "--out"];
    let (_, err) = work.ok(&[&build[..], &["a.safetensors", "--leaves", "a.leaves"]].concat());
    assert!(err.contains("3000 points"), "{err}");
    assert_eq!(fs::read(work.path("a.leaves")).unwrap().len(), 12_000);
    // With hardly any memory, and from a URL: the same bytes. Nothing but the tree is left.
    work.ok(&[&build[..], &["b.safetensors", "--set", "tree.host_mib=0"]].concat());
    let url = format!("file://{}", work.path("points.npy").display());
    let mut remote = build;
    remote[2] = &url;
    work.ok(&[&remote[..], &["c.safetensors"]].concat());
    let tree = |name: &str| fs::read(work.path(name)).unwrap();
    assert!(tree("a.safetensors") == tree("b.safetensors") && tree("a.safetensors") == tree("c.safetensors"));
    let left =
        fs::read_dir(work.path("")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let left: Vec<String> = left.filter(|name| name.starts_with(['a', 'b', 'c'])).collect();
    assert_eq!(left.len(), 4, "{left:?}");

    let wrong = [&build[..], &["d.safetensors", "--dim", "9"]].concat();
    work.fails(&wrong, &["points.npy: expected 9 numbers a row as --dim says, found 8"]);
    let bytes = fs::read(work.path("points.npy")).unwrap();
    fs::write(work.path("points.npy"), &bytes[..bytes.len() - 4]).unwrap();
    work.fails(
        &[&build[..], &["d.safetensors"]].concat(),
        &["points.npy: expected a .npy file", "96124 bytes"],
    );
    fs::write(work.path("raw.f32"), &bytes[128..bytes.len() - 4]).unwrap();
    let raw = ["tree", "build", "raw.f32", "--dim", "8", "--out", "d.safetensors"];
    work.fails(&raw, &["raw.f32: 95996 bytes, expected a multiple of 32"]);
    let zeros = [&bytes[128..160], &[0; 32]].concat();
    fs::write(work.path("raw.f32"), zeros).unwrap();
    work.fails(&raw, &["point 1 has squared norm 0, expected one above 0"]);
    assert!(!work.path("d.safetensors").exists());
}
