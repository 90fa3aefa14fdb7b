use std::sync::atomic::{AtomicU64, Ordering};

use memory_bank::Step;

/// What a client has done so far.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct RemoteStats {
    /// Bytes of blocks fetched.
    pub received_bytes: u64,
    /// Bytes of blocks that were not sent, since what was kept of them had not changed.
    pub unchanged_bytes: u64,
    /// Bytes of gradients pushed.
    pub sent_bytes: u64,
    /// Tries that failed and were followed by another.
    pub retries: u64,
    /// Time of all fetches together, in microseconds.
    pub fetch_us: u64,
    /// Time of all pushes together, in microseconds.
    pub push_us: u64,
}

/// How a shard is.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct ShardStat {
    /// The last step applied.
    pub applied: Step,
    /// Steps that some rank has pushed and that wait for another.
    pub pending: u64,
    /// Blocks updated at least once.
    pub touched: u64,
}

/// The sums that [`RemoteStats`] tells.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) received: AtomicU64,
    pub(super) unchanged: AtomicU64,
    pub(super) sent: AtomicU64,
    pub(super) retries: AtomicU64,
    pub(super) fetch_us: AtomicU64,
    pub(super) push_us: AtomicU64,
}

impl Counters {
    pub(super) fn received(&self, n_bytes: usize) {
        self.received.fetch_add(n_bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn unchanged(&self, n_bytes: usize) {
        self.unchanged.fetch_add(n_bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn sent(&self, n_bytes: usize) {
        self.sent.fetch_add(n_bytes as u64, Ordering::Relaxed);
    }
}
