use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use cluster_tree::ClusterId;
use tokio::sync::{Notify, Semaphore};

use super::Bank;

/// Blocks that are likely next, packed while no request fetches; once the packed ones fill their room, brought into
/// the caches of their bank if it has any.
///
/// One block at a time, and none begins while a request waits for its own: a request is behind one such block at
/// most, in a tier that answers one after the other. What does not fit among those that wait is left.
pub(super) struct Prefetch {
    places: Arc<Semaphore>,
    turn: Arc<Semaphore>,
    is_on: bool,
    /// Requests that fetch now.
    requests: AtomicUsize,
    idle: Notify,
    fetched: AtomicU64,
    dropped: AtomicU64,
    failed: AtomicU64,
}

/// A request that fetches, until it is dropped.
pub(super) struct Busy<'a>(&'a Prefetch);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        if self.0.requests.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

impl Prefetch {
    /// `room` blocks may wait; 0 is none at all.
    pub(super) fn new(room: usize) -> Self {
        Self {
            places: Arc::new(Semaphore::new(room.min(Semaphore::MAX_PERMITS))),
            turn: Arc::new(Semaphore::new(1)),
            is_on: room > 0,
            requests: AtomicUsize::new(0),
            idle: Notify::new(),
            fetched: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }

    pub(super) fn is_on(&self) -> bool {
        self.is_on
    }

    /// Tells that a request fetches.
    pub(super) fn busy(&self) -> Busy<'_> {
        self.requests.fetch_add(1, Ordering::AcqRel);
        Busy(self)
    }

    /// Takes blocks on, most likely first, and returns at once.
    pub(super) fn begin(self: &Arc<Self>, bank: &Arc<Bank>, ids: Vec<ClusterId>) {
        for id in ids {
            let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
                self.dropped.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            // A bank that was unloaded is not kept for this.
            let (this, bank) = (Arc::clone(self), Arc::downgrade(bank));
            tokio::spawn(async move {
                let _place = place;
                let Ok(_turn) = this.turn.acquire().await else { return };
                this.until_idle().await;
                let Some(bank) = bank.upgrade().filter(|bank| !bank.packed().has(bank, id)) else { return };
                let counter = match bank.fetch_ahead(id).await {
                    Ok(true) => &this.fetched,
                    Ok(false) => &this.dropped,
                    // Who asks for the block sees the error.
                    Err(_) => &this.failed,
                };
                counter.fetch_add(1, Ordering::Relaxed);
            });
        }
    }

    /// Blocks fetched, left and failed.
    pub(super) fn counts(&self) -> [u64; 3] {
        [&self.fetched, &self.dropped, &self.failed].map(|count| count.load(Ordering::Relaxed))
    }

    async fn until_idle(&self) {
        loop {
            let idle = self.idle.notified();
            tokio::pin!(idle);
            // Registered before it looks: the last request may end between the two.
            idle.as_mut().enable();
            if self.requests.load(Ordering::Acquire) == 0 {
                return;
            }
            idle.await;
        }
    }
}
