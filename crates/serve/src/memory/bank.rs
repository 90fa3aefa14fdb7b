use std::sync::Arc;

use anchor::PathMemory;
use cluster_tree::{ClusterId, ClusterPath};
use memory_bank::{BankVersion, BlockSpec, Encoded};

use super::{BankInfo, Error, Result};

/// A bank that is loaded. Who holds it may use it, also when another has taken its name.
pub struct Bank {
    info: BankInfo,
    spec: Arc<BlockSpec>,
    version: BankVersion,
}

/// How the blocks of a path were fetched.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fetched {
    /// What it took.
    pub ms: f64,
    /// By level with memory, coarse to fine.
    pub levels: Vec<LevelFetch>,
}

/// One block of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LevelFetch {
    /// Its level.
    pub level: usize,
    /// Whether it was packed already.
    pub cached: bool,
    /// Bytes of its numbers.
    pub bytes: u64,
}

impl Bank {
    /// What it is.
    pub fn info(&self) -> &BankInfo {
        &self.info
    }

    /// The sizes of its blocks.
    pub fn spec(&self) -> &BlockSpec {
        &self.spec
    }

    /// Its step, seed and hashes.
    pub fn version(&self) -> &BankVersion {
        &self.version
    }

    /// The blocks of a path, packed, and how they were fetched. None of levels without memory.
    ///
    /// # Errors
    /// When all tiers fail.
    pub async fn path_memory(self: &Arc<Self>, path: &ClusterPath) -> Result<(PathMemory, Fetched)> {
        Err(Error::Task(path.to_string()))
    }

    /// Blocks as the tiers hold them, in the order of `ids`.
    ///
    /// # Errors
    /// On a block that the bank does not have, and when all tiers fail.
    pub async fn blocks(&self, ids: &[ClusterId]) -> Result<Vec<Arc<Encoded>>> {
        Err(Error::Task(ids.len().to_string()))
    }
}
