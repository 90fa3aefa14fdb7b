use std::any::Any;
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;

use cluster_tree::{ClusterId, ClusterPath};
use memory_bank::{BlockSpec, Encoded, Step};
use tonic::Status;

use crate::proto::retrieval::{ExplainResponse, InfoResponse, Route};

/// What finds memory by text, and holds it. A clone is another handle.
pub trait RetrievalSource: Clone + Send + Sync + 'static {
    /// What is served.
    fn info(&self) -> InfoResponse;

    /// The paths of each text, best first.
    fn route_texts(
        &self,
        texts: Vec<String>,
    ) -> impl Future<Output = Result<Vec<Vec<Route>>, Refusal>> + Send;

    /// The paths of each embedding, `[D]`, best first.
    fn route_embeddings(
        &self,
        rows: Vec<Vec<f32>>,
    ) -> impl Future<Output = Result<Vec<Vec<Route>>, Refusal>> + Send;

    /// The blocks that are asked for.
    fn retrieve(&self, ask: Ask) -> impl Future<Output = Result<Retrieved, Refusal>> + Send;

    /// What the cluster of these indices, one a level from level 0 on, is about; of none, the root.
    fn explain(&self, prefix: &[u32]) -> Result<ExplainResponse, Refusal>;
}

/// Which blocks are asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    /// Name of the bank; the default one without.
    pub bank: Option<String>,
    /// What they belong to.
    pub what: What,
    /// Of a text or a path: levels that are wanted; all when it is empty.
    pub levels: Vec<usize>,
    /// Of a text or a path: prefixes of paths that are not to be used.
    pub blocked: Vec<String>,
}

/// What blocks belong to.
#[derive(Clone, Debug, PartialEq)]
pub enum What {
    /// A text, which is routed.
    Text(String),
    /// A path.
    Path(ClusterPath),
    /// Clusters, as they are asked for.
    Blocks(Vec<ClusterId>),
}

/// Blocks of a bank.
pub struct Retrieved {
    /// Name of the bank.
    pub bank: String,
    /// Its last step.
    pub step: Step,
    /// Its sizes.
    pub spec: BlockSpec,
    /// What it belongs to.
    pub hashes: BTreeMap<String, String>,
    /// Of a text or a path; none when everything is blocked.
    pub path: Option<ClusterPath>,
    /// Blocked prefixes of paths that were nearer.
    pub blocked: Vec<String>,
    /// Clusters of the blocks.
    pub ids: Vec<ClusterId>,
    /// The blocks, as the bank holds them.
    pub blocks: Vec<Arc<Encoded>>,
    /// What is kept until they are sent.
    pub held: Option<Arc<dyn Any + Send + Sync>>,
}

/// Why something is not answered. The messages name what was expected and what was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is asked for in a way that never is answered.
    #[error("{0}")]
    Invalid(String),
    /// There is no such bank or cluster.
    #[error("{0}")]
    NotFound(String),
    /// It is blocked.
    #[error("{0}")]
    Blocked(String),
    /// The memory cannot be reached now.
    #[error("{0}")]
    Unavailable(String),
    /// It is wrong here.
    #[error("{0}")]
    Internal(String),
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Invalid(message) => Self::invalid_argument(message),
            Refusal::NotFound(message) => Self::not_found(message),
            Refusal::Blocked(message) => Self::failed_precondition(message),
            Refusal::Unavailable(message) => Self::unavailable(message),
            Refusal::Internal(message) => Self::internal(message),
        }
    }
}
