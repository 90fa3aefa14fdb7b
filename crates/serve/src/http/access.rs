//! Who asks, and how much: API keys, their block-lists and their rates.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, header};
use cluster_tree::ClusterTree;
use memory_service::security::{ApiKey, KeyRole, ReloadingApiKeys};
use tokio::sync::OwnedSemaphorePermit;

use super::error::{Answer, ApiError};
use crate::memory::Blocked;

/// Who asks; held until the request ends.
#[derive(Clone)]
pub(super) struct Caller {
    /// The name of the key; none without keys.
    pub(super) name: Option<Arc<str>>,
    pub(super) role: KeyRole,
    /// Whose memory is not fetched.
    pub(super) blocked: Arc<Blocked>,
    _held: Arc<Held>,
}

/// A request under way: one of all, and one of its key's.
struct Held {
    _permit: OwnedSemaphorePermit,
    of_key: Option<(Arc<str>, Usages)>,
}

type Usages = Arc<Mutex<HashMap<Arc<str>, Usage>>>;

/// What a key has used.
struct Usage {
    running: u32,
    bucket: Bucket,
}

/// Requests that may begin now, which grow with time.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    /// Takes one of `per_minute`, or says when there will be one.
    fn take(&mut self, per_minute: u32, now: Instant) -> Result<(), Duration> {
        let rate = f64::from(per_minute) / 60.0;
        let grown = self.left + now.saturating_duration_since(self.at).as_secs_f64() * rate;
        (self.left, self.at) = (grown.min(f64::from(per_minute)), now);
        if self.left < 1.0 {
            return Err(Duration::from_secs_f64((1.0 - self.left) / rate));
        }
        self.left -= 1.0;
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some((name, usages)) = &self.of_key
            && let Some(usage) = usages.lock().unwrap_or_else(PoisonError::into_inner).get_mut(name)
        {
            usage.running = usage.running.saturating_sub(1);
        }
    }
}

/// Decides who may ask.
pub(super) struct Gate {
    keys: Option<ReloadingApiKeys>,
    tree: Option<Arc<ClusterTree>>,
    usages: Usages,
}

impl Gate {
    pub(super) fn new(keys: Option<ReloadingApiKeys>, tree: Option<Arc<ClusterTree>>) -> Self {
        Self { keys, tree, usages: Usages::default() }
    }

    /// Whether there are keys.
    pub(super) fn has_keys(&self) -> bool {
        self.keys.is_some()
    }

    /// Fails on a block-list that is not of the tree.
    pub(super) fn check(&self) -> Result<(), String> {
        let Some(keys) = &self.keys else { return Ok(()) };
        keys.current(Instant::now()).all().try_for_each(|key| self.blocked(key).map(drop))
    }

    /// Who asks, by a header such as `Authorization: Bearer …`, when one of all requests that may run is theirs.
    pub(super) fn enter(
        &self,
        headers: &HeaderMap,
        permit: OwnedSemaphorePermit,
        now: Instant,
    ) -> Answer<Caller> {
        let Some(keys) = &self.keys else {
            let held = Arc::new(Held { _permit: permit, of_key: None });
            return Ok(Caller { name: None, role: KeyRole::User, blocked: Arc::default(), _held: held });
        };
        let shown = headers.get(header::AUTHORIZATION).ok_or_else(|| {
            ApiError::unauthorized("expected an API key in a header Authorization: Bearer KEY, found none")
        })?;
        let key = bearer(shown.as_bytes()).and_then(|token| keys.current(now).holder_of(token));
        let key = key.ok_or_else(|| ApiError::unauthorized("the API key is not known"))?;
        let blocked = self.blocked(&key).map_err(ApiError::internal)?;
        let name: Arc<str> = key.name.as_str().into();
        self.count(&key, &name, now)?;
        let held = Held { _permit: permit, of_key: Some((Arc::clone(&name), Arc::clone(&self.usages))) };
        Ok(Caller { name: Some(name), role: key.role, blocked: Arc::new(blocked), _held: Arc::new(held) })
    }

    /// Counts a request of a key as running, unless it is one too many.
    fn count(&self, key: &ApiKey, name: &Arc<str>, now: Instant) -> Answer<()> {
        let mut usages = self.usages.lock().unwrap_or_else(PoisonError::into_inner);
        let full = Bucket { left: key.requests_per_minute.map_or(0.0, f64::from), at: now };
        let usage = usages.entry(Arc::clone(name)).or_insert(Usage { running: 0, bucket: full });
        if let Some(most) = key.max_concurrent.filter(|&most| usage.running >= most) {
            let message = format!("{} requests of key {name} run already, {most} is the most", usage.running);
            return Err(ApiError::busy(message, Duration::from_secs(1)));
        }
        if let Some(most) = key.requests_per_minute {
            usage.bucket.take(most, now).map_err(|after| {
                ApiError::busy(format!("key {name} may ask {most} times a minute"), after)
            })?;
        }
        usage.running += 1;
        Ok(())
    }

    fn blocked(&self, key: &ApiKey) -> Result<Blocked, String> {
        let Some(tree) = self.tree.as_ref().filter(|_| !key.blocked.is_empty()) else {
            return Ok(Blocked::default());
        };
        let text = |prefix: &Vec<u32>| prefix.iter().map(u32::to_string).collect::<Vec<_>>().join("/");
        let prefixes: Vec<String> = key.blocked.iter().map(text).collect();
        Blocked::new(tree, &prefixes).map_err(|error| format!("blocked of key {}: {error}", key.name))
    }
}

/// The token in a header; the scheme's case does not count.
fn bearer(authorization: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = authorization.split_at_checked(b"Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| token.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_refills_with_time_and_says_when() {
        let begin = Instant::now();
        let mut bucket = Bucket { left: 2.0, at: begin };
        assert_eq!([bucket.take(2, begin), bucket.take(2, begin)], [Ok(()), Ok(())]);
        assert_eq!(bucket.take(2, begin), Err(Duration::from_secs(30)));
        assert_eq!(bucket.take(2, begin + Duration::from_secs(15)), Err(Duration::from_secs(15)));
        assert_eq!(bucket.take(2, begin + Duration::from_secs(31)), Ok(()));
        // It never holds more than a minute's.
        let later = begin + Duration::from_secs(3600);
        assert_eq!([bucket.take(2, later), bucket.take(2, later)], [Ok(()), Ok(())]);
        assert!(bucket.take(2, later).is_err());
    }
}
