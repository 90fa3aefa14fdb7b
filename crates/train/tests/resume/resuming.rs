use std::fs;

use train::{Checkpoints, Error, Metrics, Phase, StepMetrics, TrainConfig, Trainer, read_metrics};

use crate::fixtures::*;

#[test]
fn a_killed_and_resumed_run_is_the_straight_one_to_the_byte() {
    let (world, config) = (World::new(), config(Phase::Cotrain));
    let straight = train(world.begin("straight", &config));
    train_until_killed(world.begin("killed", &config), 7);
    let (step, resumed) = world.resume("killed", &config);
    assert_eq!((step, resumed.state().step, resumed.state().tokens_before), (5, 5, 700));
    let rest = train(resumed);
    assert_eq!(timeless(rest), timeless(straight[5..].to_vec()));

    let [expected, found] = ["straight", "killed"].map(|name| Checkpoints::of(&world.run_dir(name)));
    assert_eq!(expected.steps().unwrap(), [5, 10, 12]);
    assert_eq!(found.steps().unwrap(), [5, 10, 12]);
    for step in [5, 10, 12] {
        let (expected, found) = (files(&expected.dir(step)), files(&found.dir(step)));
        assert!(expected.keys().eq(found.keys()), "{:?} {:?}", expected.keys(), found.keys());
        for (path, bytes) in expected {
            assert_eq!(found[&path].len(), bytes.len(), "{}", path.display());
            assert!(found[&path] == bytes, "step {step}: {} differs", path.display());
        }
    }
    let lines = ["straight", "killed"]
        .map(|name| timeless(read_metrics(&world.run_dir(name).join("metrics.jsonl")).unwrap()));
    assert_eq!(lines[0].iter().map(|line| line.step).collect::<Vec<_>>(), (1..=12).collect::<Vec<_>>());
    assert_eq!(lines[0], lines[1]);
    assert!(lines[0][11].loss < lines[0][0].loss - 0.3, "it learns");
    let validated: Vec<u64> =
        lines[0].iter().filter(|line| line.validation_loss.is_some()).map(|line| line.step).collect();
    assert_eq!(validated, [4, 8, 12]);
}

#[test]
fn lines_kept_by_a_resumed_run_are_the_same_text() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let mut metrics = Metrics::resume(dir.path(), 0, 0).unwrap();
    for step in 1..=300 {
        // Irrational numbers have 17 digits, whose last a reader may round.
        let loss = (step as f64).sqrt();
        metrics.write(StepMetrics { step, loss, tokens_seen: step, ..StepMetrics::default() }).unwrap();
    }
    let before = fs::read_to_string(&path).unwrap();
    Metrics::resume(dir.path(), 299, 299).unwrap();
    let after = fs::read_to_string(&path).unwrap();
    assert_eq!(after.lines().count(), 299, "the line of a step that was not saved goes");
    assert!(before.starts_with(&after));
}

#[test]
fn the_micro_batch_changes_nothing_but_rounding() {
    let world = World::new();
    let losses = [2, 4, 8].map(|micro_batch| {
        let config = TrainConfig { micro_batch, steps: 4, save_every: 0, ..config(Phase::Cotrain) };
        train(world.begin(&format!("micro{micro_batch}"), &config))
    });
    for other in &losses[1..] {
        for (a, b) in losses[0].iter().zip(other) {
            assert!((a.loss - b.loss).abs() < 1e-5, "step {}: {} {}", a.step, a.loss, b.loss);
            assert!((a.gradient_norm / b.gradient_norm - 1.0).abs() < 1e-3, "step {}", a.step);
            assert_eq!((a.n_blocks, a.tokens_seen), (b.n_blocks, b.tokens_seen));
        }
    }
}

#[test]
fn a_cut_last_line_of_metrics_is_left_out() {
    let (world, config) = (World::new(), config(Phase::Anchor));
    let straight = train(world.begin("straight", &config));
    train_until_killed(world.begin("killed", &config), 5);
    // Step 5 was not saved: there is no checkpoint, and the run begins again.
    assert_eq!(Checkpoints::of(&world.run_dir("killed")).latest().unwrap(), None);
    let error = Checkpoints::of(&world.run_dir("killed")).require_latest().unwrap_err().to_string();
    assert!(error.contains("no whole checkpoint"), "{error}");
    train_until_killed(world.begin("killed", &config), 8);

    let path = world.run_dir("killed").join("metrics.jsonl");
    let whole = fs::read_to_string(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 20]).unwrap();
    assert_eq!(read_metrics(&path).unwrap().len(), whole.lines().count() - 1);
    train(world.resume("killed", &config).1);
    assert_eq!(timeless(read_metrics(&path).unwrap()), timeless(straight));

    let damaged = fs::read_to_string(&path).unwrap().replacen("\"loss\"", "\"lo", 1);
    fs::write(&path, damaged).unwrap();
    let error = read_metrics(&path).unwrap_err().to_string();
    assert!(error.contains("metrics.jsonl: line 1: "), "{error}");
}

#[test]
fn a_checkpoint_of_another_anchor_or_without_a_file_is_refused() {
    let (world, config) = (World::new(), TrainConfig { steps: 1, warmup_steps: 1, ..config(Phase::Anchor) });
    train(world.begin("run", &config));
    let dir = Checkpoints::of(&world.run_dir("run")).dir(1);
    let resume_error = || -> String {
        let error = Trainer::resume(world.parts("run", &config), 1).err().expect("a damaged checkpoint");
        assert!(matches!(error, Error::File { .. }), "{error}");
        error.to_string()
    };
    let optimizer = dir.join("optimizer.safetensors");
    let whole = fs::read(&optimizer).unwrap();
    fs::write(&optimizer, &whole[..whole.len() - 4]).unwrap();
    assert!(resume_error().contains("optimizer.safetensors: "));

    let moment = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], &[0; 4]).unwrap();
    fs::write(&optimizer, safetensors::serialize([("m.final_norm", moment)], None).unwrap()).unwrap();
    let error = resume_error();
    assert!(error.contains("m.final_norm: expected 16 values, found 1"), "{error}");

    fs::write(dir.join("state.json"), r#"{"step": 1, "tokens_seen": 3}"#).unwrap();
    assert!(resume_error().contains("state.json: missing field `tokens_before`"));
}
