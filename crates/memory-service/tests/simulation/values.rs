//! Shards as plain values, and a scheduler that decides which message comes next: thousands of steps a
//! second, and far more disorder than connections allow.

use std::rc::Rc;

use cluster_tree::ClusterId;
use memory_bank::{Block, Error, Gradients, Placement, Row, Shard, Snapshot, Step, owner};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

use crate::reference::{Reference, in_turn};
use crate::seeds;
use crate::setting::{Setting, dice};

/// Decisions of the scheduler after which a run has to be at its end.
const MOST_TURNS: u64 = 200_000;

#[test]
fn shards_fed_in_any_disorder_end_with_the_bits_of_one_fed_in_order() {
    let start = std::time::Instant::now();
    let runs = seeds::run(simulate);
    let (turns, lives) =
        runs.iter().fold((0, 0), |(turns, lives), run| (turns + run.turns, lives + run.lives));
    let (n, seconds) = (runs.len(), start.elapsed().as_secs_f64());
    println!("{n} seeds in {seconds:.2} s: {turns} turns, {lives} lives");
    assert!(!seeds::are_many() || lives > n as u64, "nothing ever crashed");
}

#[test]
fn a_seed_has_one_course_of_turns() {
    for seed in 1..=20 {
        assert_eq!(simulate(seed).unwrap().hash, simulate(seed).unwrap().hash, "seed {seed}");
    }
}

struct Run {
    turns: u64,
    lives: u64,
    /// Of all messages in the order in which they were received.
    hash: [u8; 32],
}

/// On its way between a rank and a shard.
#[derive(Clone)]
enum Message {
    Fetch { shard: usize, rank: usize, step: u64 },
    Fetched { shard: usize, rank: usize, step: u64, blocks: Vec<Block> },
    Push { shard: usize, rank: usize, step: u64, gradients: Vec<Block> },
    Pushed { shard: usize, rank: usize, step: u64 },
    Save { shard: usize, step: u64 },
    Saved { shard: usize, snapshot: Snapshot },
}

/// A rank, at work on a step.
struct Worker {
    step: u64,
    /// Of each shard what it has answered in this phase.
    phase: Phase,
}

enum Phase {
    Fetching(Vec<Option<Vec<Block>>>),
    Pushing(Vec<Vec<Block>>, Vec<bool>),
    /// Rank 0 only, and only it may then push the next step: so all shards are at the same one.
    Saving(Vec<Option<Snapshot>>),
    Done,
}

struct World {
    setting: Setting,
    reference: Rc<Reference>,
    dice: ChaCha8Rng,
    shards: Vec<Shard>,
    workers: Vec<Worker>,
    messages: Vec<Message>,
    /// What the newest whole checkpoint holds.
    checkpoint: (u64, Vec<(ClusterId, Row)>),
    crashes_left: u32,
    /// A shard that came back at an earlier step, which no worker has noticed yet.
    unnoticed: bool,
    lives: u64,
    log: Sha256,
}

fn simulate(seed: u64) -> Result<Run, String> {
    let setting = Setting { n_steps: 30, ..Setting::draw(seed) };
    let reference = Rc::new(Reference::new(&setting));
    let mut dice = dice(seed, "values");
    let crashes_left = dice.random_range(0..6);
    let mut world = World {
        dice,
        reference,
        shards: Vec::new(),
        workers: Vec::new(),
        messages: Vec::new(),
        checkpoint: (0, Vec::new()),
        crashes_left,
        unnoticed: false,
        lives: 0,
        log: Sha256::new(),
        setting,
    };
    world.begin_life()?;
    for turn in 1..=MOST_TURNS {
        let at = |why: String| format!("turn {turn}: {why}\n{:?}", Setting::draw(seed));
        world.turn().map_err(at)?;
        if world.workers.iter().all(|worker| matches!(worker.phase, Phase::Done)) && !world.unnoticed {
            world.check_end().map_err(at)?;
            return Ok(Run { turns: turn, lives: world.lives, hash: world.log.finalize().into() });
        }
    }
    Err(format!("not at its end after {MOST_TURNS} turns"))
}

impl World {
    fn turn(&mut self) -> Result<(), String> {
        match self.dice.random_range(0..1000) {
            0..700 => self.receive(),
            700..800 => {
                if let Some(place) = self.any_message() {
                    self.messages.push(self.messages[place].clone());
                }
                Ok(())
            }
            800..900 => {
                if let Some(place) = self.any_message() {
                    self.messages.swap_remove(place);
                }
                Ok(())
            }
            900..990 => {
                let rank = self.dice.random_range(0..self.workers.len());
                self.ask(rank);
                Ok(())
            }
            990..997 if self.unnoticed => self.begin_life(),
            997.. if self.crashes_left > 0 => {
                self.crashes_left -= 1;
                match self.dice.random_bool(0.5) {
                    // A worker that crashes is noticed at once.
                    true => self.begin_life(),
                    false => {
                        let shard = self.dice.random_range(0..self.shards.len());
                        self.shards[shard] = self.restored(shard, self.shards.len())?;
                        self.unnoticed = true;
                        Ok(())
                    }
                }
            }
            _ => Ok(()),
        }
    }

    fn any_message(&mut self) -> Option<usize> {
        (!self.messages.is_empty()).then(|| self.dice.random_range(0..self.messages.len()))
    }

    /// A job that starts again from the newest checkpoint, at times on another number of shards. What is
    /// still on its way is for connections that are gone.
    fn begin_life(&mut self) -> Result<(), String> {
        let n_shards =
            if self.dice.random_bool(0.3) { self.dice.random_range(1..=4) } else { self.n_shards() };
        self.shards = (0..n_shards).map(|shard| self.restored(shard, n_shards)).collect::<Result<_, _>>()?;
        self.messages.clear();
        self.unnoticed = false;
        self.lives += 1;
        let step = self.checkpoint.0 + 1;
        self.workers = (0..self.setting.world_size).map(|_| Worker::at(step, n_shards)).collect();
        if step > self.setting.n_steps {
            self.workers.iter_mut().for_each(|worker| worker.phase = Phase::Done);
        }
        (0..self.workers.len()).for_each(|rank| self.ask(rank));
        Ok(())
    }

    fn n_shards(&self) -> usize {
        if self.shards.is_empty() { self.setting.n_shards } else { self.shards.len() }
    }

    fn restored(&self, shard: usize, n_shards: usize) -> Result<Shard, String> {
        let placement = Placement { shard, n_shards };
        let (step, rows) = &self.checkpoint;
        let rows = rows.iter().filter(|(id, _)| placement.owns(*id)).cloned();
        let options = self.setting.shard_options(placement);
        Shard::with_rows(self.setting.spec.clone(), options, Step(*step), rows).map_err(|e| e.to_string())
    }

    /// A rank sends what it has no answer to: for the first time, or again.
    fn ask(&mut self, rank: usize) {
        let Worker { step, phase } = &self.workers[rank];
        let step = *step;
        for shard in 0..self.shards.len() {
            let message = match phase {
                Phase::Fetching(got) if got[shard].is_none() => Message::Fetch { shard, rank, step },
                Phase::Pushing(parts, taken) if !taken[shard] => {
                    Message::Push { shard, rank, step, gradients: parts[shard].clone() }
                }
                Phase::Saving(held) if held[shard].is_none() => Message::Save { shard, step },
                _ => continue,
            };
            self.messages.push(message);
        }
    }

    /// Some message arrives. One that has to wait for a step stays where it is.
    fn receive(&mut self) -> Result<(), String> {
        let Some(place) = self.any_message() else { return Ok(()) };
        let fence = |step: u64| step.saturating_sub(1 + self.setting.staleness);
        match &self.messages[place] {
            Message::Fetch { shard, step, .. } if self.shards[*shard].applied().0 < fence(*step) => {
                return Ok(());
            }
            Message::Save { shard, step } if self.shards[*shard].applied().0 < *step => return Ok(()),
            _ => {}
        }
        let message = self.messages.swap_remove(place);
        self.log.update(message.name());
        match message {
            Message::Fetch { shard, rank, step } => {
                let owned = |id: &ClusterId| owner(*id, self.shards.len()) == shard;
                let ids = self.setting.touched(step, rank).into_iter().filter(owned);
                let block = |id| self.shards[shard].block(id).map(|values| Block { id, values });
                let blocks = ids.map(block).collect::<Result<_, _>>().map_err(|e| e.to_string())?;
                self.messages.push(Message::Fetched { shard, rank, step, blocks });
                Ok(())
            }
            Message::Fetched { shard, rank, step, blocks } => self.fetched((shard, rank, step), blocks),
            Message::Push { shard, rank, step, gradients } => self.push((shard, rank, step), gradients),
            Message::Pushed { shard, rank, step } => {
                self.pushed(shard, rank, step);
                Ok(())
            }
            Message::Save { shard, step } => {
                // An old message: the rank has long gone on.
                if self.shards[shard].applied().0 == step {
                    let snapshot = self.shards[shard].snapshot(Step(0));
                    self.messages.push(Message::Saved { shard, snapshot });
                }
                Ok(())
            }
            Message::Saved { shard, snapshot } => self.saved(shard, snapshot),
        }
    }

    fn fetched(
        &mut self,
        (shard, rank, step): (usize, usize, u64),
        blocks: Vec<Block>,
    ) -> Result<(), String> {
        let after = step.saturating_sub(1 + self.setting.staleness);
        let n_shards = self.shards.len();
        let worker = &mut self.workers[rank];
        let Phase::Fetching(got) = &mut worker.phase else { return Ok(()) };
        // An answer that came before, or to what is long done, is dropped unseen.
        if worker.step != step || got[shard].is_some() {
            return Ok(());
        }
        for block in &blocks {
            self.reference
                .check_block(block, after..=step - 1)
                .map_err(|why| format!("rank {rank} at step {step}: {why}"))?;
        }
        got[shard] = Some(blocks);
        if got.iter().all(Option::is_some) {
            // In the order of the batch, wherever they came from.
            let mut fetched: Vec<Block> = got.iter_mut().flat_map(Option::take).flatten().collect();
            fetched.sort_by_key(|block| block.id);
            let mut parts = vec![Vec::new(); n_shards];
            for gradient in self.setting.gradients(step, rank, &fetched) {
                parts[owner(gradient.id, n_shards)].push(gradient);
            }
            worker.phase = Phase::Pushing(parts, vec![false; n_shards]);
            self.ask(rank);
        }
        Ok(())
    }

    fn push(
        &mut self,
        (shard, rank, step): (usize, usize, u64),
        gradients: Vec<Block>,
    ) -> Result<(), String> {
        let gradients = Gradients::new(&self.setting.spec, gradients).map_err(|e| e.to_string())?;
        match self.shards[shard].push(Step(step), rank, gradients, in_turn) {
            Ok(()) => {
                self.messages.push(Message::Pushed { shard, rank, step });
                Ok(())
            }
            // How a worker notices that a shard has come back.
            Err(Error::PushStep { .. }) if self.unnoticed => self.begin_life(),
            Err(error) => Err(format!("rank {rank}: {error}")),
        }
    }

    fn pushed(&mut self, shard: usize, rank: usize, step: u64) {
        let n_shards = self.shards.len();
        let worker = &mut self.workers[rank];
        let Phase::Pushing(_, taken) = &mut worker.phase else { return };
        if worker.step == step {
            taken[shard] = true;
            if taken.iter().all(|taken| *taken) {
                let saves = rank == 0 && step.is_multiple_of(self.setting.save_every);
                match saves {
                    true => worker.phase = Phase::Saving(vec![None; n_shards]),
                    false => self.go_on(rank),
                }
                self.ask(rank);
            }
        }
    }

    fn saved(&mut self, shard: usize, snapshot: Snapshot) -> Result<(), String> {
        let Worker { step, phase } = &mut self.workers[0];
        let Phase::Saving(held) = phase else { return Ok(()) };
        if snapshot.step.0 != *step {
            return Ok(());
        }
        held[shard].get_or_insert(snapshot);
        if held.iter().all(Option::is_some) {
            let (step, whole) = (*step, held.iter_mut().flat_map(Option::take));
            let mut rows: Vec<_> = whole.flat_map(|snapshot| snapshot.rows).collect();
            rows.sort_by_key(|(id, _)| *id);
            self.reference.check_rows(step, &rows, |_| true)?;
            // At times it is never finished.
            if self.dice.random_bool(0.8) {
                self.checkpoint = (step, rows);
            }
            self.go_on(0);
            self.ask(0);
        }
        Ok(())
    }

    fn go_on(&mut self, rank: usize) {
        let (n_shards, worker) = (self.shards.len(), &mut self.workers[rank]);
        match worker.step < self.setting.n_steps {
            true => *worker = Worker::at(worker.step + 1, n_shards),
            false => worker.phase = Phase::Done,
        }
    }

    fn check_end(&self) -> Result<(), String> {
        let last = self.setting.n_steps;
        for shard in &self.shards {
            let (applied, placement) = (shard.applied().0, shard.options().placement);
            if applied != last {
                return Err(format!("a shard ends at step {applied}, expected {last}"));
            }
            self.reference.check_rows(last, &shard.snapshot(Step(0)).rows, |id| placement.owns(id))?;
        }
        Ok(())
    }
}

impl Worker {
    fn at(step: u64, n_shards: usize) -> Self {
        Self { step, phase: Phase::Fetching(vec![None; n_shards]) }
    }
}

impl Message {
    fn name(&self) -> String {
        match self {
            Self::Fetch { shard, rank, step } => format!("fetch {shard} {rank} {step};"),
            Self::Fetched { shard, rank, step, .. } => format!("fetched {shard} {rank} {step};"),
            Self::Push { shard, rank, step, .. } => format!("push {shard} {rank} {step};"),
            Self::Pushed { shard, rank, step } => format!("pushed {shard} {rank} {step};"),
            Self::Save { shard, step } => format!("save {shard} {step};"),
            Self::Saved { shard, snapshot } => format!("saved {shard} {};", snapshot.step),
        }
    }
}
