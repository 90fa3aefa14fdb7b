//! Two who train one run, each in the belief that it is alone: as after a job was started again elsewhere.

use std::fs;
use std::sync::Arc;

use cluster_tree::ClusterId;
use memory_bank::{Block, BlockSpec, BlockStore, Blocking, LocalBank, Step};
use train::{Attempt, Checkpoints, Error, Parts, Phase, Trainer};

use crate::fixtures::*;

fn assert_taken_over(error: &Error, attempt: &Attempt) {
    let text = error.to_string();
    let run = attempt.run_dir().display();
    let expected = format!("{run}: attempt {} was taken over by attempt ", attempt.number());
    assert!(text.starts_with(&expected) && error.cause().is_none(), "{text}");
}

fn assert_same(world: &World, expected: &str, found: &str) {
    let read = |name: &str| {
        let steps = Checkpoints::of(&world.run_dir(name)).steps().unwrap();
        let files = files(&Checkpoints::of(&world.run_dir(name)).dir(12));
        let metrics = train::read_metrics(&world.run_dir(name).join("metrics.jsonl")).unwrap();
        (steps, files, timeless(metrics))
    };
    assert!(read(expected) == read(found));
}

#[test]
fn an_attempt_that_was_taken_over_writes_nothing_more() {
    let (world, config) = (World::new(), config(Phase::Cotrain));
    train(world.begin("straight", &config));
    let metrics = || fs::read(world.run_dir("run").join("metrics.jsonl")).unwrap();
    // Between two checkpoints, and just before one.
    for held in [7, 9] {
        let parts = world.parts("run", &config);
        let attempt = parts.attempt.clone();
        let mut first = Trainer::new(parts, 700).unwrap();
        let mut second = None;
        let error = first.run(&mut |line| {
            if line.step == held {
                // Until here the first one stands still.
                train(world.resume("run", &config).1);
                second = Some((metrics(), files(&world.run_dir("run").join("checkpoints"))));
            }
        });
        assert_taken_over(&error.unwrap_err(), &attempt);
        let (lines, saved) = second.unwrap();
        assert!(metrics() == lines && files(&world.run_dir("run").join("checkpoints")) == saved);
        assert_same(&world, "straight", "run");
        let again = Attempt::begin(attempt.run_dir(), Some(&attempt)).unwrap_err();
        assert_taken_over(&again, &attempt);
        fs::remove_dir_all(world.run_dir("run")).unwrap();
    }
}

/// A bank whose save takes so long that another attempt begins meanwhile.
struct Slow<'a> {
    bank: LocalBank,
    step: u64,
    meanwhile: &'a (dyn Fn() + Send + Sync),
}

impl BlockStore for Slow<'static> {
    fn spec(&self) -> &BlockSpec {
        self.bank.spec()
    }

    async fn fetch(&self, after: Step, ids: &[ClusterId]) -> memory_bank::Result<Vec<Block>> {
        self.bank.fetch(after, ids).await
    }

    async fn push(&self, step: Step, rank: usize, grads: Vec<Block>) -> memory_bank::Result<()> {
        self.bank.push(step, rank, grads).await
    }

    async fn save(&self, step: Step) -> memory_bank::Result<()> {
        if step == Step(self.step) {
            std::thread::scope(|scope| scope.spawn(|| (self.meanwhile)()).join()).unwrap();
        }
        self.bank.save(step).await
    }
}

/// The second one goes through the same step while the first one stands in the middle of saving it.
#[test]
fn a_save_that_was_held_still_disturbs_none_of_a_later_attempt() {
    let (world, config) = (Arc::new(World::new()), config(Phase::Cotrain));
    train(world.begin("straight", &config));
    for step in [5, 10] {
        let parts = world.parts("run", &config);
        let Parts { attempt, config, corpus, anchor, workers, .. } = parts;
        let bank = LocalBank::create(spec(), bank_options(&attempt, &config)).unwrap();
        let meanwhile = {
            let (world, config) = (Arc::clone(&world), config.clone());
            move || {
                let begin = |step| match step {
                    5 => world.begin("run", &config),
                    _ => world.resume("run", &config).1,
                };
                train(begin(step));
            }
        };
        let bank = Slow { bank, step, meanwhile: Box::leak(Box::new(meanwhile)) };
        let memory = Some(Blocking::new(Arc::new(bank)).unwrap());
        let first = attempt.clone();
        let parts = Parts { attempt, config, corpus, anchor, memory, workers };
        let error = Trainer::new(parts, 700).unwrap().run(&mut |_| ()).unwrap_err();
        assert_taken_over(&error, &first);
        assert_same(&world, "straight", "run");
        fs::remove_dir_all(world.run_dir("run")).unwrap();
    }
}

#[test]
fn attempts_have_rising_numbers_and_leave_nothing_behind() {
    let world = World::new();
    let dir = world.run_dir("run");
    let first = Attempt::begin(&dir, None).unwrap();
    fs::create_dir_all(first.dir().join("00000003")).unwrap();
    let second = Attempt::begin(&dir, Some(&first)).unwrap();
    let third = Attempt::begin(&dir, Some(&second)).unwrap();
    assert!(first.number() < second.number() && second.number() < third.number());
    assert_eq!(fs::read_dir(dir.join("attempts")).unwrap().count(), 1);
    assert_taken_over(&second.check().unwrap_err(), &second);
    third.check().unwrap();
    assert_eq!(Attempt::of(&dir, third.number()), third);
    // A clock that is behind does not let an attempt come before the last.
    fs::create_dir(dir.join("attempts/99999999999")).unwrap();
    assert_eq!(Attempt::begin(&dir, None).unwrap().number(), 100_000_000_000);
    // Many at once: one of them is the last.
    let all: Vec<Attempt> = std::thread::scope(|scope| {
        let begin = |_| scope.spawn(|| Attempt::begin(&dir, None));
        let threads: Vec<_> = (0..8).map(begin).collect();
        threads.into_iter().filter_map(|thread| thread.join().unwrap().ok()).collect()
    });
    assert_eq!(all.iter().filter(|attempt| attempt.check().is_ok()).count(), 1);
}
