//! What a launcher does for a job, and the event log: a job that fails somewhere is begun anew everywhere,
//! from the newest checkpoint. It learns of failures from the workers alone, not of shards that crash.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use object_store::ObjectStore;
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::reference::Reference;
use crate::setting::Setting;
use crate::store::SlowStore;

/// In what a worker is told whose shard has lost steps that it relies on.
pub(crate) const LOST: &str = "what it was given since";
/// In the text of a refusal of a push whose step is not the shard's next.
const OUT_OF_TURN: &str = "but steps up to";

/// A turn of the simulation.
pub(crate) const TICK: Duration = Duration::from_millis(10);

/// What all processes of a run share: nothing of it goes over the network.
pub(crate) struct World {
    pub(crate) setting: Setting,
    pub(crate) reference: Reference,
    pub(crate) store: Arc<SlowStore>,
    pub(crate) tick: Cell<u64>,
    pub(crate) counts: RefCell<Counts>,
    events: RefCell<Vec<String>>,
    broken: RefCell<Option<String>>,
    /// The life of the job: 1, and one more after each failure.
    life: watch::Sender<u64>,
    job: RefCell<Job>,
}

/// What has happened in a life.
#[derive(Default)]
struct Job {
    /// Ranks that were ever started.
    started: BTreeSet<usize>,
    ready: BTreeSet<usize>,
    /// The step that the life goes on from.
    resumed: Option<u64>,
    finished: BTreeSet<usize>,
    /// Whether something was wrong at its beginning or went wrong since.
    disturbed: bool,
    /// Whether a shard has crashed since.
    lost_a_shard: bool,
}

/// What a simulation is for.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum What {
    ShardCrash,
    WorkerCrash,
    Cut,
    Hold,
    /// A life that ended before the run did.
    Failure,
    Retry,
    /// Pushes, and those repeated for no reason.
    Push,
    Repeat,
    /// Workers told that a shard has lost steps.
    Lost,
    /// Requests whose step did not come in time.
    TooLate,
    SaveBegun,
    Saved,
    Restored,
    /// Shards that started from a checkpoint.
    Loaded,
    /// Bytes of blocks that were not sent, since what was kept of them had not changed.
    Unchanged,
    Tick,
}

/// How often each of them was.
pub(crate) type Counts = BTreeMap<What, u64>;

impl World {
    pub(crate) fn new(setting: Setting, store: SlowStore) -> Self {
        Self {
            reference: Reference::new(&setting),
            setting,
            store: Arc::new(store),
            tick: Cell::new(0),
            counts: RefCell::default(),
            events: RefCell::default(),
            broken: RefCell::default(),
            life: watch::Sender::new(1),
            job: RefCell::default(),
        }
    }

    pub(crate) fn object_store(&self) -> Arc<dyn ObjectStore> {
        Arc::<SlowStore>::clone(&self.store)
    }

    pub(crate) fn count(&self, what: What, n: u64) {
        *self.counts.borrow_mut().entry(what).or_default() += n;
    }

    pub(crate) fn log(&self, event: impl std::fmt::Display) {
        self.events.borrow_mut().push(format!("{:>6} {event}", self.tick.get()));
    }

    pub(crate) fn events(&self) -> Vec<String> {
        self.events.borrow().clone()
    }

    /// Of the event log.
    pub(crate) fn hash(&self) -> [u8; 32] {
        Sha256::digest(self.events.borrow().join("\n")).into()
    }

    /// An invariant that does not hold.
    pub(crate) fn check(&self, who: &str, held: Result<(), String>) {
        if let Err(why) = held {
            self.log(format_args!("{who}: BROKEN {why}"));
            self.broken.borrow_mut().get_or_insert(format!("{who}: {why}"));
        }
    }

    pub(crate) fn broken(&self) -> Option<String> {
        self.broken.borrow().clone()
    }

    pub(crate) fn life(&self) -> u64 {
        *self.life.borrow()
    }

    /// Waits until a life is over.
    pub(crate) async fn over(&self, life: u64) {
        // The sender lives as long as the world.
        let _ = self.life.subscribe().wait_for(|now| *now != life).await;
    }

    /// A rank begins; one that began before has crashed.
    pub(crate) fn start(&self, rank: usize) {
        if !self.job.borrow_mut().started.insert(rank) {
            self.disturb(false);
            self.fail(self.life(), &format!("rank {rank} crashed"));
        }
    }

    /// Something goes wrong. What it was when a life began is told at the first of them.
    pub(crate) fn disturb(&self, a_shard_is_lost: bool) {
        let mut job = self.job.borrow_mut();
        job.disturbed = true;
        job.lost_a_shard |= a_shard_is_lost;
    }

    /// Ends a life, if it is not over yet. A life that nothing was wrong with has no reason to end, no worker
    /// is told of a loss unless a shard crashed, and with that told no push is of another step than the next.
    pub(crate) fn fail(&self, life: u64, why: &str) {
        if self.life() == life {
            let (disturbed, lost) = (self.job.borrow().disturbed, self.job.borrow().lost_a_shard);
            if !disturbed || why.contains(LOST) && !lost || why.contains(OUT_OF_TURN) {
                self.check(why, Err("for no reason".to_owned()));
            }
            self.log(format_args!("life {life} ends: {why}"));
            let started = std::mem::take(&mut self.job.borrow_mut().started);
            *self.job.borrow_mut() = Job { started, ..Job::default() };
            self.count(What::Failure, 1);
            self.life.send_replace(life + 1);
        }
    }

    /// Waits until every rank is in this life. Some may do things for an older one all the same: shards take
    /// nothing of it.
    pub(crate) async fn all_ready(&self, rank: usize) {
        self.job.borrow_mut().ready.insert(rank);
        while self.job.borrow().ready.len() < self.setting.world_size {
            sleep(TICK).await;
        }
    }

    /// Tells all ranks where this life goes on from.
    pub(crate) fn resume(&self, life: u64, step: u64) {
        if self.life() == life {
            self.job.borrow_mut().resumed = Some(step);
        }
    }

    /// `None` once the life is over.
    pub(crate) async fn resumed(&self, life: u64) -> Option<u64> {
        while self.life() == life {
            let resumed = self.job.borrow().resumed;
            match resumed {
                Some(step) => return Some(step),
                None => sleep(TICK).await,
            }
        }
        None
    }

    pub(crate) fn finish(&self, rank: usize) {
        self.job.borrow_mut().finished.insert(rank);
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.job.borrow().finished.len() == self.setting.world_size
    }
}
