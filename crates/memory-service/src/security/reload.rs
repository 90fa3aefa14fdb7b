use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::{Result, Tls, Tokens};

/// Certificates that follow their files.
pub type ReloadingTls = Reloading<Tls>;
/// Tokens that follow their file.
pub type ReloadingTokens = Reloading<Tokens>;

/// The files are looked at once in this time at most.
const INTERVAL: Duration = Duration::from_secs(1);

/// A value that is read again when its files change. Who holds the old value keeps it.
pub struct Reloading<T> {
    paths: Vec<PathBuf>,
    read: Box<dyn Fn() -> Result<T> + Send + Sync>,
    state: Mutex<State<T>>,
}

struct State<T> {
    value: Arc<T>,
    /// Of the files as they were when they were last read, well or not.
    stamps: Vec<Option<Stamp>>,
    looked: Option<Instant>,
}

/// What changes when a file is written or replaced; a file renamed over another one of the same time
/// and length has another inode.
#[derive(PartialEq)]
struct Stamp {
    modified: Option<SystemTime>,
    bytes: u64,
    inode: u64,
}

impl<T> Reloading<T> {
    /// Reads the value, which must be good this first time, from the files at `paths`.
    pub(super) fn new(
        paths: Vec<PathBuf>,
        read: impl Fn() -> Result<T> + Send + Sync + 'static,
    ) -> Result<Self> {
        // The stamps come first: a file that changes while it is read has another one next time.
        let stamps = stamps(&paths);
        let value = Arc::new(read()?);
        let state = Mutex::new(State { value, stamps, looked: None });
        Ok(Self { paths, read: Box::new(read), state })
    }

    /// The value at the time `now`. If the files have changed they are read; if they are not good then,
    /// the value before stays, and the log is told once for each change. Looks at the files once a
    /// second at most, which blocks the thread for as long as the file system takes.
    pub fn current(&self, now: Instant) -> Arc<T> {
        let mut state = self.state();
        let due = state.looked.is_none_or(|looked| now.saturating_duration_since(looked) >= INTERVAL);
        if due {
            state.looked = Some(now);
            let found = stamps(&self.paths);
            if found != state.stamps {
                state.stamps = found;
                match (self.read)() {
                    Ok(value) => state.value = Arc::new(value),
                    Err(e) => tracing::warn!("not reloaded, what was there before stays: {e}"),
                }
            }
        }
        state.value.clone()
    }

    /// Reads the files now. When they are not good, the value before stays.
    pub fn reload(&self) -> Result<()> {
        let mut state = self.state();
        state.stamps = stamps(&self.paths);
        state.value = Arc::new((self.read)()?);
        Ok(())
    }

    /// The state is replaced whole, so a thread that panicked has left a good one.
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn stamps(paths: &[PathBuf]) -> Vec<Option<Stamp>> {
    paths.iter().map(|path| stamp(path)).collect()
}

fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = fs::metadata(path).ok()?;
    #[cfg(unix)]
    let inode = std::os::unix::fs::MetadataExt::ino(&metadata);
    #[cfg(not(unix))]
    let inode = 0;
    Some(Stamp { modified: metadata.modified().ok(), bytes: metadata.len(), inode })
}
