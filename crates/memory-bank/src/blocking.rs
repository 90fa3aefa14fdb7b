use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cluster_tree::ClusterId;
use futures::FutureExt;
use tokio::task::JoinHandle;

use crate::tensor_file::io_error;
use crate::{Block, BlockStore, Error, Result, Step};

/// A thread beside the caller's, so that connections are minded while the caller computes.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()
}

/// A block store as synchronous code sees it: the loops that own a device run on plain threads, and
/// async stops here.
pub struct Blocking<S> {
    store: Arc<S>,
    runtime: tokio::runtime::Runtime,
}

impl<S: BlockStore> Blocking<S> {
    /// Drives `store` from the calling thread.
    ///
    /// # Errors
    /// When the runtime cannot start.
    pub fn new(store: Arc<S>) -> std::io::Result<Self> {
        Ok(Self { store, runtime: runtime()? })
    }

    /// As [`Blocking::new`], of a store that is opened on the same runtime: its connections live on it.
    ///
    /// # Errors
    /// Those of `open`, and when the runtime cannot start.
    pub fn open<E: From<std::io::Error>>(
        open: impl Future<Output = std::result::Result<S, E>>,
    ) -> std::result::Result<Self, E> {
        let runtime = runtime()?;
        let store = Arc::new(runtime.block_on(open)?);
        Ok(Self { store, runtime })
    }

    /// The store.
    pub fn store(&self) -> &Arc<S> {
        &self.store
    }

    /// Drives other work on the same runtime, as that of the store's own functions.
    pub fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// Begins a fetch that goes on beside the caller; one that is dropped is given up.
    pub fn begin_fetch(&self, after: Step, ids: Vec<ClusterId>) -> Pending<Vec<Block>> {
        let store = Arc::clone(&self.store);
        Pending(self.runtime.spawn(async move { store.fetch(after, &ids).await }))
    }

    /// Begins a push that goes on beside the caller; one that is dropped is given up.
    pub fn begin_push(&self, step: Step, rank: usize, gradients: Vec<Block>) -> Pending<()> {
        let store = Arc::clone(&self.store);
        Pending(self.runtime.spawn(async move { store.push(step, rank, gradients).await }))
    }

    /// Begins a save that goes on beside the caller; one that is dropped is given up.
    pub fn begin_save(&self, step: Step) -> Pending<()> {
        let store = Arc::clone(&self.store);
        Pending(self.runtime.spawn(async move { store.save(step).await }))
    }

    /// Waits for what was begun; asks `check` every now and then whether that may still come.
    ///
    /// # Errors
    /// Those of the store, and that of `check`.
    pub fn finish<T, E: From<Error>>(
        &self,
        mut pending: Pending<T>,
        mut check: impl FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<T, E> {
        const EVERY: Duration = Duration::from_millis(100);
        self.runtime.block_on(async {
            loop {
                match tokio::time::timeout(EVERY, &mut pending.0).await {
                    Ok(done) => return Ok(done.map_err(|source| Error::Task { source }).flatten()?),
                    Err(_) => check()?,
                }
            }
        })
    }

    /// [`BlockStore::fetch`]; waits until step `after` has been applied.
    ///
    /// # Errors
    /// Those of the store.
    pub fn fetch(&self, after: Step, ids: &[ClusterId]) -> Result<Vec<Block>> {
        self.runtime.block_on(self.store.fetch(after, ids))
    }

    /// [`BlockStore::read`]; waits until step `after` has been applied.
    ///
    /// # Errors
    /// Those of the store.
    pub fn read(&self, after: Step, ids: &[ClusterId]) -> Result<Vec<Block>> {
        self.runtime.block_on(self.store.read(after, ids))
    }

    /// [`BlockStore::push`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn push(&self, step: Step, rank: usize, gradients: Vec<Block>) -> Result<()> {
        self.runtime.block_on(self.store.push(step, rank, gradients))
    }

    /// [`BlockStore::save`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn save(&self, step: Step) -> Result<()> {
        self.runtime.block_on(self.store.save(step))
    }
}

/// A request under way.
#[derive(Debug)]
pub struct Pending<T>(JoinHandle<Result<T>>);

impl<T> Pending<T> {
    /// What has become of it, once it has ended; it is not asked again then.
    pub fn ended(&mut self) -> Option<Result<T>> {
        let ended = (&mut self.0).now_or_never()?;
        Some(ended.map_err(|source| Error::Task { source }).flatten())
    }
}

impl<T> Drop for Pending<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Waits for work on files, on a thread and a runtime of its own: the caller may have a runtime or none.
/// `place` is what the work is about.
pub(crate) fn wait<T: Send>(place: &Path, work: impl Future<Output = Result<T>> + Send) -> Result<T> {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.map_err(|source| io_error(place, source))?.block_on(work)
    };
    std::thread::scope(|scope| {
        scope.spawn(run).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs work that copies or computes much, so that the runtime's own threads stay free.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|source| Error::Task { source })?
}
