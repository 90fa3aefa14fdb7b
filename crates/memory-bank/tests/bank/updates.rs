use std::path::Path;

use cluster_tree::ClusterId;
use memory_bank::{AdamW, Block, BlockStore, LocalBank, Schedule, Step, init_block};

use crate::support::{adamw, bank, gradient, id, options, run, spec};

/// Dense AdamW of one block in f64, straight from the paper's algorithm 2 (arXiv 1711.05101), with
/// the block's own step count.
struct Reference {
    values: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
    steps: i32,
}

impl Reference {
    fn new(id: ClusterId) -> Self {
        let values: Vec<f64> = init_block(&spec(), 7, id).into_iter().map(f64::from).collect();
        let zeros = vec![0.0; values.len()];
        Self { m: zeros.clone(), v: zeros, values, steps: 0 }
    }

    fn update(&mut self, adamw: &AdamW, grad: &[f32], rate: f64) {
        self.steps += 1;
        let norm = grad.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
        let scale = adamw.clip.map_or(1.0, |clip| (clip / norm).min(1.0));
        for (i, &grad) in grad.iter().enumerate() {
            let grad = f64::from(grad) * scale;
            self.m[i] = adamw.beta1 * self.m[i] + (1.0 - adamw.beta1) * grad;
            self.v[i] = adamw.beta2 * self.v[i] + (1.0 - adamw.beta2) * grad * grad;
            let m = self.m[i] / (1.0 - adamw.beta1.powi(self.steps));
            let v = self.v[i] / (1.0 - adamw.beta2.powi(self.steps));
            self.values[i] -= rate * (m / (v.sqrt() + adamw.eps) + adamw.weight_decay * self.values[i]);
        }
    }

    fn assert_near(&self, values: &[f32]) {
        for (expected, &found) in self.values.iter().zip(values) {
            assert!((expected - f64::from(found)).abs() < 2e-6, "{found} against {expected}");
        }
    }
}

fn assert_follows_reference(adamw: AdamW, touched: &[u64]) {
    run(async {
        let mut options = options(1, Path::new("/nonexistent"));
        options.adamw = adamw;
        let bank = LocalBank::create(spec(), options).unwrap();
        let id = id(2, 6);
        let mut reference = Reference::new(id);
        for step in 1..=12 {
            let mut grads = Vec::new();
            if touched.contains(&step) {
                grads.push(gradient(id, step));
                reference.update(&adamw, &grads[0].values, adamw.schedule.at(step));
            }
            bank.push(Step(step), 0, grads).await.unwrap();
            reference.assert_near(&bank.fetch(Step(step), &[id]).await.unwrap()[0].values);
        }
    });
}

#[test]
fn a_block_touched_every_step_follows_dense_adamw() {
    let every: Vec<u64> = (1..=12).collect();
    assert_follows_reference(adamw(), &every);
    assert_follows_reference(AdamW { clip: Some(0.5), ..adamw() }, &every);
    assert_follows_reference(AdamW { beta1: 0.0, beta2: 0.0, eps: 0.1, ..adamw() }, &every);
}

#[test]
fn a_block_touched_now_and_then_counts_its_own_steps() {
    assert_follows_reference(adamw(), &[2, 3, 9]);
    assert_follows_reference(AdamW { clip: Some(100.0), weight_decay: 0.0, ..adamw() }, &[5, 12]);
}

#[test]
fn an_untouched_block_stays_as_it_was() {
    run(async {
        let bank = bank(1);
        bank.push(Step(1), 0, vec![gradient(id(0, 0), 1), gradient(id(2, 1), 1)]).await.unwrap();
        let ids = [id(0, 0), id(2, 1)];
        let first = bank.fetch(Step(1), &ids).await.unwrap();
        bank.push(Step(2), 0, vec![gradient(id(2, 1), 2)]).await.unwrap();
        let second = bank.fetch(Step(2), &ids).await.unwrap();
        assert_eq!(first[0], second[0]);
        assert_ne!(first[1], second[1]);
    });
}

#[test]
fn the_generic_block_is_one_more_row() {
    run(async {
        let (plain, generic) = (bank(1), bank(1));
        let ids = (id(2, 4), id(2, ClusterId::GENERIC));
        for step in 1..=3 {
            let grad = gradient(ids.0, step);
            plain.push(Step(step), 0, vec![grad.clone()]).await.unwrap();
            generic.push(Step(step), 0, vec![Block { id: ids.1, ..grad }]).await.unwrap();
        }
        let of = async |bank: &LocalBank, id| bank.fetch(Step(3), &[id]).await.unwrap().remove(0).values;
        let (plain, generic) = (of(&plain, ids.0).await, of(&generic, ids.1).await);
        // M3 starts at 0 in both: the same gradients leave the same weights.
        let m3 = |values: &[f32]| [&values[20..30], &values[50..60]].concat();
        assert_eq!(m3(&plain), m3(&generic));
        assert!(m3(&plain).iter().all(|&value| value != 0.0));
        assert_ne!(plain, generic);
    });
}

#[test]
fn a_gradient_of_zeros_only_decays() {
    run(async {
        let bank = bank(1);
        bank.push(Step(1), 0, vec![Block { id: id(0, 1), values: vec![0.0; 90] }]).await.unwrap();
        let values = &bank.fetch(Step(1), &[id(0, 1)]).await.unwrap()[0].values;
        let decay = 1.0 - adamw().schedule.at(1) * 0.1;
        for (value, start) in values.iter().zip(init_block(&spec(), 7, id(0, 1))) {
            assert_eq!(*value, decay as f32 * start);
        }
    });
}

#[test]
fn the_schedule_warms_up_and_follows_a_cosine() {
    let schedule = Schedule { peak: 1e-4, floor: 1e-5, warmup_steps: 10, total_steps: 110 };
    let near = |step, expected: f64| assert!((schedule.at(step) - expected).abs() < 1e-15, "{step}");
    near(1, 1e-5);
    near(5, 5e-5);
    near(10, 1e-4);
    near(60, 5.5e-5); // half way between peak and floor
    near(110, 1e-5);
    near(1000, 1e-5);
    assert!((10..110).all(|step| schedule.at(step) > schedule.at(step + 1)));
    let flat = Schedule { peak: 0.1, floor: 0.1, warmup_steps: 0, total_steps: 0 };
    assert_eq!((flat.at(1), flat.at(50)), (0.1, 0.1));
}

#[test]
fn hyperparameters_are_checked() {
    let error = |change: &dyn Fn(&mut AdamW)| {
        let mut options = options(1, Path::new("/nonexistent"));
        change(&mut options.adamw);
        LocalBank::create(spec(), options).err().unwrap().to_string()
    };
    assert_eq!(error(&|adamw| adamw.beta1 = 1.0), "beta1 is 1, expected 0 to below 1");
    assert_eq!(error(&|adamw| adamw.beta2 = -0.1), "beta2 is -0.1, expected 0 to below 1");
    assert_eq!(error(&|adamw| adamw.eps = 0.0), "eps is 0, expected finite and at least 1.2e-38");
    assert_eq!(
        error(&|adamw| adamw.weight_decay = f64::NAN),
        "weight_decay is NaN, expected finite and at least 0"
    );
    assert_eq!(error(&|adamw| adamw.clip = Some(0.0)), "clip is 0, expected finite and above 0");
    assert_eq!(
        error(&|adamw| adamw.schedule.peak = -1.0),
        "peak is -1, expected a finite rate of at least 0"
    );
    assert_eq!(error(&|adamw| adamw.schedule.floor = 0.5), "floor is 0.5, expected 0 to peak 0.02");
    let text = "warmup_steps is 11, expected at most total_steps 10";
    assert_eq!(error(&|adamw| adamw.schedule.warmup_steps = 11), text);
    let no_ranks = LocalBank::create(spec(), options(0, Path::new("/nonexistent")));
    assert_eq!(no_ranks.err().unwrap().to_string(), "world_size is 0, expected at least 1");
}
