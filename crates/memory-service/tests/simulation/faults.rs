//! What goes wrong between the processes and with them, and when it is over.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use turmoil::Sim;

use crate::launcher::{TICK, What, World};
use crate::setting::dice;

/// Most ticks that a message is on its way over a link that works, and most that a link does not.
const MOST_DELAY: u32 = 8;
const MOST_TICKS: u64 = 40;

pub(crate) struct Faults {
    dice: ChaCha8Rng,
    /// Mean ticks from one to the next.
    every: u32,
    /// How many are still to come: then the run can end.
    left: u32,
    open: Vec<(Fault, u64)>,
}

#[derive(Clone, PartialEq, Debug)]
enum Fault {
    /// What is sent is lost, what is on its way too.
    Cut(String, String),
    /// In one direction.
    CutOneWay(String, String),
    /// What is sent is kept, and comes at once when it is over.
    Hold(String, String),
    Crash(String),
}

impl Faults {
    pub(crate) fn draw(seed: u64) -> Self {
        let mut dice = dice(seed, "faults");
        let (every, left) = (dice.random_range(10..60), dice.random_range(0..24));
        Self { dice, every, left, open: Vec::new() }
    }

    /// Begins and ends what is due in a tick.
    pub(crate) fn act(&mut self, sim: &mut Sim<'_>, world: &World) {
        let tick = world.tick.get();
        if !self.open.is_empty() {
            world.disturb(false);
        }
        let (over, open) = std::mem::take(&mut self.open).into_iter().partition(|(_, end)| *end <= tick);
        self.open = open;
        for (fault, _) in over {
            world.log(format_args!("over: {fault:?}"));
            match fault {
                Fault::Cut(a, b) => sim.repair(a, b),
                Fault::CutOneWay(from, to) => sim.repair_oneway(from, to),
                Fault::Hold(a, b) => sim.release(a, b),
                Fault::Crash(process) => sim.bounce(process),
            }
        }
        if self.dice.random_bool(0.1) {
            let ((worker, shard), delay) = (self.pair(world), self.dice.random_range(1..=MOST_DELAY));
            sim.set_link_latency(worker, shard, delay * TICK);
        }
        if self.left > 0 && self.dice.random_ratio(1, self.every) {
            self.begin(sim, world);
        }
    }

    fn begin(&mut self, sim: &mut Sim<'_>, world: &World) {
        let (worker, shard) = self.pair(world);
        let fault = match self.dice.random_range(0..6) {
            0 => Fault::Cut(worker, shard),
            1 => Fault::CutOneWay(worker, shard),
            2 => Fault::CutOneWay(shard, worker),
            3 => Fault::Hold(worker, shard),
            4 => Fault::Crash(worker),
            _ => Fault::Crash(shard),
        };
        // Some lose one message, others more than a life.
        let ticks = if self.dice.random_bool(0.3) { 1 } else { self.dice.random_range(1..=MOST_TICKS) };
        if self.open.iter().any(|(other, _)| other.meets(&fault)) {
            return;
        }
        self.left -= 1;
        world.log(format_args!("{fault:?}"));
        world.disturb(matches!(&fault, Fault::Crash(process) if process.starts_with("shard")));
        match &fault {
            Fault::Cut(a, b) => sim.partition(a.as_str(), b.as_str()),
            Fault::CutOneWay(from, to) => sim.partition_oneway(from.as_str(), to.as_str()),
            Fault::Hold(a, b) => sim.hold(a.as_str(), b.as_str()),
            Fault::Crash(process) => sim.crash(process.as_str()),
        }
        let what = match &fault {
            Fault::Cut(..) | Fault::CutOneWay(..) => What::Cut,
            Fault::Hold(..) => What::Hold,
            Fault::Crash(process) if process.starts_with("shard") => What::ShardCrash,
            Fault::Crash(_) => What::WorkerCrash,
        };
        world.count(what, 1);
        self.open.push((fault, world.tick.get() + ticks));
    }

    fn pair(&mut self, world: &World) -> (String, String) {
        let worker = self.dice.random_range(0..world.setting.world_size);
        let shard = self.dice.random_range(0..world.setting.n_shards);
        (format!("worker{worker}"), format!("shard{shard}"))
    }
}

impl Fault {
    /// Whether two are about the same link, or the same process.
    fn meets(&self, other: &Self) -> bool {
        let link = |fault: &Self| match fault {
            Self::Cut(a, b) | Self::CutOneWay(a, b) | Self::Hold(a, b) => {
                Some((a.min(b).clone(), a.max(b).clone()))
            }
            Self::Crash(_) => None,
        };
        self == other || link(self).is_some_and(|ends| Some(ends) == link(other))
    }
}
