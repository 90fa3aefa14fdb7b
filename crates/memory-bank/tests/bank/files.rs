use std::fs;
use std::path::{Path, PathBuf};

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
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        // Steps 1 and 2 push to indices that are 2 and 1 modulo 3, among them the generic ones' 2^32 - 1.
        for (level, rows, r) in [(0u8, vec![1u32], 3), (2, vec![1, 2, 4, 5, 7, 8, 10, 11], 2)] {
            let name = |suffix: &str| format!("level{level}{suffix}");
            let found = tensors.tensor(&name(".rows")).unwrap();
            assert_eq!((found.dtype(), found.data()), (Dtype::U32, bytemuck::cast_slice(&rows)));
            let checksums = tensors.tensor(&name(".crc32c")).unwrap();
            let tensor = tensors.tensor(&name("")).unwrap();
            assert_eq!((tensor.dtype(), tensor.shape()), (Dtype::F32, [rows.len(), 2, 3, r, 5].as_slice()));
            let blocks = tensor.data().chunks(tensor.data().len() / rows.len());
            for ((&row, bytes), checksum) in rows.iter().zip(blocks).zip(checksums.data().chunks(4)) {
                let block = bank.fetch(Step(2), &[id(level, row)]).await.unwrap().remove(0);
                let expected: Vec<u8> = block.values.iter().flat_map(|value| value.to_le_bytes()).collect();
                assert_eq!(bytes, expected, "level {level} row {row}");
                assert_eq!(crc32c::crc32c(bytes).to_le_bytes(), checksum);
            }
        }
        let level0 = tensors.tensor("level0").unwrap().data().as_ptr() as usize - bytes.as_ptr() as usize;
        assert_eq!(level0 % 64, 0, "data is aligned");
    });
}

#[test]
fn optimizer_state_is_that_of_the_touched_blocks() {
    let root = tempfile::tempdir().unwrap();
    let folder = run(saved(root.path(), 4));
    let bytes = fs::read(folder.join("optimizer.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    // Indices 0, 3, 6, 9 in step 3 push nothing; steps 1, 2 and 4 touch 2, 1 and 2 modulo 3.
    let rows = tensors.tensor("level2.rows").unwrap();
    assert_eq!(rows.data(), bytemuck::cast_slice::<u32, u8>(&[1, 2, 4, 5, 7, 8, 10, 11]));
    let steps = tensors.tensor("level2.steps").unwrap();
    assert_eq!((steps.dtype(), steps.shape()), (Dtype::U64, [8].as_slice()));
    let counts: Vec<u8> = steps.data().chunks(8).map(|count| count[0]).collect();
    assert_eq!(counts, [1, 2, 1, 2, 1, 2, 1, 2]);
    for name in ["level2.m", "level2.v"] {
        let tensor = tensors.tensor(name).unwrap();
        assert_eq!(tensor.shape(), [8, 2, 3, 2, 5]);
        assert!(tensor.data().chunks(240).all(|row| row.iter().any(|&byte| byte != 0)));
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
        assert_eq!(LocalBank::open_read_only(&folder).is_err(), name == "values.safetensors");
        assert!(verify(&folder, Verify::Sizes).is_err());

        let mut flipped = bytes.clone();
        flipped[len - 1] ^= 1;
        fs::write(&path, flipped).unwrap();
        let text = resume_error(&folder);
        assert!(text.starts_with(&format!("{name}: crc32c of block level2/11 is ")), "{text}");
        assert!(text.contains(", expected "), "{text}");
        verify(&folder, Verify::Sizes).unwrap();
        assert!(verify(&folder, Verify::Full).is_err());

        fs::remove_file(&path).unwrap();
        let text = resume_error(&folder);
        assert!(text.starts_with(&format!("{name}: ")) && text.contains("No such file"), "{text}");
        fs::write(&path, bytes).unwrap();
    }
    resume(&folder, root.path()).unwrap();
}

#[test]
fn a_mapped_block_is_checked_when_it_is_asked_for() {
    let root = tempfile::tempdir().unwrap();
    let folder = run(saved(root.path(), 2));
    let path = folder.join("values.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let bank = LocalBank::open_read_only(&folder).unwrap();
    run(async {
        bank.fetch(Step(2), &[id(2, 10)]).await.unwrap();
        for _ in 0..2 {
            let text = bank.fetch(Step(2), &[id(2, 10), id(2, 11)]).await.unwrap_err().to_string();
            assert!(
                text.starts_with(&format!("{}: crc32c of block level2/11 is ", path.display())),
                "{text}"
            );
        }
    });
}

/// The start of a file is what it must be to the byte, and is compared before anything else is.
#[test]
fn damaged_headers_are_named() {
    let root = tempfile::tempdir().unwrap();
    let folder = run(saved(root.path(), 2));
    let path = folder.join("values.safetensors");
    let bytes = fs::read(&path).unwrap();
    let open_error = |bytes: Vec<u8>| {
        fs::write(&path, bytes).unwrap();
        let text = LocalBank::open_read_only(&folder).err().unwrap().to_string();
        let named = format!("{}: ", path.display());
        let text = text.strip_prefix(&named).unwrap_or_else(|| panic!("{text}")).to_owned();
        let resumed = resume(&folder, root.path()).err().unwrap().to_string();
        assert_eq!(resumed, format!("{named}{text}"));
        text
    };
    let edited = |from: &str, to: &str| {
        let mut bytes = bytes.clone();
        let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
        bytes
    };
    let text = open_error(edited("[8,2,3,2,5]", "[8,3,2,2,5]"));
    assert!(text.starts_with("header at byte "), "{text}");
    assert!(text.contains("[8,3,2,2,5]") && text.contains("[8,2,3,2,5]"), "{text}");
    let text = open_error([&[255; 8][..], &bytes[8..]].concat());
    assert!(text.starts_with("header length is 18446744073709551615 bytes, expected "), "{text}");

    let metadata = SafeTensors::read_metadata(&bytes).unwrap();
    let rows = 8 + metadata.0 + metadata.1.info("level2.rows").unwrap().data_offsets.0;
    let with = |at: usize, row: u32| {
        let mut bytes = bytes.clone();
        bytes[rows + 4 * at..rows + 4 * at + 4].copy_from_slice(&row.to_le_bytes());
        bytes
    };
    assert_eq!(open_error(with(3, 4)), "row of level 2 after 4 is 4, expected at least 5");
    assert_eq!(open_error(with(7, 13)), "last row of level 2 is 13, expected at most 12");
    let text = open_error(with(7, 12));
    assert!(text.starts_with("sha256 of the index is ") && text.contains(", expected "), "{text}");
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
        "manifest.json: format is anchorage.bank.v9, expected anchorage.bank.v2"
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
        "manifest.json: number of touched blocks of level 2 is 8, expected 5"
    );
    assert_eq!(
        error(&|manifest| drop(manifest["segments"].as_array_mut().unwrap().pop())),
        "manifest.json: number of touched blocks of level 0 is 0, expected 1"
    );
    let text = error(&|manifest| drop(manifest["segments"][0].as_object_mut().unwrap().remove("optimizer")));
    assert!(text.starts_with("manifest.json: manifest is corrupt: missing field `optimizer`"), "{text}");
    let text = error(&|manifest| manifest["spec"]["d_model"] = 6.into());
    assert!(text.starts_with("manifest.json: bytes of values.safetensors is "), "{text}");
    assert_eq!(
        error(&|manifest| manifest["spec"]["n_layers"] = 0.into()),
        "manifest.json: spec is unfit (n_layers is 0, expected at least 1), expected one that makes a bank"
    );
    let text = error(&|manifest| manifest["surprise"] = 1.into());
    assert!(text.starts_with("manifest.json: manifest is corrupt: unknown field `surprise`"), "{text}");
    let text = error(&|manifest| manifest["segments"][0]["rows"][2] = (1u64 << 60).into());
    assert!(
        text.ends_with("rows of segment 0, level 2 is 1152921504606846976, expected at most 13"),
        "{text}"
    );
    for path in ["/etc/passwd", "../memory/values.safetensors", "a//b", "", ".", "a\\b", "x\u{0}"] {
        let text = error(&|manifest| manifest["segments"][0]["values"]["path"] = path.into());
        assert!(text.starts_with("manifest.json: path of a file is "), "{text}");
    }
    let twice = &|manifest: &mut serde_json::Value| {
        manifest["segments"][0]["optimizer"]["path"] = "values.safetensors".into();
    };
    assert_eq!(error(twice), "manifest.json: times that values.safetensors is named is 2, expected 1");
    let text = error(&|manifest| manifest["step"] = u64::MAX.into());
    assert!(text.starts_with("manifest.json: step is 18446744073709551615, expected at most "), "{text}");
    let text = error(&|manifest| manifest["n_shards"] = u64::MAX.into());
    assert!(text.contains("number of shards is n_shards is 18446744073709551615"), "{text}");
    let deep = "[".repeat(100_000);
    fs::write(folder.join("manifest.json"), deep).unwrap();
    assert!(resume_error(&folder).starts_with("manifest.json: manifest is corrupt: "));

    fs::write(folder.join("manifest.json"), &manifest[..manifest.len() / 2]).unwrap();
    assert!(resume_error(&folder).starts_with("manifest.json: manifest is corrupt: EOF"));
    fs::remove_file(folder.join("manifest.json")).unwrap();
    let text = resume_error(&folder);
    assert!(text.starts_with("manifest.json: ") && text.contains("No such file"), "{text}");
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
