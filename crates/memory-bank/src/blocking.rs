use std::sync::Arc;

use cluster_tree::ClusterId;

use crate::{Block, BlockStore, Result, Step};

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
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { store, runtime })
    }

    /// The store.
    pub fn store(&self) -> &Arc<S> {
        &self.store
    }

    /// [`BlockStore::fetch`]; waits until step `after` has been applied.
    ///
    /// # Errors
    /// Those of the store.
    pub fn fetch(&self, after: Step, ids: &[ClusterId]) -> Result<Vec<Block>> {
        self.runtime.block_on(self.store.fetch(after, ids))
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
