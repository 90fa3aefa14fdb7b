use cluster_tree::{ClusterId, ClusterPath};
use memory_bank::{BlockStore, Step, init_block};
use train::{Assign, Checkpoints, Error, Phase, TrainConfig, Trainer};

use crate::fixtures::*;

/// The blocks of a bank of which a value changed since it was made.
fn touched(blocks: &[memory_bank::Block]) -> Vec<String> {
    let changed = |block: &&memory_bank::Block| block.values != init_block(&spec(), 4, block.id);
    blocks.iter().filter(changed).map(|block| block.id.to_string()).collect()
}

fn all_ids() -> Vec<ClusterId> {
    let indices = [(0, 0), (0, 1), (0, ClusterId::GENERIC)];
    let deep = [(1, 0), (1, 1), (1, 2), (1, 3), (1, ClusterId::GENERIC)];
    indices.into_iter().chain(deep).map(|(level, index)| ClusterId { level, index }).collect()
}

/// Trains and returns the names of the blocks that changed.
fn touched_by(world: &World, name: &str, config: &TrainConfig) -> Vec<String> {
    let parts = world.parts(name, config);
    let bank = parts.memory.as_ref().unwrap().store().clone();
    train(Trainer::new(parts, 0).unwrap());
    assert_eq!(bank.applied(), Step(config.steps));
    let runtime = memory_bank::Blocking::new(bank).unwrap();
    assert_eq!(runtime.store().spec(), &spec());
    touched(&runtime.fetch(Step(config.steps), &all_ids()).unwrap())
}

#[test]
fn the_anchor_phase_has_no_memory() {
    let (world, config) = (World::new(), config(Phase::Anchor));
    let metrics = train(world.begin("anchor", &config));
    assert!(metrics[11].loss < metrics[0].loss - 0.3, "it learns");
    assert!(metrics.iter().all(|line| (line.n_blocks, line.memory_gradient_norm) == (0, 0.0)));
    let dir = Checkpoints::of(&world.run_dir("anchor")).dir(12);
    assert!(dir.join("optimizer.safetensors").exists() && !dir.join("memory").exists());
}

#[test]
fn the_frozen_phase_leaves_the_anchor_to_the_bit() {
    let (world, config) = (World::new(), config(Phase::Frozen));
    let before = weights(&world.fresh_anchor());
    let mut trainer = world.begin("frozen", &config);
    let mut losses = vec![];
    trainer.run(&mut |metrics| losses.push((metrics.loss, metrics.gradient_norm))).unwrap();
    assert_eq!(weights(trainer.anchor()), before);
    assert!(losses[11].0 < losses[0].0 - 0.02, "memory alone learns: {losses:?}");
    assert!(losses.iter().all(|&(_, norm)| norm == 0.0));
    let dir = Checkpoints::of(&world.run_dir("frozen")).dir(12);
    assert!(!dir.join("optimizer.safetensors").exists() && dir.join("memory").exists());

    train_until_killed(world.begin("killed", &config), 9);
    train(world.resume("killed", &config).1);
    let killed = files(&Checkpoints::of(&world.run_dir("killed")).dir(12));
    assert!(killed == files(&dir), "a frozen run resumes to the byte as well");
}

#[test]
fn fetched_runs_touch_the_leaves_and_always_on_runs_the_generic_path() {
    let world = World::new();
    let config = config(Phase::Cotrain);
    assert_eq!(touched_by(&world, "fetched", &config).len(), 8, "12 steps of 8 sequences meet every block");
    let always_on = TrainConfig { assign: Assign::AlwaysOn, ..config.clone() };
    assert_eq!(touched_by(&world, "always_on", &always_on), ["level0/generic", "level1/generic"]);
    let never = TrainConfig { generic_share: 0.0, ..config };
    assert!(!touched_by(&world, "never", &never).iter().any(|id| id.ends_with("generic")));
}

#[test]
fn always_on_fetches_two_blocks_a_step() {
    let (world, config) = (World::new(), config(Phase::Joint));
    let always_on = TrainConfig { assign: Assign::AlwaysOn, steps: 2, ..config };
    assert!(train(world.begin("always_on", &always_on)).iter().all(|line| line.n_blocks == 2));
    assert_eq!(ClusterPath::generic(2).unwrap().ids().count(), 2);
}

#[test]
fn weights_that_are_no_numbers_diverge_at_once() {
    let (world, config) = (World::new(), TrainConfig { save_every: 1, ..config(Phase::Cotrain) });
    let mut trainer = world.begin("nan", &config);
    let poison = &trainer.anchor().parameters()["final_norm"];
    poison.const_set(f32::NAN.into()).unwrap();
    let error = trainer.run(&mut |_| ()).unwrap_err();
    assert!(matches!(error, Error::Diverged { step: 1, what: "loss", .. }), "{error}");
    assert!(!Checkpoints::of(&world.run_dir("nan")).dir(1).exists());
    assert_eq!(trainer.state().step, 0);
}

#[test]
fn a_run_that_diverges_keeps_its_last_checkpoint_and_writes_no_other() {
    let (world, config) = (World::new(), config(Phase::Cotrain));
    train_until_killed(world.begin("diverged", &config), 6);
    let config = TrainConfig { learning_rate: 1e39, save_every: 1, z_loss: 0.0, ..config };
    let (_, mut trainer) = world.resume("diverged", &config);
    let error = trainer.run(&mut |_| ()).unwrap_err();
    let Error::Diverged { step: 6, what, last_loss, found } = error else { panic!("{error}") };
    assert_eq!(what, "loss after the update");
    assert!(last_loss.is_finite() && !found.is_finite(), "{error}");
    assert!(error.to_string().starts_with("step 6 diverged: "), "{error}");
    let checkpoints = Checkpoints::of(&world.run_dir("diverged"));
    assert_eq!(checkpoints.steps().unwrap(), [5]);
    assert!(!checkpoints.dir(6).exists());
}

#[test]
fn a_bank_too_many_or_too_few_is_an_error() {
    let world = World::new();
    let error = |phase, bank_of| {
        let mut parts = world.parts("run", &config(bank_of));
        parts.config.phase = phase;
        Trainer::new(parts, 0).err().unwrap().to_string()
    };
    let found = error(Phase::Cotrain, Phase::Anchor);
    assert_eq!(
        found,
        "train.phase: expected a phase with memory and a bank, or neither, found Cotrain without a bank"
    );
    assert!(error(Phase::Anchor, Phase::Frozen).ends_with("found Anchor with a bank"));
}

#[test]
fn settings_that_cannot_be_trained_with_are_errors() {
    let base = config(Phase::Anchor);
    let error = |config: TrainConfig| config.check().unwrap_err().to_string();
    let cases = [
        (TrainConfig { steps: 0, ..base.clone() }, "train.steps: expected at least 1, found 0"),
        (TrainConfig { keep: 0, ..base.clone() }, "train.keep: expected at least 1, found 0"),
        (
            TrainConfig { learning_rate: f64::NAN, ..base.clone() },
            "train.learning_rate: expected a number above 0, found NaN",
        ),
        (
            TrainConfig { beta2: 1.5, ..base.clone() },
            "train.beta2: expected a number from 0 to below 1, found 1.5",
        ),
        (TrainConfig { clip: -1.0, ..base }, "train.clip: expected 0 or more, found -1"),
    ];
    for (config, expected) in cases {
        assert_eq!(error(config), expected);
    }
}
