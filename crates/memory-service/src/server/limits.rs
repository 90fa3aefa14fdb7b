use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};
use tonic::{Code, Status};

use crate::RETRY_METADATA;

/// A bound on everything that a server does at once. What is beyond is refused at once, with a hint
/// when to come back.
#[derive(Copy, Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Fetches whose blocks are on their way.
    pub fetches: usize,
    /// Requests that wait for a step.
    pub waiting: usize,
    /// MiB of gradients that are received or wait for other ranks' requests to be read.
    pub push_mib: usize,
    /// Blocks of one request.
    pub blocks_per_request: usize,
    /// MiB of the blocks of one request.
    pub request_mib: usize,
    /// Connections to each port.
    pub connections: usize,
    /// Seconds that a request may take, waiting for its step included; a shorter deadline of the
    /// caller holds too.
    pub request_s: u64,
    /// Seconds that a connection may be silent in the middle of a request.
    pub idle_s: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            fetches: 64,
            waiting: 4096,
            push_mib: 4096,
            blocks_per_request: 65_536,
            request_mib: 8192,
            connections: 4096,
            request_s: 600,
            idle_s: 30,
        }
    }
}

/// When a refused caller may come back.
const RETRY_AFTER: Duration = Duration::from_millis(50);

/// One bounded resource.
pub(crate) struct Bound {
    what: &'static str,
    limit: usize,
    free: Arc<Semaphore>,
}

impl Bound {
    pub(crate) fn new(what: &'static str, limit: usize) -> Self {
        let limit = limit.min(Semaphore::MAX_PERMITS).min(u32::MAX as usize);
        Self { what, limit, free: Arc::new(Semaphore::new(limit)) }
    }

    /// Takes `n` of the resource until the permit is dropped. Fails at once when they are not free, and
    /// for good when there will never be as many.
    pub(crate) fn take(&self, n: usize) -> Result<OwnedSemaphorePermit, Status> {
        if n > self.limit {
            let message = format!("{n} {} in one request, expected at most {}", self.what, self.limit);
            return Err(Status::invalid_argument(message));
        }
        match Arc::clone(&self.free).try_acquire_many_owned(n as u32) {
            Ok(permit) => Ok(permit),
            Err(TryAcquireError::NoPermits) => Err(self.exhausted()),
            Err(TryAcquireError::Closed) => Err(Status::unavailable("the shard is shutting down")),
        }
    }

    /// Its name, for messages.
    pub(crate) fn what(&self) -> &'static str {
        self.what
    }

    /// How much of it is in use.
    pub(crate) fn in_use(&self) -> usize {
        self.limit - self.free.available_permits()
    }

    fn exhausted(&self) -> Status {
        let message = format!("{} of {} {} are in use", self.in_use(), self.limit, self.what);
        let mut status = Status::new(Code::ResourceExhausted, message);
        let ms = RETRY_AFTER.as_millis() as u64;
        status.metadata_mut().insert(RETRY_METADATA, ms.into());
        status
    }
}
