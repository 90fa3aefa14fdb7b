use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anchor::PathMemory;
use tokio::sync::mpsc::Sender;

use super::{EngineStats, Event, Request};

/// What the callers and the thread share. Locks are held for moments, never during a step.
#[derive(Default)]
pub(super) struct Shared {
    inbox: Mutex<Inbox>,
    wake: Condvar,
    stats: Mutex<EngineStats>,
}

/// What callers have left for the thread.
#[derive(Default)]
pub(super) struct Inbox {
    /// Requests that are not admitted, first come first.
    pub(super) waiting: VecDeque<Waiting>,
    /// Something has changed since the thread last looked.
    pub(super) woken: bool,
    /// No handle is left.
    pub(super) closed: bool,
    /// The thread has ended.
    pub(super) ended: bool,
    /// Requests refused for a full queue.
    pub(super) n_refused: u64,
    /// Requests that went away while they waited.
    pub(super) n_cancelled: u64,
    /// How long a request ran of late, in seconds.
    pub(super) mean_s: f64,
}

/// A request that waits.
pub(super) struct Waiting {
    pub(super) request: Request,
    pub(super) events: Sender<Event>,
    pub(super) answer: std::sync::Arc<Answer>,
    pub(super) since: Instant,
}

/// Where the memory of a reroute is left; taken when the sequence goes on.
#[derive(Default)]
pub(super) struct Answer(Mutex<Option<PathMemory>>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Answer {
    pub(super) fn put(&self, memory: PathMemory) {
        *lock(&self.0) = Some(memory);
    }

    pub(super) fn take(&self) -> Option<PathMemory> {
        lock(&self.0).take()
    }
}

impl Shared {
    pub(super) fn inbox(&self) -> MutexGuard<'_, Inbox> {
        lock(&self.inbox)
    }

    /// The thread looks at what has changed.
    pub(super) fn wake(&self) {
        self.inbox().woken = true;
        self.wake.notify_one();
    }

    /// Waits until something has changed.
    pub(super) fn wait<'a>(&self, inbox: MutexGuard<'a, Inbox>) -> MutexGuard<'a, Inbox> {
        self.wake.wait_while(inbox, |inbox| !inbox.woken).unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn publish(&self, stats: EngineStats) {
        *lock(&self.stats) = stats;
    }

    pub(super) fn stats(&self) -> EngineStats {
        let stats = lock(&self.stats).clone();
        let inbox = self.inbox();
        let cancelled = stats.cancelled + inbox.n_cancelled;
        EngineStats { waiting: inbox.waiting.len(), refused: inbox.n_refused, cancelled, ..stats }
    }
}

impl Inbox {
    /// Forgets the requests whose callers went away.
    pub(super) fn forget_cancelled(&mut self) {
        let before = self.waiting.len();
        self.waiting.retain(|waiting| !waiting.events.is_closed());
        self.n_cancelled += (before - self.waiting.len()) as u64;
    }

    /// A request ran this long.
    pub(super) fn took(&mut self, seconds: f64) {
        self.mean_s = if self.mean_s == 0.0 { seconds } else { 0.9 * self.mean_s + 0.1 * seconds };
    }

    /// When one of `n_places` may be free for a request behind all that wait: whole seconds, from 1 to 60.
    pub(super) fn retry_after(&self, n_places: usize) -> Duration {
        let seconds = self.mean_s * (self.waiting.len() + 1) as f64 / n_places as f64;
        Duration::from_secs(seconds.ceil().clamp(1.0, 60.0) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_says_when_to_come_again() {
        let mut inbox = Inbox::default();
        assert_eq!(inbox.retry_after(4), Duration::from_secs(1));
        inbox.took(20.0);
        assert_eq!(inbox.retry_after(4), Duration::from_secs(5));
        inbox.took(10.0);
        assert_eq!(inbox.mean_s, 19.0);
        inbox.took(10_000.0);
        assert_eq!(inbox.retry_after(1), Duration::from_secs(60));
    }
}
