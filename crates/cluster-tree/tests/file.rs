//! Tree files: the round trip, and what a bad file is told.

use std::fs;
use std::path::{Path, PathBuf};

use cluster_tree::{ClusterTree, Error, Level};
use safetensors::SafeTensors;

fn tree() -> ClusterTree {
    let centroids = |n: usize| (0..n * 3).map(|i| (i as f32 * 0.7).sin()).collect();
    let levels = vec![
        Level { branching: 2, centroids: centroids(2), counts: vec![7, 4] },
        Level { branching: 3, centroids: centroids(6), counts: vec![3, 4, 0, 1, 0, 3] },
    ];
    ClusterTree::new(3, levels).unwrap()
}

/// A saved tree whose header has `from` replaced by `to`, of the same length.
fn patched(folder: &Path, from: &str, to: &str) -> PathBuf {
    assert_eq!(from.len(), to.len());
    let path = folder.join("tree.safetensors");
    tree().save(&path).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
    bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn a_tree_survives_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tree.safetensors");
    tree().save(&path).unwrap();
    let loaded = ClusterTree::load(&path).unwrap();
    assert_eq!(loaded, tree());
    assert_eq!(loaded.hash(), tree().hash());

    let bytes = fs::read(&path).unwrap();
    loaded.save(&path).unwrap();
    assert_eq!(fs::read(&path).unwrap(), bytes, "saving over a file gives the same bytes");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file stays behind");
}

#[test]
fn the_file_is_plain_safetensors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tree.safetensors");
    tree().save(&path).unwrap();
    let bytes = fs::read(&path).unwrap();
    let (header_len, header) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!((header_len + 8) % 64, 0, "data is aligned");
    let metadata = header.metadata().clone().unwrap();
    assert_eq!((metadata["format"].as_str(), metadata["branching"].as_str()), ("anchorage.tree.v1", "2,3"));
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.tensor("level1.centroids").unwrap().shape(), [6, 3]);
    assert_eq!(
        tensors.tensor("level0.counts").unwrap().data(),
        [7, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]
    );
}

#[test]
fn a_truncated_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tree.safetensors");
    tree().save(&path).unwrap();
    let bytes = fs::read(&path).unwrap();
    for keep in [0, 7, 100, bytes.len() - 1] {
        fs::write(&path, &bytes[..keep]).unwrap();
        let error = ClusterTree::load(&path).unwrap_err();
        assert!(matches!(error, Error::Format { .. }), "{error}");
        assert!(error.to_string().starts_with(&format!("{}: not a complete", path.display())), "{error}");
    }
}

#[test]
fn a_wrong_tensor_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = |from: &str, to: &str| {
        let path = patched(folder.path(), from, to);
        let text = ClusterTree::load(&path).unwrap_err().to_string();
        text.strip_prefix(&format!("{}: ", path.display())).unwrap_or_else(|| panic!("{text}")).to_owned()
    };
    assert_eq!(error("[6, 3]", "[3, 6]"), "tensor \"level1.centroids\" is F32 [3, 6], expected F32 [6, 3]");
    assert_eq!(
        error("\"level1.counts\":{\"dtype\":\"U64\"", "\"level1.counts\":{\"dtype\":\"I64\""),
        "tensor \"level1.counts\" is I64 [6], expected U64 [6]"
    );
    assert_eq!(
        error("level1.counts", "levelX.counts"),
        "tensor \"level1.counts\" is missing, expected U64 [6]"
    );
    assert_eq!(
        error("level0.centroids", "levelX.centroids"),
        "tensor \"level0.centroids\" is missing, expected F32 [N, D]"
    );
    assert_eq!(
        error("tree.v1", "tree.v2"),
        "metadata \"format\" is \"anchorage.tree.v2\", expected anchorage.tree.v1"
    );
    assert_eq!(
        error("\"2,3\"", "\"2,x\""),
        "metadata \"branching\" is \"2,x\", expected comma-separated numbers"
    );
    assert_eq!(
        error("branching", "Branching"),
        "metadata \"branching\" is missing, expected comma-separated numbers"
    );
    assert_eq!(error("\"2,3\"", "\"3,2\""), "tensor \"level0.centroids\" is F32 [2, 3], expected F32 [3, 3]");
}

#[test]
fn arrays_that_make_no_tree_are_named_with_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tree.safetensors");
    tree().save(&path).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let text = ClusterTree::load(&path).unwrap_err().to_string();
    let expected = "centroid 5 of level 1 has squared norm NaN, expected at most 1e30";
    assert_eq!(text, format!("{}: {expected}", path.display()));
}

#[test]
fn files_that_cannot_be_opened_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("none/tree.safetensors");
    let text = ClusterTree::load(&missing).unwrap_err().to_string();
    assert!(text.starts_with(&format!("{}: ", missing.display())), "{text}");
    assert!(matches!(tree().save(&missing), Err(Error::Io { path, .. }) if path == missing));
}

#[test]
fn a_failed_save_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tree.safetensors");
    fs::create_dir(&path).unwrap(); // a folder cannot be replaced by a file
    assert!(matches!(tree().save(&path), Err(Error::Io { .. })));
    assert!(path.is_dir());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file stays behind");
}
