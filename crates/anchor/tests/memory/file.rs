//! anchor.safetensors: written and read to the bit, and refused when it is not whole.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anchor::Anchor;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use sha2::{Digest, Sha256};

use crate::fixtures::*;

fn saved(tied: bool) -> (tempfile::TempDir, PathBuf, Anchor) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("anchor.safetensors");
    let anchor = Anchor::new(config(tied), 11, CPU).unwrap();
    anchor.save(&path).unwrap();
    (dir, path, anchor)
}

fn load_error(path: &Path) -> String {
    let error = Anchor::load(path, CPU).err().expect("the file is not whole").to_string();
    assert!(error.starts_with(&path.display().to_string()) && !error.contains('\n'), "{error}");
    error
}

/// Writes the file anew with what `change` makes of its tensors: name, shape, values.
fn rewrite(path: &Path, change: impl FnOnce(&mut Vec<(String, Vec<usize>, Vec<u8>)>)) {
    let bytes = fs::read(path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata: Option<HashMap<String, String>> = metadata.metadata().clone();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<_> = tensors
        .iter()
        .map(|(name, view)| (name.to_string(), view.shape().to_vec(), view.data().to_vec()))
        .collect();
    change(&mut all);
    let views = all.iter().map(|(name, shape, data)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data).unwrap())
    });
    fs::write(path, safetensors::serialize(views, metadata).unwrap()).unwrap();
}

#[test]
fn what_is_saved_is_loaded_to_the_bit() {
    for tied in [true, false] {
        let (dir, path, anchor) = saved(tied);
        let loaded = Anchor::load(&path, CPU).unwrap();
        assert_eq!(loaded.config(), anchor.config());
        assert_eq!(loaded.parameters().len(), anchor.parameters().len());
        for (name, parameter) in anchor.parameters() {
            assert_eq!(bits(&values(&loaded.parameters()[name])), bits(&values(parameter)), "{name}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }
}

#[test]
fn an_anchor_is_known_by_the_hash_of_its_file() {
    let (_dir, path, anchor) = saved(true);
    let digest = Sha256::digest(fs::read(path).unwrap());
    let digits: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(anchor.sha256().unwrap(), digits);
}

#[test]
fn the_same_weights_make_the_same_bytes() {
    let (dir, path, anchor) = saved(true);
    for i in 0..16 {
        let again = dir.path().join(format!("{i}.safetensors"));
        anchor.save(&again).unwrap();
        assert_eq!(fs::read(&again).unwrap(), fs::read(&path).unwrap());
    }
}

#[test]
fn tensors_that_are_missing_misshapen_or_too_many() {
    let (_dir, path, _) = saved(false);
    rewrite(&path, |all| all.retain(|(name, ..)| name != "layers.1.key"));
    assert!(load_error(&path).ends_with("tensor layers.1.key is missing"));

    let (_dir, path, _) = saved(true);
    rewrite(&path, |all| {
        let key = all.iter_mut().find(|(name, ..)| name == "layers.0.key").unwrap();
        key.1 = vec![16, 12];
    });
    assert!(load_error(&path).ends_with("tensor layers.0.key: expected shape [12, 16], found [16, 12]"));

    let (_dir, path, _) = saved(true);
    rewrite(&path, |all| all.push(("layers.2.key".into(), vec![1], vec![0; 4])));
    assert!(load_error(&path).ends_with("tensor layers.2.key is not part of this anchor"));
}

#[test]
fn files_that_are_cut_foreign_or_absent() {
    let (_dir, path, _) = saved(true);
    let whole = fs::read(&path).unwrap();
    for len in [0, 4, 100, whole.len() - 1] {
        fs::write(&path, &whole[..len]).unwrap();
        load_error(&path);
    }
    let tensor = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
    fs::write(&path, safetensors::serialize([("final_norm", tensor)], None).unwrap()).unwrap();
    assert!(load_error(&path).contains("expected format anchorage.anchor.v1, found none"));
    fs::remove_file(&path).unwrap();
    load_error(&path);
}

#[test]
fn a_save_that_fails_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("anchor.safetensors");
    // A folder that is not empty cannot be replaced by a file.
    fs::create_dir_all(path.join("in-the-way")).unwrap();
    let error = anchor().save(&path).unwrap_err().to_string();
    assert!(error.starts_with(&path.display().to_string()), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the temporary file is removed");
}
