use std::fs;
use std::path::{Path, PathBuf};

use cluster_tree::ClusterId;
use memory_bank::{BlockStore, Error, LocalBank, Manifest, Step, Verify, inspect, verify};
use safetensors::{Dtype, SafeTensors};

use crate::support::{all_ids, bits, blocks, gradients, id, options, run, spec, train};

/// A bank of one rank trained and saved at `step`; returns its `memory` folder.
async fn saved(root: &Path, step: u64) -> PathBuf {
    let bank = LocalBank::create(spec(), options(1, root)).unwrap();
    train(&bank, 0, step).await;
    bank.save(Step(step)).await.unwrap();
    root.join(format!("{step:08}/memory"))
}

fn resume(folder: &Path, root: &Path) -> Result<LocalBank, Error> {
    LocalBank::resume(folder, spec(), options(1, root))
}

/// The error of a resume, without the folder's name in front.
fn resume_error(folder: &Path) -> String {
    let text = resume(folder, folder).err().unwrap().to_string();
    let prefix = format!("{}/", folder.display());
    text.strip_prefix(&prefix).unwrap_or_else(|| panic!("{text}")).to_owned()
}

/// Rewrites the manifest of a folder.
fn edit_manifest(folder: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let path = folder.join("manifest.json");
    let mut manifest = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut manifest);
    fs::write(&path, serde_json::to_vec(&manifest).unwrap()).unwrap();
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_resumed_bank_continues_to_the_bit_from_every_step() {
    const N_STEPS: u64 = 6;
    let root = tempfile::tempdir().unwrap();
    run(async {
        let bank = LocalBank::create(spec(), options(1, root.path())).unwrap();
        bank.save(Step(0)).await.unwrap();
        for step in 1..=N_STEPS {
            train(&bank, step - 1, step).await;
            bank.save(Step(step)).await.unwrap();
        }
        let last: Manifest = verify(&root.path().join("00000006/memory"), Verify::Full).unwrap();
        for step in 0..=N_STEPS {
            let other = tempfile::tempdir().unwrap();
            let folder = root.path().join(format!("{step:08}/memory"));
            let resumed = resume(&folder, other.path()).unwrap();
            assert_eq!(resumed.applied(), Step(step));
            train(&resumed, step, N_STEPS).await;
            assert_eq!(bits(&blocks(&resumed).await), bits(&blocks(&bank).await));
            // Weights, moments and counts: the files are the same to the byte.
            resumed.save(Step(N_STEPS)).await.unwrap();
            assert_eq!(verify(&other.path().join("00000006/memory"), Verify::Full).unwrap(), last);
        }
    });
}

#[test]
fn pushes_of_an_unfinished_step_are_not_saved() {
    let root = tempfile::tempdir().unwrap();
    run(async {
        let bank = LocalBank::create(spec(), options(2, root.path())).unwrap();
        for rank in 0..2 {
            bank.push(Step(1), rank, gradients(1, rank)).await.unwrap();
        }
        bank.push(Step(2), 1, gradients(2, 1)).await.unwrap();
        bank.save(Step(1)).await.unwrap();
        let folder = root.path().join("00000001/memory");
        let resumed = LocalBank::resume(&folder, spec(), options(2, root.path())).unwrap();
        bank.push(Step(2), 0, gradients(2, 0)).await.unwrap();
        for rank in 0..2 {
            resumed.push(Step(2), rank, gradients(2, rank)).await.unwrap();
        }
        assert_eq!(bits(&blocks(&resumed).await), bits(&blocks(&bank).await));
    });
}

#[test]
fn the_files_are_plain_safetensors() {
    let root = tempfile::tempdir().unwrap();
    run(async {
        let folder = saved(root.path(), 2).await;
        assert_eq!(names(&folder), ["manifest.json", "optimizer.safetensors", "values.safetensors"]);
        assert_eq!(names(folder.parent().unwrap()), ["memory"]);

        let bank = resume(&folder, root.path()).unwrap();
        let bytes = fs::read(folder.join("values.safetensors")).unwrap();
        assert_eq!((SafeTensors::read_metadata(&bytes).unwrap().0 + 8) % 64, 0, "data is aligned");
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(tensors.len(), 2);
        for (level, n_rows, r) in [(0u8, 3, 3), (2, 13, 2)] {
            let tensor = tensors.tensor(&format!("level{level}")).unwrap();
            assert_eq!((tensor.dtype(), tensor.shape()), (Dtype::F32, [n_rows, 2, 3, r, 5].as_slice()));
            for (row, bytes) in tensor.data().chunks(tensor.data().len() / n_rows).enumerate() {
                let index = if row + 1 == n_rows { ClusterId::GENERIC } else { row as u32 };
                let block = bank.fetch(Step(2), &[id(level, index)]).await.unwrap().remove(0);
                let expected: Vec<u8> = block.values.iter().flat_map(|value| value.to_le_bytes()).collect();
                assert_eq!(bytes, expected, "level {level} row {row}");
            }
        }
    });
}

#[test]
fn optimizer_state_of_untouched_blocks_is_zero() {
    let root = tempfile::tempdir().unwrap();
    let folder = run(saved(root.path(), 4));
    let bytes = fs::read(folder.join("optimizer.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.len(), 6);
    // Indices 0, 3, 6, 9 in step 3 push nothing; steps 1, 2 and 4 touch 2, 1 and 2 modulo 3.
    let steps = tensors.tensor("level2.steps").unwrap();
    assert_eq!((steps.dtype(), steps.shape()), (Dtype::U64, [13].as_slice()));
    let counts: Vec<u8> = steps.data().chunks(8).map(|count| count[0]).collect();
    assert_eq!(counts, [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0]);
    for name in ["level2.m", "level2.v"] {
        let tensor = tensors.tensor(name).unwrap();
        assert_eq!(tensor.shape(), [13, 2, 3, 2, 5]);
        for (row, &count) in tensor.data().chunks(240).zip(&counts) {
            assert_eq!(row.iter().all(|&byte| byte == 0), count == 0);
        }
    }
}

#[test]
fn a_read_only_bank_serves_its_step_and_nothing_else() {
    let root = tempfile::tempdir().unwrap();
    run(async {
        let folder = saved(root.path(), 3).await;
        let live = resume(&folder, root.path()).unwrap();
        let bank = LocalBank::open_read_only(&folder).unwrap();
        assert_eq!((bank.spec(), bank.applied(), bank.hashes()), (&spec(), Step(3), live.hashes()));
        assert_eq!(bits(&blocks(&bank).await), bits(&blocks(&live).await));

        let text = |result: Result<(), Error>| result.unwrap_err().to_string();
        let push = bank.push(Step(4), 0, Vec::new()).await;
        assert_eq!(text(push), "cannot push step 4: the bank at step 3 is open read-only");
        assert_eq!(
            text(bank.save(Step(3)).await),
            "cannot save step 3: the bank at step 3 is open read-only"
        );
        let fetch = bank.fetch(Step(4), &all_ids()).await.map(|_| ());
        assert_eq!(text(fetch), "fetch after step 4, but the bank is open read-only at step 3");
        let unknown = bank.fetch(Step(0), &[id(2, 12)]).await.map(|_| ());
        assert_eq!(text(unknown), "no block level2/12: level 2 has 12 blocks");
    });
}

#[test]
fn a_save_of_another_step_is_refused() {
    let root = tempfile::tempdir().unwrap();
    run(async {
        let bank = LocalBank::create(spec(), options(1, root.path())).unwrap();
        train(&bank, 0, 2).await;
        let text = bank.save(Step(3)).await.unwrap_err().to_string();
        assert_eq!(text, "save of step 3, but the bank is at step 2");
        assert!(names(root.path()).is_empty());
    });
}

#[test]
fn a_save_replaces_what_an_earlier_run_left() {
    let root = tempfile::tempdir().unwrap();
    run(async {
        let folder = saved(root.path(), 2).await;
        let first = verify(&folder, Verify::Full).unwrap();
        fs::write(folder.join("values.safetensors"), "cut short").unwrap();
        fs::create_dir(folder.with_extension("tmp")).unwrap();
        fs::write(folder.with_extension("tmp").join("junk"), "of a run that was killed").unwrap();
        saved(root.path(), 2).await;
        assert_eq!(verify(&folder, Verify::Full).unwrap(), first);
        assert_eq!(names(folder.parent().unwrap()), ["memory"]);
        assert_eq!(names(&folder).len(), 3);
    });
}

#[test]
fn saves_at_the_same_time_take_turns() {
    let root = tempfile::tempdir().unwrap();
    run(async {
        let bank = LocalBank::create(spec(), options(1, root.path())).unwrap();
        train(&bank, 0, 2).await;
        let saves: Vec<_> = (0..8)
            .map(|_| {
                let bank = bank.clone();
                tokio::spawn(async move { bank.save(Step(2)).await })
            })
            .collect();
        for save in saves {
            save.await.unwrap().unwrap();
        }
        verify(&root.path().join("00000002/memory"), Verify::Full).unwrap();
    });
}

#[test]
fn a_save_that_cannot_be_written_leaves_the_bank_running() {
    let root = tempfile::tempdir().unwrap();
    run(async {
        let blocked = root.path().join("checkpoints");
        fs::write(&blocked, "a file where the folder should be").unwrap();
        let bank = LocalBank::create(spec(), options(1, &blocked)).unwrap();
        train(&bank, 0, 1).await;
        let text = bank.save(Step(1)).await.unwrap_err().to_string();
        assert!(text.starts_with(&format!("{}/00000001: ", blocked.display())), "{text}");
        fs::remove_file(&blocked).unwrap();
        train(&bank, 1, 2).await;
        bank.save(Step(2)).await.unwrap();
        assert_eq!(resume(&blocked.join("00000002/memory"), root.path()).unwrap().applied(), Step(2));
    });
}

#[test]
fn damaged_files_are_named() {
    let root = tempfile::tempdir().unwrap();
    let folder = run(saved(root.path(), 2));
    for name in ["values.safetensors", "optimizer.safetensors"] {
        let path = folder.join(name);
        let bytes = fs::read(&path).unwrap();
        let len = bytes.len();

        fs::write(&path, &bytes[..len - 1]).unwrap();
        let text = format!("{name}: size is {} bytes, expected {len} bytes", len - 1);
        assert_eq!(resume_error(&folder), text);
        assert!(LocalBank::open_read_only(&folder).is_err());

        let mut flipped = bytes.clone();
        flipped[len - 1] ^= 1;
        fs::write(&path, flipped).unwrap();
        let text = resume_error(&folder);
        assert!(text.starts_with(&format!("{name}: sha256 is ")) && text.contains(", expected "), "{text}");
        verify(&folder, Verify::Sizes).unwrap();
        assert!(verify(&folder, Verify::Full).is_err());

        fs::remove_file(&path).unwrap();
        assert!(resume_error(&folder).starts_with(&format!("{name}: No such file")));
        fs::write(&path, bytes).unwrap();
    }
    resume(&folder, root.path()).unwrap();
}

#[test]
fn damaged_headers_are_named() {
    let root = tempfile::tempdir().unwrap();
    let folder = run(saved(root.path(), 2));
    let path = folder.join("values.safetensors");
    let bytes = fs::read(&path).unwrap();
    let open_error = |from: &str, to: &str| {
        let mut bytes = bytes.clone();
        let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
        fs::write(&path, bytes).unwrap();
        let text = LocalBank::open_read_only(&folder).err().unwrap().to_string();
        text.strip_prefix(&format!("{}: ", path.display())).unwrap_or_else(|| panic!("{text}")).to_owned()
    };
    let shape = "[13, 2, 3, 2, 5]";
    let text = format!("tensor \"level2\" is missing, expected F32 {shape}");
    assert_eq!(open_error("level2", "levelX"), text);
    let text = format!("tensor \"level2\" is F32 [13, 3, 2, 2, 5], expected F32 {shape}");
    assert_eq!(open_error("[13,2,3,2,5]", "[13,3,2,2,5]"), text);
    let text = format!("tensor \"level2\" is I32 {shape}, expected F32 {shape}");
    assert_eq!(open_error("\"F32\",\"shape\":[13", "\"I32\",\"shape\":[13"), text);
    assert!(open_error("{\"level0\"", "X\"level0\"").starts_with("header is corrupt: "));

    fs::write(&path, [&[255; 7][..], &bytes[7..]].concat()).unwrap();
    let text = LocalBank::open_read_only(&folder).err().unwrap().to_string();
    assert!(text.contains("header length is ") && text.contains("expected at most "), "{text}");
}

#[test]
fn a_manifest_that_lies_is_named() {
    let root = tempfile::tempdir().unwrap();
    let folder = run(saved(root.path(), 2));
    let manifest = fs::read(folder.join("manifest.json")).unwrap();
    let error = |edit: &dyn Fn(&mut serde_json::Value)| {
        edit_manifest(&folder, edit);
        let text = resume_error(&folder);
        fs::write(folder.join("manifest.json"), &manifest).unwrap();
        text
    };
    assert_eq!(
        error(&|manifest| manifest["format"] = "anchorage.bank.v9".into()),
        "manifest.json: format is anchorage.bank.v9, expected anchorage.bank.v1"
    );
    assert_eq!(error(&|manifest| manifest["seed"] = 8.into()), "manifest.json: seed is 8, expected 7");
    assert_eq!(
        error(&|manifest| manifest["hashes"]["tree"] = "ff".into()),
        "manifest.json: hash of tree is ff, expected a1"
    );
    assert_eq!(
        error(&|manifest| drop(manifest["hashes"].as_object_mut().unwrap().remove("tokenizer"))),
        "manifest.json: hash of tokenizer is missing, expected b2"
    );
    assert_eq!(
        error(&|manifest| manifest["hashes"]["anchor"] = "cc".into()),
        "manifest.json: hash of anchor is cc, expected missing"
    );
    assert_eq!(
        error(&|manifest| manifest["touched"] = serde_json::json!([1, 0])),
        "manifest.json: number of levels in touched is 2, expected 3"
    );
    assert_eq!(
        error(&|manifest| manifest["touched"][2] = 5.into()),
        "optimizer.safetensors: number of touched blocks of level 2 is 8, expected 5"
    );
    assert_eq!(
        error(&|manifest| drop(manifest["files"].as_object_mut().unwrap().remove("values.safetensors"))),
        "manifest.json: entry of values.safetensors is missing, expected present"
    );
    let text = error(&|manifest| manifest["spec"]["d_model"] = 6.into());
    assert!(text.starts_with("manifest.json: spec is BlockSpec {") && text.contains("d_model: 6"), "{text}");
    assert_eq!(
        error(&|manifest| manifest["spec"]["n_layers"] = 0.into()),
        "manifest.json: spec is unfit (n_layers is 0, expected at least 1), expected one that makes a bank"
    );
    let text = error(&|manifest| manifest["surprise"] = 1.into());
    assert!(text.starts_with("manifest.json: manifest is corrupt: unknown field `surprise`"), "{text}");

    fs::write(folder.join("manifest.json"), &manifest[..manifest.len() / 2]).unwrap();
    assert!(resume_error(&folder).starts_with("manifest.json: manifest is corrupt: EOF"));
    fs::remove_file(folder.join("manifest.json")).unwrap();
    assert!(resume_error(&folder).starts_with("manifest.json: No such file"));
}

#[test]
fn a_spec_that_differs_is_named() {
    let root = tempfile::tempdir().unwrap();
    let folder = run(saved(root.path(), 1));
    let mut wider = spec();
    wider.width[0] = 4;
    let text = LocalBank::resume(&folder, wider, options(1, root.path())).err().unwrap().to_string();
    assert!(text.contains("manifest.json: spec is ") && text.contains("width: [4, 0, 2]"), "{text}");
}

#[test]
fn an_inspection_counts_what_was_touched() {
    let root = tempfile::tempdir().unwrap();
    run(async {
        let folder = saved(root.path(), 4).await;
        let bank = LocalBank::open_read_only(&folder).unwrap();
        let inspection = inspect(&folder).unwrap();
        assert_eq!((inspection.manifest.step, &inspection.manifest.spec), (Step(4), &spec()));
        assert_eq!(inspection.levels.len(), 2);
        let level = &inspection.levels[1];
        assert_eq!((level.level, level.n_blocks, level.n_touched), (2, 12, 8));
        assert_eq!((level.n_parameters, level.bytes), (720, 13 * 240));
        assert_eq!((level.mean_updates, level.max_updates), (1.5, 2));
        let mut m3_squared = 0.0;
        for block in blocks(&bank).await.iter().filter(|block| block.id.level == 2) {
            let m3 = block.values[20..30].iter().chain(&block.values[50..60]);
            m3_squared += m3.map(|&value| f64::from(value).powi(2)).sum::<f64>();
        }
        assert!(m3_squared > 0.0);
        assert!((level.m3_norm - m3_squared.sqrt()).abs() < 1e-12);
    });
}

#[test]
fn an_untouched_bank_is_saved_in_full() {
    let root = tempfile::tempdir().unwrap();
    run(async {
        let folder = saved(root.path(), 0).await;
        let fresh = LocalBank::create(spec(), options(1, root.path())).unwrap();
        let bank = LocalBank::open_read_only(&folder).unwrap();
        assert_eq!(bits(&blocks(&bank).await), bits(&blocks(&fresh).await));
        for level in inspect(&folder).unwrap().levels {
            assert_eq!((level.n_touched, level.mean_updates, level.m3_norm), (0, 0.0, 0.0));
        }
    });
}
