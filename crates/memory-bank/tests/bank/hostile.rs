//! Files that were cut short, damaged or made to harm: refused by name, or what they were.

use std::sync::Arc;

use memory_bank::{BankStore, Checkpoint, verify_checkpoint};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::shards::{Shards, in_memory, open, small_parts};
use crate::support::run;

/// A bank of two saves, the second built on the first, and its files by name.
async fn bank() -> (Arc<dyn ObjectStore>, BankStore, Checkpoint) {
    let inner = in_memory();
    let store = open(&inner, small_parts()).await;
    let mut shards = Shards::new(2);
    for step in [1, 2] {
        shards.train(step);
        shards.save(&store).await.unwrap();
    }
    let saved = store.latest().await.unwrap().unwrap();
    (inner, store, saved)
}

/// What is found of the save at step 2: its state, as a restore and a full check see it.
async fn found(store: &BankStore) -> memory_bank::Result<Checkpoint> {
    let checkpoint = store.checkpoint(memory_bank::Step(2)).await?;
    for shard in 0..2 {
        checkpoint.load(&crate::shards::identity(), crate::shards::shard_options(shard, 2)).await?;
    }
    Ok(checkpoint)
}

/// The path of the first file whose name ends so.
fn name_of(saved: &Checkpoint, end: &str) -> String {
    let files = saved.manifest().segments.iter().flat_map(|segment| [&segment.values, &segment.optimizer]);
    let mut names = files.map(|file| file.path.clone()).chain(["00000002/manifest.json".to_owned()]);
    names.find(|name| name.ends_with(end)).unwrap()
}

/// Puts other bytes in the place of a file's, made from them by `damage`. Each is refused by its name or
/// does no harm. Returns how many were and did.
async fn each<I>(end: &str, damage: impl FnOnce(Vec<u8>) -> I) -> (usize, usize)
where
    I: Iterator<Item = Vec<u8>>,
{
    let (inner, store, saved) = bank().await;
    let state = Shards::restored(&saved, 1).await.state();
    let name = name_of(&saved, end);
    let path = Path::from(format!("banks/facts/{name}"));
    let original = inner.get(&path).await.unwrap().bytes().await.unwrap().to_vec();
    let (mut refused, mut harmless) = (0, 0);
    for bytes in damage(original) {
        inner.put(&path, bytes.into()).await.unwrap();
        match found(&store).await {
            Err(error) => {
                refused += 1;
                // A manifest that names another file is found out when that is not what it should be.
                let named = if end == "manifest.json" { "InMemory/banks/facts/" } else { &name };
                assert!(error.to_string().contains(named), "{name}: {error}");
            }
            Ok(checkpoint) => {
                harmless += 1;
                assert_eq!(Shards::restored(&checkpoint, 1).await.state(), state);
            }
        }
    }
    (refused, harmless)
}

#[test]
fn a_file_cut_short_or_grown_is_refused() {
    run(async {
        for name in ["values.safetensors", "optimizer.safetensors", "manifest.json"] {
            let cuts = |bytes: Vec<u8>| (0..bytes.len()).map(move |len| bytes[..len].to_vec());
            let (refused, harmless) = each(name, cuts).await;
            // The last byte of a manifest is the end of its last line.
            assert_eq!(harmless, usize::from(name == "manifest.json"), "{name}: {refused} refused");
            let grown = |bytes: Vec<u8>| {
                [&b"x"[..], &[0; 100], b"{}"].map(|more| [&bytes[..], more].concat()).into_iter()
            };
            assert_eq!(each(name, grown).await, (3, 0), "{name}");
        }
    });
}

#[test]
fn a_flipped_bit_is_refused_or_does_no_harm() {
    const N_FLIPS: usize = 3000;
    run(async {
        for name in ["values.safetensors", "optimizer.safetensors", "manifest.json"] {
            let flips = |bytes: Vec<u8>| {
                let mut rng = ChaCha8Rng::seed_from_u64(1);
                (0..N_FLIPS).map(move |_| {
                    let mut bytes = bytes.clone();
                    let at = rng.random_range(0..bytes.len());
                    bytes[at] ^= 1 << rng.random_range(0..8);
                    bytes
                })
            };
            let (refused, harmless) = each(name, flips).await;
            match name {
                // Spaces, and hashes of whole files, which a restore does not need.
                "manifest.json" => assert!(refused > N_FLIPS / 3, "{refused} refused, {harmless} harmless"),
                _ => assert_eq!((refused, harmless), (N_FLIPS, 0), "{name}"),
            }
        }
    });
}

/// A hash that a restore does not need is checked by who reads everything.
#[test]
fn a_full_check_finds_a_wrong_hash() {
    run(async {
        let (inner, store, saved) = bank().await;
        verify_checkpoint(&saved).await.unwrap();
        let text = serde_json::to_string(saved.manifest()).unwrap();
        for file in saved.manifest().segments.iter().flat_map(|segment| [&segment.values, &segment.optimizer])
        {
            let wrong = text.replace(&file.sha256, &"0".repeat(64));
            inner.put(&Path::from("banks/facts/00000002/manifest.json"), wrong.into()).await.unwrap();
            let error = verify_checkpoint(&found(&store).await.unwrap()).await.unwrap_err().to_string();
            assert!(error.contains(&format!("{}: sha256 is {}", file.path, file.sha256)), "{error}");
        }
    });
}

/// Counts that would need more memory than there is are refused before any is asked for.
#[test]
fn hostile_sizes_are_refused_at_once() {
    run(async {
        let (inner, store, saved) = bank().await;
        let manifest = serde_json::to_value(saved.manifest()).unwrap();
        let huge = |edit: &dyn Fn(&mut serde_json::Value)| {
            let mut manifest = manifest.clone();
            edit(&mut manifest);
            serde_json::to_vec(&manifest).unwrap()
        };
        let edits: [(&str, Vec<u8>); 6] = [
            ("unfit", huge(&|m| m["spec"]["branching"] = vec![1u64 << 40; 3].into())),
            ("unfit", huge(&|m| m["spec"]["d_model"] = u64::MAX.into())),
            ("bytes of ", huge(&|m| m["spec"]["n_layers"] = (1u64 << 40).into())),
            ("expected at most 13", huge(&|m| m["segments"][0]["rows"][2] = u64::MAX.into())),
            ("index bytes of ", huge(&|m| m["segments"][0]["values"]["index_bytes"] = (1u64 << 50).into())),
            ("bytes of ", huge(&|m| m["segments"][0]["values"]["bytes"] = (1u64 << 50).into())),
        ];
        for (expected, bytes) in edits {
            inner.put(&Path::from("banks/facts/00000002/manifest.json"), bytes.into()).await.unwrap();
            let text = found(&store).await.err().unwrap().to_string();
            assert!(text.contains("manifest.json: ") && text.contains(expected), "{text}");
        }
        // A spec of so many blocks that an index of all of them has 32 GiB, with counts that agree.
        let huge = huge(&|m| {
            m["spec"] = serde_json::json!({"kind": "ffn", "n_layers": 1, "d_model": 1, "width": [1], "branching": [4294967290u64]});
            m["touched"] = serde_json::json!([4294967290u64]);
            let segment = m["segments"][0].clone();
            m["segments"] = serde_json::json!([segment]);
            m["segments"][0]["rows"] = serde_json::json!([4294967290u64]);
        });
        inner.put(&Path::from("banks/facts/00000002/manifest.json"), huge.into()).await.unwrap();
        let text = found(&store).await.err().unwrap().to_string();
        assert!(text.contains("bytes of "), "{text}");
    });
}
