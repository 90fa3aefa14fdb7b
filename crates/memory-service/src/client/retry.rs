use std::future::Future;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::pushback;

/// How long a request is tried again. Fetches, pushes (a repeated one is applied once) and saves are;
/// a restore is not.
#[derive(Copy, Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Retry {
    /// Milliseconds before the second try; they double with each further one.
    pub first_ms: u64,
    /// Most milliseconds between two tries.
    pub most_ms: u64,
    /// Seconds after the first try in which another may begin; 0 tries once.
    pub seconds: u64,
}

impl Default for Retry {
    fn default() -> Self {
        Self { first_ms: 20, most_ms: 2000, seconds: 60 }
    }
}

impl Retry {
    /// Tries until it succeeds, fails for good or takes too long; `again` sees every try that failed and
    /// is followed by another, and says which part of the pause to make, from 0.5 to 1: those who were
    /// refused together should not come back together.
    pub(crate) async fn run<T, F>(
        &self,
        mut work: impl FnMut() -> F,
        mut again: impl FnMut(&Status) -> f64,
    ) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        // The clock that the pauses are measured by, which a simulation moves.
        let start = Instant::now();
        let mut wait = self.first_ms.max(1);
        loop {
            let status = match work().await {
                Ok(done) => return Ok(done),
                Err(status) => status,
            };
            let pause = Duration::from_millis(pushback(&status).unwrap_or(wait).min(self.most_ms.max(1)));
            if !is_transient(&status) || start.elapsed() + pause > Duration::from_secs(self.seconds) {
                return Err(status);
            }
            tokio::time::sleep(pause.mul_f64(again(&status))).await;
            wait = (2 * wait).min(self.most_ms.max(1));
        }
    }
}

/// Whether the same request may succeed later: the shard is overloaded, restarts or cannot be reached.
fn is_transient(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::ResourceExhausted | Code::Unknown | Code::Cancelled | Code::Aborted => true,
        // A connection that broke.
        Code::Internal => std::error::Error::source(status).is_some(),
        _ => false,
    }
}
