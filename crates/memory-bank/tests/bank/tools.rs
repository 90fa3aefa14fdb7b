//! What an administrator does with saved banks.

use std::fs;

use cluster_tree::ClusterId;
use half::bf16;
use memory_bank::{
    BankStore, Block, BlockStore, Checkpoint, MergeOptions, OnConflict, Precision, Step, StoreBank, diff,
    export, inspect_checkpoint, merge, reshard, verify_checkpoint,
};
use safetensors::{Dtype, SafeTensors};

use crate::shards::{Shards, expected, in_memory, open, small_parts};
use crate::support::{gradient, id, run, spec};

/// A bank saved after steps that push these blocks.
async fn saved(n_shards: usize, steps: &[&[ClusterId]]) -> Checkpoint {
    let store = open(&in_memory(), small_parts()).await;
    let mut shards = Shards::new(n_shards);
    for (i, ids) in steps.iter().enumerate() {
        let push = |step| -> Vec<Block> { ids.iter().map(|&id| gradient(id, step)).collect() };
        shards.train_by(i as u64 + 1, push);
        shards.save(&store).await.unwrap();
    }
    store.latest().await.unwrap().unwrap()
}

async fn target() -> BankStore {
    open(&in_memory(), small_parts()).await
}

#[test]
fn resharding_keeps_every_bit_and_drops_what_is_dead() {
    run(async {
        let store = open(&in_memory(), small_parts()).await;
        let mut shards = Shards::new(3);
        for step in 1..=5 {
            shards.train(step);
            shards.save(&store).await.unwrap();
        }
        let bank = store.latest().await.unwrap().unwrap();
        for n_shards in [1, 2, 5] {
            let resharded = reshard(&bank, &target().await, n_shards).await.unwrap();
            assert_eq!(resharded.manifest().n_shards, n_shards);
            let found = verify_checkpoint(&resharded).await.unwrap();
            assert_eq!(found.n_blocks, resharded.manifest().touched.iter().sum::<u64>());
            assert!(found.n_blocks < verify_checkpoint(&bank).await.unwrap().n_blocks);
            assert_eq!(Shards::restored(&resharded, 2).await.state(), expected(5));
            let of = async |checkpoint| inspect_checkpoint(checkpoint).await.unwrap().levels;
            assert_eq!(of(&resharded).await, of(&bank).await);
        }
        // A step of a bank has one save, and this one is another.
        assert!(reshard(&bank, &store, 1).await.is_err());
    });
}

#[test]
fn banks_of_subtrees_are_joined() {
    run(async {
        let (left, right) = ([id(0, 0), id(2, 1), id(2, 3)], [id(0, 1), id(2, 8)]);
        let first = saved(2, &[&left]).await;
        let second = saved(1, &[&right, &right, &[id(2, 11)]]).await;
        let options = MergeOptions { n_shards: 2, on_conflict: OnConflict::Refuse };
        let store = target().await;
        let (joined, merged) = merge(&[first.clone(), second.clone()], &store, options).await.unwrap();
        assert_eq!((merged.step, merged.n_blocks, merged.n_same, merged.n_conflicts), (Step(3), 6, 0, 0));
        verify_checkpoint(&joined).await.unwrap();
        let mut both = Shards::restored(&first, 1).await.state();
        both.extend(Shards::restored(&second, 1).await.state());
        assert_eq!(Shards::restored(&joined, 3).await.state(), both);

        // A bank with itself holds everything twice, all the same.
        let (again, merged) = merge(&[first.clone(), first.clone()], &target().await, options).await.unwrap();
        assert_eq!((merged.n_blocks, merged.n_same), (3, 3));
        assert_eq!(Shards::restored(&again, 1).await.state(), Shards::restored(&first, 1).await.state());
    });
}

#[test]
fn a_block_that_differs_is_named_unless_there_is_a_choice() {
    run(async {
        let first = saved(1, &[&[id(2, 1), id(2, 5)]]).await;
        let second = saved(1, &[&[id(2, 0)], &[id(2, 5)]]).await;
        let mut options = MergeOptions { n_shards: 1, on_conflict: OnConflict::Refuse };
        let store = target().await;
        let banks = [first.clone(), second.clone()];
        let text = merge(&banks, &store, options).await.err().unwrap().to_string();
        assert!(
            text.starts_with("block level2/5 is in ") && text.contains("00000001/manifest.json"),
            "{text}"
        );
        assert!(text.contains("00000002/manifest.json"), "{text}");
        assert!(store.steps().await.unwrap().is_empty());

        options.on_conflict = OnConflict::PreferFirst;
        let (joined, merged) = merge(&banks, &store, options).await.unwrap();
        assert_eq!((merged.n_blocks, merged.n_same, merged.n_conflicts), (3, 0, 1));
        let state = |checkpoint: Checkpoint| async move { Shards::restored(&checkpoint, 1).await.state() };
        assert_eq!(state(joined).await[&id(2, 5)], state(first).await[&id(2, 5)]);
    });
}

#[test]
fn a_difference_is_measured_by_level() {
    run(async {
        let first = saved(1, &[&[id(0, 0), id(2, 1), id(2, 5)]]).await;
        let second = saved(2, &[&[id(2, 1), id(2, 7)], &[id(2, 5), id(2, 7)]]).await;
        let levels = diff(&first, &second).await.unwrap();
        assert_eq!(levels.len(), 2);
        let level0 = &levels[0];
        assert_eq!((level0.only_first, level0.only_second, level0.equal, level0.changed), (1, 0, 0, 0));
        assert_eq!((level0.max_abs, level0.rms), (0.0, 0.0));
        let level2 = &levels[1];
        assert_eq!((level2.level, level2.only_first, level2.only_second), (2, 0, 1));
        assert_eq!((level2.equal, level2.changed), (1, 1));
        let fetch = async |checkpoint: &Checkpoint| {
            StoreBank::new(checkpoint.clone()).fetch(Step(0), &[id(2, 5)]).await.unwrap().remove(0).values
        };
        let pairs = fetch(&first).await.into_iter().zip(fetch(&second).await);
        let differences: Vec<f64> = pairs.map(|(a, b)| (f64::from(a) - f64::from(b)).abs()).collect();
        assert_eq!(level2.max_abs, differences.iter().copied().fold(0.0, f64::max));
        let squares: f64 = differences.iter().map(|difference| difference * difference).sum();
        assert!((level2.rms - (squares / 60.0).sqrt()).abs() < 1e-15 && level2.rms > 0.0);
    });
}

#[test]
fn an_export_is_every_block_in_one_file() {
    let root = tempfile::tempdir().unwrap();
    run(async {
        let bank = saved(3, &[&[id(0, 1), id(2, 1), id(2, 8)], &[id(2, 8), id(2, ClusterId::GENERIC)]]).await;
        let store = StoreBank::new(bank.clone());
        for (precision, dtype) in [(Precision::F32, Dtype::F32), (Precision::Bf16, Dtype::BF16)] {
            let path = root.path().join("bank #1 ä.safetensors");
            let exported = export(&bank, &path, precision).await.unwrap();
            let bytes = fs::read(&path).unwrap();
            assert_eq!(exported.bytes, bytes.len() as u64);
            let tensors = SafeTensors::deserialize(&bytes).unwrap();
            assert_eq!(tensors.len(), 2);
            for level in spec().levels() {
                let tensor = tensors.tensor(&format!("level{level}")).unwrap();
                let n_rows = spec().n_blocks(level) + 1;
                assert_eq!(
                    (tensor.dtype(), tensor.shape()),
                    (dtype, [n_rows, 2, 3, spec().width[level], 5].as_slice())
                );
                for (row, found) in tensor.data().chunks(tensor.data().len() / n_rows).enumerate() {
                    let index = if row + 1 == n_rows { ClusterId::GENERIC } else { row as u32 };
                    let block = store.fetch(Step(2), &[id(level as u8, index)]).await.unwrap().remove(0);
                    let expected: Vec<u8> = match precision {
                        Precision::F32 => block.values.iter().flat_map(|x| x.to_le_bytes()).collect(),
                        Precision::Bf16 => {
                            block.values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect()
                        }
                    };
                    assert_eq!(found, expected, "level {level} row {row}");
                }
            }
        }
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    });
}
