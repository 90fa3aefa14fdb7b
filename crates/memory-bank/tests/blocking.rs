//! The bank from plain threads.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{TryRecvError, channel};
use std::thread;

use cluster_tree::ClusterId;
use memory_bank::{
    AdamW, BankOptions, Block, BlockSpec, Blocking, Error, LocalBank, Schedule, Step, init_block,
};

const ID: ClusterId = ClusterId { level: 0, index: 1 };

fn spec() -> BlockSpec {
    BlockSpec::ffn(1, 4, vec![2], vec![2])
}

fn bank(root: &Path) -> Arc<LocalBank> {
    let schedule = Schedule { peak: 0.1, floor: 0.1, warmup_steps: 0, total_steps: 1 };
    let adamw = AdamW { schedule, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, clip: None };
    let options = BankOptions {
        seed: 9,
        adamw,
        world_size: 1,
        staleness: 0,
        checkpoint_root: root.to_owned(),
        offload: None,
        hashes: BTreeMap::new(),
    };
    Arc::new(LocalBank::create(spec(), options).unwrap())
}

fn gradient() -> Vec<Block> {
    vec![Block { id: ID, values: vec![1.0; spec().block_len(0)] }]
}

#[test]
fn fetches_pushes_and_saves_from_a_plain_thread() {
    let dir = tempfile::tempdir().unwrap();
    let bank = Blocking::new(bank(dir.path())).unwrap();
    let before = bank.fetch(Step(0), &[ID]).unwrap().remove(0);
    assert_eq!(before.values, init_block(&spec(), 9, ID));
    bank.push(Step(1), 0, gradient()).unwrap();
    let after = bank.fetch(Step(1), &[ID]).unwrap().remove(0);
    // The first step of AdamW moves every value by the learning rate against the gradient's sign.
    for (before, after) in before.values.iter().zip(&after.values) {
        assert!((before - 0.1 - after).abs() < 1e-6, "{before} {after}");
    }
    bank.save(Step(1)).unwrap();
    let saved = Blocking::new(Arc::new(
        LocalBank::open_read_only(&dir.path().join("00000001").join("memory")).unwrap(),
    ));
    assert_eq!(saved.unwrap().fetch(Step(1), &[ID]).unwrap(), [after]);
    assert_eq!(bank.store().applied(), Step(1));
}

#[test]
fn a_fetch_waits_for_the_push_of_another_thread() {
    let dir = tempfile::tempdir().unwrap();
    let (bank, (sender, fetched)) = (bank(dir.path()), channel());
    let (asks, asked) = channel();
    let reader = Blocking::new(bank.clone()).unwrap();
    let waiting = thread::spawn(move || {
        asks.send(()).unwrap();
        sender.send(reader.fetch(Step(1), &[ID])).unwrap();
    });
    asked.recv().unwrap();
    assert!(matches!(fetched.try_recv(), Err(TryRecvError::Empty)), "nothing to fetch before the push");
    let writer = Blocking::new(bank).unwrap();
    writer.push(Step(1), 0, gradient()).unwrap();
    assert_eq!(fetched.recv().unwrap().unwrap(), writer.fetch(Step(1), &[ID]).unwrap());
    waiting.join().unwrap();
}

#[test]
fn errors_are_those_of_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let bank = Blocking::new(bank(dir.path())).unwrap();
    let unknown = ClusterId { level: 0, index: 2 };
    assert!(matches!(bank.fetch(Step(0), &[unknown]), Err(Error::UnknownBlock { n_blocks: 2, .. })));
    assert!(matches!(bank.push(Step(2), 0, gradient()), Err(Error::PushStep { found: Step(2), .. })));
    assert!(matches!(bank.save(Step(3)), Err(Error::SaveStep { expected: Step(3), applied: Step(0) })));
}
