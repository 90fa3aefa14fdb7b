//! Several workers, as threads: the bits of one.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cluster_tree::ClusterId;
use collective::{Mesh, local};
use memory_bank::{
    Block, BlockSpec, BlockStore, Blocking, Gradients, Live, Placement, Shard, ShardOptions, Step, owner,
};
use train::{Checkpoints, Ended, Error, Parts, Phase, TrainConfig, Trainer, Workers};

use crate::fixtures::*;

const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `work` as every worker of a job; returns what each made, by rank.
fn on_all<T: Send>(world_size: usize, work: impl Fn(Mesh) -> T + Sync) -> Vec<T> {
    let work = &work;
    std::thread::scope(|scope| {
        let meshes = local(world_size, PATIENCE);
        let threads: Vec<_> = meshes.into_iter().map(|mesh| scope.spawn(move || work(mesh))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// A worker that keeps the whole bank itself. The first one's folder is the run's.
fn replicated(mesh: Mesh) -> Workers {
    Workers { mesh, replicated: vec![true; 2], ..Workers::alone() }
}

fn small(phase: Phase) -> TrainConfig {
    TrainConfig { micro_batch: 2, batch_size: 12, ..config(phase) }
}

/// A worker on a bank that all share.
fn shared(mesh: Mesh) -> Workers {
    Workers { rank_at_bank: mesh.rank(), mesh, replicated: vec![false; 2], ..Workers::alone() }
}

/// What a run has shown and left behind.
fn left(world: &World, name: &str) -> Vec<std::collections::BTreeMap<std::path::PathBuf, Vec<u8>>> {
    let checkpoints = Checkpoints::of(&world.run_dir(name));
    let steps = checkpoints.steps().unwrap();
    assert_eq!(steps, [5, 10, 12]);
    steps.into_iter().map(|step| files(&checkpoints.dir(step))).collect()
}

fn assert_same(world: &World, expected: &str, found: &str) {
    for (expected, found) in left(world, expected).into_iter().zip(left(world, found)) {
        assert!(expected.keys().eq(found.keys()), "{:?} {:?}", expected.keys(), found.keys());
        for (path, bytes) in expected {
            assert!(found[&path] == bytes, "{} differs", path.display());
        }
    }
}

#[test]
fn any_number_of_workers_gives_the_bits_of_one() {
    for phase in [Phase::Anchor, Phase::Frozen, Phase::Cotrain] {
        let (world, config) = (World::new(), small(phase));
        let one = timeless(train(world.begin("one", &config)));
        for world_size in 2..=5 {
            let name = |rank| format!("workers{world_size}-{rank}");
            let all = on_all(world_size, |mesh| {
                let name = name(mesh.rank());
                let parts = Parts { workers: replicated(mesh), ..world.parts(&name, &config) };
                timeless(train(Trainer::new(parts, 700).unwrap()))
            });
            // All know what the whole job knows.
            for (rank, found) in all.iter().enumerate() {
                assert_eq!(*found, one, "{phase:?}, {world_size} workers, rank {rank}");
            }
            assert_same(&world, "one", &name(0));
            assert!(files(&world.run_dir(&name(1))).is_empty(), "the first alone writes files");
        }
    }
}

#[test]
fn a_run_goes_on_with_another_number_of_workers() {
    let (world, config) = (World::new(), small(Phase::Cotrain));
    train(world.begin("one", &config));
    // Two workers to a failure of one after step 7, then three.
    let ended = on_all(2, |mesh| {
        let rank = mesh.rank();
        let parts = Parts {
            workers: replicated(mesh),
            ..world.parts(if rank == 0 { "run" } else { "other" }, &config)
        };
        let mut trainer = Trainer::new(parts, 700).unwrap();
        let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            trainer.run(&mut |line| {
                if (line.step, rank) == (8, 1) {
                    std::panic::resume_unwind(Box::new("killed"));
                }
            })
        }));
        drop(trainer);
        killed.ok().map(|ran| ran.unwrap_err().to_string())
    });
    assert!(ended[1].is_none());
    let text = ended[0].as_ref().unwrap();
    assert!(text.contains("rank 1 is gone") && text.contains("of step 9"), "{text}");
    let (step, _) = world.resume("run", &config);
    assert_eq!(step, 5);
    let attempt = world.attempt("run");
    on_all(3, |mesh| {
        let dir = Checkpoints::of(&world.run_dir("run")).dir(5);
        let anchor = anchor::Anchor::load(&dir.join("anchor.safetensors"), CPU).unwrap();
        let options = bank_options(&attempt, &config);
        let bank = memory_bank::LocalBank::resume(&dir.join("memory"), spec(), options).unwrap();
        let parts = world.parts_with(attempt.clone(), &config, (anchor, Some(bank)));
        train(Trainer::resume(Parts { workers: replicated(mesh), ..parts }, 5).unwrap());
    });
    assert_same(&world, "one", "run");
}

#[test]
fn workers_told_to_stop_save_after_the_same_step_and_go_on() {
    let (world, config) = (World::new(), small(Phase::Cotrain));
    train(world.begin("one", &config));
    let stopped = on_all(2, |mesh| {
        let rank = mesh.rank();
        let parts = world.parts(if rank == 0 { "run" } else { "other" }, &config);
        let workers = replicated(mesh);
        let stop = Arc::clone(&workers.stop);
        let mut trainer = Trainer::new(Parts { workers, ..parts }, 700).unwrap();
        let ended = trainer.run(&mut |line| stop.store(line.step >= 6 && rank == 1, Ordering::Relaxed));
        (ended.unwrap(), trainer.state().step)
    });
    assert_eq!(stopped, [(Ended::Stopped, 7); 2]);
    let (step, trainer) = world.resume("run", &config);
    assert_eq!(step, 7);
    train(trainer);
    let [expected, found] = ["one", "run"].map(|name| Checkpoints::of(&world.run_dir(name)));
    assert_eq!(found.steps().unwrap(), [5, 7, 10, 12]);
    assert!(files(&expected.dir(12)) == files(&found.dir(12)));
}

/// A bank of several shards, which all workers share.
struct Sharded {
    spec: BlockSpec,
    shards: Vec<Live>,
}

impl Sharded {
    fn new(n_shards: usize, world_size: usize, config: &TrainConfig) -> Self {
        let staleness = config.staleness;
        let shard = |shard| {
            let placement = Placement { shard, n_shards };
            let options =
                ShardOptions { seed: 4, adamw: config.memory_adamw(), world_size, staleness, placement };
            Live::new(Shard::new(spec(), options).unwrap())
        };
        Self { spec: spec(), shards: (0..n_shards).map(shard).collect() }
    }
}

impl BlockStore for Sharded {
    fn spec(&self) -> &BlockSpec {
        &self.spec
    }

    async fn fetch(&self, after: Step, ids: &[ClusterId]) -> memory_bank::Result<Vec<Block>> {
        let mut blocks = vec![];
        for shard in &self.shards {
            shard.reached(after).await?;
        }
        for &id in ids {
            let values = self.shards[owner(id, self.shards.len())].fetch(&[id])?;
            blocks.push(Block { id, values: values[0].to_vec() });
        }
        Ok(blocks)
    }

    async fn push(&self, step: Step, rank: usize, grads: Vec<Block>) -> memory_bank::Result<()> {
        for (i, shard) in self.shards.iter().enumerate() {
            let own = grads.iter().filter(|block| owner(block.id, self.shards.len()) == i).cloned().collect();
            shard.push(step, rank, Gradients::new(&self.spec, own)?)?;
        }
        Ok(())
    }

    async fn save(&self, _: Step) -> memory_bank::Result<()> {
        Ok(())
    }
}

#[test]
fn any_number_of_workers_and_shards_gives_the_bits_of_one() {
    let (world, config) = (World::new(), small(Phase::Cotrain));
    let ids: Vec<ClusterId> = [(0, 2), (1, 4)]
        .into_iter()
        .flat_map(|(level, n)| {
            (0..n).chain([ClusterId::GENERIC]).map(move |index| ClusterId { level, index })
        })
        .collect();
    let mut expected = None;
    for (world_size, n_shards) in [(1, 1), (1, 3), (2, 1), (2, 3), (3, 1), (3, 3)] {
        let bank = Arc::new(Sharded::new(n_shards, world_size, &config));
        let all = on_all(world_size, |mesh| {
            let name = format!("{world_size}-{n_shards}-{}", mesh.rank());
            let Parts { attempt, config, corpus, anchor, .. } = world.parts(&name, &config);
            let memory = Some(Blocking::new(Arc::clone(&bank)).unwrap());
            let workers = shared(mesh);
            let parts = Parts { attempt, config, corpus, anchor, memory, workers };
            let mut trainer = Trainer::new(parts, 0).unwrap();
            let mut all = vec![];
            trainer.run(&mut |line| all.push(line.clone())).unwrap();
            (timeless(all), weights(trainer.anchor()))
        });
        let blocks = Blocking::new(bank).unwrap().fetch(Step(config.steps), &ids).unwrap();
        let blocks: Vec<Vec<u32>> =
            blocks.iter().map(|block| block.values.iter().map(|x| x.to_bits()).collect()).collect();
        for (_, anchor) in &all {
            assert!(*anchor == all[0].1);
        }
        let found = (all.into_iter().next().unwrap(), blocks);
        let expected = expected.get_or_insert_with(|| found.clone());
        assert!(*expected == found, "{world_size} workers, {n_shards} shards");
    }
}

#[test]
fn more_workers_than_micro_batches_are_refused() {
    let world = World::new();
    let refused = |batch_size, micro_batch| {
        let config = TrainConfig { batch_size, micro_batch, ..config(Phase::Anchor) };
        let mesh = local(3, PATIENCE).remove(0);
        let parts = Parts { workers: replicated(mesh), ..world.parts("run", &config) };
        match Trainer::new(parts, 0) {
            Err(error @ Error::Config { .. }) => error.to_string(),
            _ => panic!("taken"),
        }
    };
    let text = "train.micro_batch: expected at most 2, so that each of 3 workers has one, found 4";
    assert_eq!(refused(8, 4), text);
    assert_eq!(refused(2, 1), "train.batch_size: expected at least the number of workers (3), found 2");
}

/// With staleness the weights fetched may be of one step or of another, but what is learned is the same.
#[test]
fn a_stale_run_learns_and_keeps_its_steps_apart() {
    let world = World::new();
    let config = TrainConfig { staleness: 1, ..small(Phase::Cotrain) };
    let bank = Arc::new(Sharded::new(2, 2, &config));
    let all = on_all(2, |mesh| {
        let name = format!("stale-{}", mesh.rank());
        let Parts { attempt, config, corpus, anchor, .. } = world.parts(&name, &config);
        let memory = Some(Blocking::new(Arc::clone(&bank)).unwrap());
        let workers = shared(mesh);
        train(Trainer::new(Parts { attempt, config, corpus, anchor, memory, workers }, 0).unwrap())
    });
    assert_eq!(all[0].iter().map(|line| line.step).collect::<Vec<_>>(), (1..=12).collect::<Vec<_>>());
    assert!(all[0][11].loss < all[0][0].loss - 0.3, "it learns");
    assert!(bank.shards.iter().all(|shard| shard.applied() == Step(12)), "all that was pushed has arrived");
}
