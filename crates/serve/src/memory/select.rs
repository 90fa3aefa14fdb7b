use std::sync::Arc;

use anchor::PathMemory;
use cluster_tree::ClusterPath;
use memory_bank::Step;

use super::{Bank, Blocked, LevelFetch};

/// What a request says of its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Memory {
    /// That of the path that the router finds for its text.
    Auto,
    /// None: the plain anchor.
    Off,
    /// The generic path's.
    Generic,
    /// That of a path of the tree.
    Path(ClusterPath),
}

/// Which memory is asked for.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Name of the bank; the default one without.
    pub bank: Option<String>,
    /// What is routed, for [`Memory::Auto`].
    pub text: String,
    /// How the path is found.
    pub memory: Memory,
    /// What is not to be used.
    pub blocked: Arc<Blocked>,
}

/// The memory of a request, fetched.
#[derive(Clone)]
pub struct Selected {
    /// Its blocks; none for no memory.
    pub memory: PathMemory,
    /// Their path; none for no memory.
    pub path: Option<ClusterPath>,
    /// Blocked prefixes of paths that were nearer, nearest first, each once.
    pub blocked: Vec<String>,
    /// The bank, to be held until the request ends; none for no memory.
    pub bank: Option<Arc<Bank>>,
    /// Step of the bank.
    pub bank_version: Option<Step>,
    /// What embedding and routing took.
    pub route_ms: f64,
    /// What the blocks took.
    pub fetch_ms: f64,
    /// Where the blocks were, by level.
    pub cached: Vec<LevelFetch>,
}
