use std::task::Poll;

use cluster_tree::ClusterId;
use memory_bank::{
    Block, BlockStore, Error, Gradients, MAX_GRADIENT, Placement, Shard, ShardOptions, Step, Update,
    init_block,
};
use rayon::prelude::*;

use crate::support::{adamw, all_ids, bank, bits, blocks, gradient, gradients, id, run, spec, train};

fn options(world_size: usize, staleness: u64) -> ShardOptions {
    ShardOptions { seed: 7, adamw: adamw(), world_size, staleness, placement: Placement::WHOLE }
}

fn shard(world_size: usize) -> Shard {
    Shard::new(spec(), options(world_size, 0)).unwrap()
}

fn checked(blocks: Vec<Block>) -> Gradients {
    Gradients::new(&spec(), blocks).unwrap()
}

fn in_turn(updates: Vec<Update<'_>>) {
    updates.into_iter().for_each(Update::run);
}

#[test]
fn any_order_of_arrival_gives_the_same_bits() {
    let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    let trained: Vec<Shard> = (0..6)
        .map(|start| {
            let mut shard = shard(3);
            for step in 1..=6 {
                for rank in orders[(start + step as usize) % 6] {
                    shard.push(Step(step), rank, checked(gradients(step, rank)), in_turn).unwrap();
                }
                assert_eq!(shard.applied(), Step(step));
            }
            shard
        })
        .collect();
    assert!(trained.iter().all(|shard| *shard == trained[0]));
}

#[test]
fn gradients_are_summed_in_rank_order() {
    let (mut three, mut one) = (shard(3), shard(1));
    let id = id(2, 5);
    // In another order, 1 would be lost beside 1e9.
    let values = [1e9f32, -1e9, 1.0];
    for (rank, value) in [(1, values[1]), (2, values[2]), (0, values[0])] {
        three.push(Step(1), rank, checked(vec![Block { id, values: vec![value; 60] }]), in_turn).unwrap();
    }
    let sum = (values[0] + values[1]) + values[2];
    one.push(Step(1), 0, checked(vec![Block { id, values: vec![sum; 60] }]), in_turn).unwrap();
    assert_eq!(three.block(id).unwrap(), one.block(id).unwrap());
    assert_ne!(one.block(id).unwrap(), init_block(&spec(), 7, id));
}

#[test]
fn updates_run_in_any_order_and_on_any_thread() {
    let (mut forward, mut backward, mut parallel) = (shard(1), shard(1), shard(1));
    for step in 1..=5 {
        let grads = || checked(gradients(step, 0));
        forward.push(Step(step), 0, grads(), in_turn).unwrap();
        backward
            .push(Step(step), 0, grads(), |updates| updates.into_iter().rev().for_each(Update::run))
            .unwrap();
        parallel
            .push(Step(step), 0, grads(), |updates| updates.into_par_iter().for_each(Update::run))
            .unwrap();
    }
    assert!(forward == backward && forward == parallel);
}

#[test]
fn the_order_within_a_push_does_not_matter() {
    let (mut forward, mut backward) = (shard(1), shard(1));
    forward.push(Step(1), 0, checked(gradients(1, 0)), in_turn).unwrap();
    let reversed = gradients(1, 0).into_iter().rev().collect();
    backward.push(Step(1), 0, checked(reversed), in_turn).unwrap();
    assert_eq!(forward, backward);
}

#[test]
fn a_step_waits_for_every_rank_and_an_empty_push_counts() {
    let mut shard = shard(2);
    shard.push(Step(1), 1, checked(gradients(1, 1)), |_| panic!("rank 0 has not pushed")).unwrap();
    assert_eq!(shard.applied(), Step(0));
    assert_eq!(shard.block(id(0, 0)).unwrap(), init_block(&spec(), 7, id(0, 0)));
    shard.push(Step(1), 0, checked(Vec::new()), in_turn).unwrap();
    assert_eq!(shard.applied(), Step(1));
}

#[test]
fn a_repeated_push_is_applied_once() {
    let (mut once, mut twice) = (shard(2), shard(2));
    for step in 1..=3 {
        for rank in 0..2 {
            once.push(Step(step), rank, checked(gradients(step, rank)), in_turn).unwrap();
            twice.push(Step(step), rank, checked(gradients(step, rank)), in_turn).unwrap();
            // At once, for the first rank before the step is applied, and for steps long applied.
            twice.push(Step(step), rank, checked(gradients(step, rank)), in_turn).unwrap();
            twice.push(Step(1), 0, checked(gradients(1, 0)), in_turn).unwrap();
        }
    }
    assert_eq!(once, twice);
}

#[test]
fn a_push_out_of_turn_is_refused() {
    run(async {
        let bank = bank(2);
        let error = async |step, rank| bank.push(Step(step), rank, Vec::new()).await.unwrap_err().to_string();
        assert_eq!(error(2, 0).await, "push of step 2, but steps up to 0 are applied: expected 1");
        assert_eq!(error(0, 0).await, "push of step 0, but steps up to 0 are applied: expected 1");
        assert_eq!(error(1, 2).await, "push from rank 2, expected a rank below the world size 2");
    });
}

#[test]
fn a_bad_push_is_named_and_nothing_of_it_is_applied() {
    run(async {
        let bank = bank(1);
        let before = blocks(&bank).await;
        let error = async |bad: Vec<Block>| {
            let mut grads = vec![gradient(id(0, 0), 1)];
            grads.extend(bad);
            bank.push(Step(1), 0, grads).await.unwrap_err().to_string()
        };
        let with = |position: usize, value| {
            let mut block = gradient(id(2, 3), 1);
            block.values[position] = value;
            vec![block]
        };
        let long = Block { id: id(2, 3), values: vec![0.0; 61] };
        assert_eq!(error(vec![long]).await, "gradient of block level2/3 has 61 values, expected 60");
        let unknown = Block { id: id(2, 12), values: vec![0.0; 60] };
        assert_eq!(error(vec![unknown]).await, "no block level2/12: level 2 has 12 blocks");
        let again = vec![gradient(id(2, 3), 1), gradient(id(0, 0), 2)];
        assert_eq!(error(again).await, "push holds two gradients of block level0/0, expected one");
        let expected = format!("expected a magnitude of at most {MAX_GRADIENT}");
        for (value, text) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf"), (-1e16, "-10000000000000000")] {
            let found = error(with(17, value)).await;
            assert_eq!(found, format!("gradient of block level2/3 has {text} at position 17, {expected}"));
        }
        assert_eq!(bank.applied(), Step(0));
        assert_eq!(bits(&blocks(&bank).await), bits(&before));

        // The step is still open, and the largest gradient passes.
        bank.push(Step(1), 0, with(17, MAX_GRADIENT)).await.unwrap();
        let values = &bank.fetch(Step(1), &[id(2, 3)]).await.unwrap()[0].values;
        assert!(values.iter().all(|value| value.is_finite()));
    });
}

#[test]
fn a_fetch_waits_for_its_step() {
    run(async {
        let bank = bank(2);
        let ids = [id(0, 1)];
        let mut early = Box::pin(bank.fetch(Step(1), &ids));
        assert!(matches!(poll_once(&mut early), Poll::Pending));
        bank.push(Step(1), 0, vec![gradient(id(0, 1), 1)]).await.unwrap();
        assert!(matches!(poll_once(&mut early), Poll::Pending));
        bank.push(Step(1), 1, vec![gradient(id(0, 1), 2)]).await.unwrap();
        let early = early.await.unwrap();
        assert_eq!(early, bank.fetch(Step(0), &ids).await.unwrap());
        assert_ne!(early[0].values, init_block(&spec(), 7, id(0, 1)));
    });
}

fn poll_once<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    std::pin::Pin::new(future).poll(&mut context)
}

#[test]
fn ranks_that_run_at_the_same_time_give_the_same_bits() {
    let concurrent = run(async {
        let bank = bank(3);
        let rank = |rank: usize| {
            let bank = bank.clone();
            tokio::spawn(async move {
                for step in 1..=8 {
                    bank.fetch(Step(step - 1), &all_ids()).await.unwrap();
                    bank.push(Step(step), rank, gradients(step, rank)).await.unwrap();
                }
            })
        };
        for task in [rank(2), rank(0), rank(1)] {
            task.await.unwrap();
        }
        blocks(&bank).await
    });
    let mut shard = shard(3);
    for step in 1..=8 {
        (0..3)
            .for_each(|rank| shard.push(Step(step), rank, checked(gradients(step, rank)), in_turn).unwrap());
    }
    let expected: Vec<Block> =
        all_ids().into_iter().map(|id| Block { id, values: shard.block(id).unwrap() }).collect();
    assert_eq!(bits(&concurrent), bits(&expected));
}

#[test]
fn blocks_come_in_the_order_asked_for() {
    run(async {
        let bank = bank(1);
        train(&bank, 0, 2).await;
        let ids = [id(2, 7), id(0, ClusterId::GENERIC), id(2, 7), id(0, 1)];
        let fetched = bank.fetch(Step(2), &ids).await.unwrap();
        assert_eq!(fetched.iter().map(|block| block.id).collect::<Vec<_>>(), ids);
        assert_eq!(fetched[0], fetched[2]);
        assert_eq!(fetched.iter().map(|block| block.values.len()).collect::<Vec<_>>(), [60, 90, 60, 90]);
        let unknown = bank.fetch(Step(2), &[id(0, 1), id(1, 0)]).await;
        assert!(matches!(unknown, Err(Error::UnknownBlock { id: found, n_blocks: 0 }) if found == id(1, 0)));
        // A block that does not exist is refused at once, also by a fetch that would have to wait.
        assert!(bank.fetch(Step(99), &[id(0, 2)]).await.is_err());
    });
}
