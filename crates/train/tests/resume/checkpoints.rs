use std::fs;

use train::{Checkpoints, Phase, TrainConfig};

use crate::fixtures::*;

#[test]
fn a_folder_without_done_does_not_exist_and_is_replaced() {
    let (world, config) = (World::new(), config(Phase::Cotrain));
    train(world.begin("straight", &config));
    train_until_killed(world.begin("killed", &config), 7);
    let checkpoints = Checkpoints::of(&world.run_dir("killed"));
    for step in [10, 11] {
        fs::create_dir_all(checkpoints.dir(step).join("memory")).unwrap();
        fs::write(checkpoints.dir(step).join("anchor.safetensors"), "half of a").unwrap();
        fs::write(checkpoints.dir(step).join("left.tmp"), "").unwrap();
    }
    assert_eq!(checkpoints.latest().unwrap(), Some(5));
    train(world.resume("killed", &config).1);
    assert_eq!(checkpoints.steps().unwrap(), [5, 10, 12]);
    assert!(!checkpoints.dir(11).exists(), "what an interrupted save left is removed");
    let straight = Checkpoints::of(&world.run_dir("straight"));
    assert!(files(&checkpoints.dir(10)) == files(&straight.dir(10)));
}

#[test]
fn the_newest_checkpoints_are_kept() {
    let (world, config) = (World::new(), config(Phase::Anchor));
    let config = TrainConfig { steps: 6, save_every: 1, keep: 2, ..config };
    train(world.begin("run", &config));
    let checkpoints = Checkpoints::of(&world.run_dir("run"));
    assert_eq!(checkpoints.steps().unwrap(), [5, 6]);
    let mut folders: Vec<_> =
        fs::read_dir(checkpoints.root()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    folders.sort();
    assert_eq!(folders, ["00000005", "00000006"]);
    let state = checkpoints.state(6).unwrap();
    assert_eq!((state.step, state.tokens_before), (6, 700));
}
