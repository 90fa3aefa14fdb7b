//! The real server and client in a simulated network and time.
//!
//! Each process has a runtime of one thread, and turns in a fixed order, a tick at a time. The threads
//! that the server uses for blocking work are real ones, but tokio's paused clock stands still until they
//! are done, so what is done within a tick does not depend on them, and a message is never received in
//! the tick in which it was sent. Within a tick, work of the same process can be done in another order.

use std::rc::Rc;

use memory_bank::{BlockStore, Placement, Step};
use object_store::memory::InMemory;
use rand::RngExt;
use turmoil::Builder;

use crate::faults::Faults;
use crate::launcher::{Counts, TICK, What, World};
use crate::processes::{connect, open_store, shard, worker};
use crate::seeds;
use crate::setting::{Setting, dice};
use crate::store::SlowStore;

/// Ticks after which a run has to be at its end.
const MOST_TICKS: u64 = 60_000;
/// Lines of a failed run's events that are shown.
const SHOWN: usize = 60;

/// What a run that went well was like.
struct Run {
    counts: Counts,
    hash: [u8; 32],
    events: Vec<String>,
}

#[test]
fn a_bank_under_faults_ends_with_the_bits_of_one_fed_in_order() {
    let start = std::time::Instant::now();
    let runs = seeds::run(simulate);
    let mut sum = Counts::default();
    let n = runs.len();
    for (what, count) in runs.into_iter().flat_map(|run| run.counts) {
        *sum.entry(what).or_default() += count;
    }
    println!("{n} seeds in {:.1} s: {sum:?}", start.elapsed().as_secs_f64());
    if seeds::are_many() {
        assert!(sum.len() == What::Tick as usize + 1, "some of it never happened: {sum:?}");
    }
}

#[test]
fn a_seed_has_one_course_of_events() {
    for seed in 1..=20 {
        let (once, again) = (simulate(seed).unwrap(), simulate(seed).unwrap());
        if once.hash != again.hash {
            let differ = once.events.iter().zip(&again.events).find(|(once, again)| once != again);
            panic!("seed {seed} had two courses of events, which part at {differ:?}");
        }
    }
}

#[test]
fn a_restore_given_up_in_the_middle_leaves_a_shard_that_serves() {
    let setting = Setting { n_shards: 1, world_size: 1, ..Setting::draw(1) };
    let store = SlowStore { inner: InMemory::new(), pause: 10 * TICK };
    let world = Rc::new(World::new(setting, store));
    let mut sim = builder(1).build();
    let served = Rc::clone(&world);
    sim.host("shard0", move || shard(Rc::clone(&served), 0));
    sim.client("operator", async move {
        let bank = connect(&world, 0, 1).await?;
        bank.save(Step(0)).await?;
        // It takes the store 60 ticks and more to answer.
        tokio::time::timeout(40 * TICK, bank.restore(None)).await.expect_err("restored already");
        let ids = world.setting.all_ids();
        tokio::time::timeout(40 * TICK, bank.fetch(Step(0), &ids)).await??;
        Ok(())
    });
    sim.run().unwrap();
}

fn simulate(seed: u64) -> Result<Run, String> {
    let mut dice = dice(seed, "stack");
    let pause = TICK * dice.random_range(0..=3);
    let world = Rc::new(World::new(Setting::draw(seed), SlowStore { inner: InMemory::new(), pause }));
    let mut faults = Faults::draw(seed);
    let mut sim = builder(seed).build();
    for index in 0..world.setting.n_shards {
        let world = Rc::clone(&world);
        sim.host(format!("shard{index}"), move || shard(Rc::clone(&world), index));
    }
    for rank in 0..world.setting.world_size {
        let world = Rc::clone(&world);
        sim.host(format!("worker{rank}"), move || worker(Rc::clone(&world), rank));
    }
    let mut ended = Err(format!("not at its end after {MOST_TICKS} ticks"));
    while world.tick.get() < MOST_TICKS {
        world.tick.set(world.tick.get() + 1);
        faults.act(&mut sim, &world);
        let stepped = sim.step().map_err(|error| error.to_string());
        if let Some(why) = world.broken().or(stepped.err()) {
            ended = Err(why);
            break;
        }
        if world.is_finished() {
            ended = check_checkpoints(&world);
            break;
        }
    }
    drop(sim);
    world.count(What::Tick, world.tick.get());
    let events = world.events();
    match ended {
        Ok(()) => Ok(Run { counts: world.counts.borrow().clone(), hash: world.hash(), events }),
        Err(why) => {
            let shown = events[events.len().saturating_sub(SHOWN)..].join("\n");
            Err(format!("{why}\n{:?}\n{shown}", world.setting))
        }
    }
}

fn builder(seed: u64) -> Builder {
    let mut builder = Builder::new();
    builder
        .rng_seed(seed)
        .tick_duration(TICK)
        .simulation_duration(TICK * (MOST_TICKS as u32 + 1))
        // Not drawn by turmoil: it draws for each message, and two runs need not cut what they send into
        // messages alike. At least a tick, so that the order of work within one is not seen outside.
        .min_message_latency(TICK)
        .max_message_latency(TICK)
        .tcp_capacity(1 << 14);
    builder
}

/// Fails unless every checkpoint in the store is what the reference was, the last step's among them.
fn check_checkpoints(world: &World) -> Result<(), String> {
    let work = async {
        let (store, identity) = (open_store(world).await?, world.setting.files_identity());
        let mut found = Vec::new();
        for step in store.steps().await? {
            let options = world.setting.shard_options(Placement::WHOLE);
            let shard = store.checkpoint(step).await?.load(&identity, options).await?;
            found.push((step, shard.snapshot(Step(0)).rows));
        }
        Ok::<_, memory_bank::Error>(found)
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let found = runtime.map_err(|error| error.to_string())?.block_on(work).map_err(|e| e.to_string())?;
    for (step, rows) in &found {
        world.reference.check_rows(step.0, rows, |_| true).map_err(|why| format!("checkpoint: {why}"))?;
    }
    match found.last() {
        Some((step, _)) if step.0 == world.setting.n_steps => Ok(()),
        last => Err(format!("the newest checkpoint is {:?}", last.map(|(step, _)| step))),
    }
}
