use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use cluster_tree::ClusterId;

use crate::{Block, BlockSpec, BlockStore, Error, Result, Step};

/// A tier that has every block: a mapped bank, the shards of one, an object store.
#[derive(Clone)]
pub struct TierSource {
    name: String,
    store: Arc<dyn Source>,
}

impl TierSource {
    /// A source, with the name that it has in errors and statistics.
    pub fn new(name: impl Into<String>, store: Arc<impl BlockStore>) -> Self {
        Self { name: name.into(), store }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn spec(&self) -> &BlockSpec {
        self.store.spec()
    }

    /// These blocks, once the source has reached a step. Fails on an answer that is not exactly them.
    pub(crate) async fn fetch(&self, after: Step, ids: &[ClusterId]) -> Result<Vec<Block>> {
        let blocks = self.store.fetch(after, ids).await?;
        let wrong =
            |expected: String, found: String| Err(Error::Answer { tier: self.name.clone(), expected, found });
        if blocks.len() != ids.len() {
            return wrong(format!("{} blocks", ids.len()), format!("{} blocks", blocks.len()));
        }
        for (block, &id) in blocks.iter().zip(ids) {
            let len = self.spec().block_len(usize::from(id.level));
            if (block.id, block.values.len()) != (id, len) {
                let text = |id, len| format!("block {id} of {len} values");
                return wrong(text(id, len), text(block.id, block.values.len()));
            }
        }
        Ok(blocks)
    }
}

type Fetching<'a> = Pin<Box<dyn Future<Output = Result<Vec<Block>>> + Send + 'a>>;

/// What is read of a [`BlockStore`], in a form that a list of different ones can hold.
trait Source: Send + Sync {
    fn spec(&self) -> &BlockSpec;
    fn fetch<'a>(&'a self, after: Step, ids: &'a [ClusterId]) -> Fetching<'a>;
}

impl<S: BlockStore> Source for S {
    fn spec(&self) -> &BlockSpec {
        BlockStore::spec(self)
    }

    fn fetch<'a>(&'a self, after: Step, ids: &'a [ClusterId]) -> Fetching<'a> {
        Box::pin(BlockStore::fetch(self, after, ids))
    }
}
