//! Object stores, asked from threads that block.

use std::future::Future;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use object_store::ObjectStore;
use object_store::path::Path;
use tokio::runtime::{Builder, Handle, Runtime};
use url::Url;

use crate::{Error, Result};

/// An object store and one path in it, with the runtime that its requests run on. Every reader has
/// its own: a store's connections must not outlive the runtime that opened them.
pub(super) struct Remote {
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) path: Path,
    handle: Handle,
    runtime: Option<Runtime>,
}

impl Remote {
    /// Opens the store of `url`. Fails on a URL that is none, of an unknown scheme, or with a query.
    pub(super) fn open(url: &str, options: &[(String, String)]) -> Result<Self> {
        let invalid = |reason: String| Error::Url { url: url.to_owned(), reason };
        let parsed = Url::parse(url).map_err(|e| invalid(e.to_string()))?;
        if parsed.query().is_some() || parsed.fragment().is_some() {
            // The stores would drop it without a word.
            return Err(invalid("a url with `?` or `#` is not supported".to_owned()));
        }
        let options = options.iter().map(|(key, value)| (key, value.clone()));
        let (store, path) = object_store::parse_url_opts(&parsed, options)
            .map_err(|source| Error::Store { url: url.to_owned(), source })?;
        Self::new(store.into(), path)
    }

    /// A path of a store at hand. Fails when the runtime's thread cannot be started.
    pub(super) fn new(store: Arc<dyn ObjectStore>, path: Path) -> Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(Error::io(FilePath::new("object store runtime")))?;
        Ok(Self { store, path, handle: runtime.handle().clone(), runtime: Some(runtime) })
    }

    /// Starts `future`; its result comes through the channel, which closes if it panics.
    pub(super) fn start<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Receiver<T> {
        let (sender, receiver) = sync_channel(1);
        self.handle.spawn(async move {
            // The receiver is gone when the reader was dropped; then nobody wants the result.
            let _ = sender.send(future.await);
        });
        receiver
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // A plain drop would wait for requests nobody needs, and panic inside an async context.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
