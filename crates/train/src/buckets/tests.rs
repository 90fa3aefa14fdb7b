use std::sync::Mutex;

use candle_core::Device;
use collective::local;

use super::*;

const SHAPES: [usize; 5] = [3, 8, 1, 20, 5];

/// Gradients of a micro-batch, by slot.
fn of_leaf(leaf: usize) -> Vec<Vec<f32>> {
    // Thirds and sevenths: sums of them depend on the order.
    let value = |i: usize| ((leaf * 37 + i * 11) % 101) as f32 / 21.0 - 2.0;
    SHAPES.map(|len| (0..len).map(|i| value(len + i)).collect()).to_vec()
}

fn tensor(values: &[f32]) -> Tensor {
    Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

/// Each worker's sums, with `size` numbers a bucket, of `n` micro-batches.
fn sums(n: usize, world_size: usize, size: usize) -> Vec<Vec<Vec<f32>>> {
    let leaves = Leaves { n, world_size };
    let run = |mut mesh: Mesh| {
        let own = leaves.of(mesh.rank());
        let mut before = TreeSum::new(n, own.clone());
        for leaf in own.start..own.end - 1 {
            let mut gradients = Gradients::default();
            of_leaf(leaf).iter().zip(0..).for_each(|(values, slot)| gradients.set(slot, tensor(values)));
            before.push(leaf..leaf + 1, gradients, |sum: &mut Gradients, more| sum.add(more).unwrap());
        }
        let call = Call::new("gradients", 1);
        let before = before.into_parts();
        let mesh = &mut mesh;
        let (engine, n_parameters) = (&mut Engine::Tcp, SHAPES.len());
        let buckets = Buckets { mesh, engine, call, leaves, before, n_parameters, size };
        let (total, (), _) = buckets
            .reduce_behind(|gradients| {
                // Layers come from the last to the first.
                for (slot, values) in of_leaf(own.end - 1).iter().enumerate().rev() {
                    gradients.let_go(slot, tensor(values));
                }
                Ok(())
            })
            .unwrap();
        (0..SHAPES.len()).map(|slot| total.get(slot).unwrap().to_vec1().unwrap()).collect()
    };
    let found = Mutex::new(vec![vec![]; world_size]);
    std::thread::scope(|scope| {
        for mesh in local(world_size, std::time::Duration::from_secs(60)) {
            let (run, found) = (&run, &found);
            scope.spawn(move || {
                let rank = mesh.rank();
                let sums = run(mesh);
                found.lock().unwrap()[rank] = sums;
            });
        }
    });
    found.into_inner().unwrap()
}

#[test]
fn sums_are_those_of_one_worker_in_buckets_of_any_size() {
    for n in [3, 4, 7] {
        let whole = sums(n, 1, usize::MAX).pop().unwrap();
        for (world_size, size) in [(1, 1), (2, 1), (2, 10), (3, 21), (3, usize::MAX)] {
            for found in sums(n, world_size, size) {
                assert_eq!(found, whole, "{n} micro-batches, {world_size} workers, buckets of {size}");
            }
        }
    }
}

#[test]
fn a_backward_pass_that_fails_says_nothing_more_to_the_others() {
    let mut mesh = Mesh::alone();
    let (call, leaves) = (Call::new("gradients", 1), Leaves { n: 1, world_size: 1 });
    let (mesh, engine) = (&mut mesh, &mut Engine::Tcp);
    let buckets = Buckets { mesh, engine, call, leaves, before: vec![], n_parameters: 2, size: usize::MAX };
    let failed = buckets.reduce_behind(|gradients| {
        gradients.let_go(0, tensor(&[1.0]));
        Err::<(), _>(crate::Error::Diverged { step: 1, what: "loss", found: f64::NAN, last_loss: 0.0 })
    });
    assert!(matches!(failed, Err(crate::Error::Diverged { .. })));
}

/// Needs a GPU.
#[cfg(feature = "nccl")]
#[test]
fn nccl_gives_the_sums_of_one_worker() {
    let device = Device::new_cuda_with_stream(0).expect("a GPU, which the feature nccl tests");
    let on_gpu = |values: &Vec<f32>| Tensor::from_slice(values, values.len(), &device).unwrap();
    let n = 4;
    let whole = sums(n, 1, usize::MAX).pop().unwrap();
    let mut mesh = Mesh::alone();
    let stream = device.as_cuda_device().unwrap().cuda_stream();
    let mut engine = Engine::Nccl(collective::Nccl::join(&mut mesh, stream).unwrap());
    for size in [1, 21, usize::MAX] {
        let mut before = TreeSum::new(n, 0..n);
        for leaf in 0..n - 1 {
            let mut gradients = Gradients::default();
            of_leaf(leaf).iter().zip(0..).for_each(|(values, slot)| gradients.set(slot, on_gpu(values)));
            before.push(leaf..leaf + 1, gradients, |sum: &mut Gradients, more| sum.add(more).unwrap());
        }
        let (mesh, engine, call) = (&mut mesh, &mut engine, Call::new("gradients", 1));
        let (leaves, n_parameters) = (Leaves { n, world_size: 1 }, SHAPES.len());
        let buckets = Buckets { mesh, engine, call, leaves, before: before.into_parts(), n_parameters, size };
        let backward = |gradients: Gradients| {
            let last = of_leaf(n - 1);
            (0..SHAPES.len()).rev().for_each(|slot| gradients.let_go(slot, on_gpu(&last[slot])));
            Ok(())
        };
        let (total, (), _) = buckets.reduce_behind(backward).unwrap();
        let found: Vec<Vec<f32>> =
            (0..SHAPES.len()).map(|slot| total.get(slot).unwrap().to_vec1().unwrap()).collect();
        assert_eq!(found, whole, "buckets of {size}");
    }
}
