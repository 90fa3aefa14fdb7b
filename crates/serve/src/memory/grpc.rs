//! Memory by text over gRPC: what [`memory_service::serve_retrieval`] serves.

use std::sync::Arc;

use cluster_tree::{ClusterId, ClusterPath};
use memory_service::proto::retrieval as proto;
use memory_service::{Refusal, RetrievalSource, Retrieved, What};

use super::explain::ClusterSummary;
use super::{Ask, Bank, Banks, Blocked, Error, Memory, Result, Retrieval, Route};

impl RetrievalSource for Retrieval {
    fn info(&self) -> proto::InfoResponse {
        let identity = self.identity();
        let bank = |info: super::BankInfo| proto::Bank {
            name: info.name,
            step: info.step.0,
            source: info.source,
            dtype: proto::Dtype::from(info.dtype).into(),
            n_parameters: info.n_parameters,
            hashes: info.hashes.into_iter().collect(),
        };
        proto::InfoResponse {
            spec: Some((&identity.spec).into()),
            tree: self.tree().hash(),
            embedding_dim: self.tree().dim() as u32,
            banks: self.banks().list().into_iter().map(bank).collect(),
            hashes: identity.hashes.clone().into_iter().collect(),
        }
    }

    async fn route_texts(&self, texts: Vec<String>) -> std::result::Result<Vec<Vec<proto::Route>>, Refusal> {
        Ok(routes(self.route(texts).await?))
    }

    async fn route_embeddings(
        &self,
        rows: Vec<Vec<f32>>,
    ) -> std::result::Result<Vec<Vec<proto::Route>>, Refusal> {
        Ok(routes(Retrieval::route_embeddings(self, rows).await?))
    }

    async fn retrieve(&self, ask: memory_service::Ask) -> std::result::Result<Retrieved, Refusal> {
        Ok(self.retrieved(ask).await?)
    }

    fn explain(&self, prefix: &[u32]) -> std::result::Result<proto::ExplainResponse, Refusal> {
        let found = Retrieval::explain(self, prefix)?;
        let example = |example: super::Example| proto::Example {
            title: example.title,
            text: example.text,
            distance: example.distance,
        };
        Ok(proto::ExplainResponse {
            cluster: Some(cluster(found.cluster)),
            examples: found.examples.into_iter().map(example).collect(),
            children: found.children.into_iter().map(cluster).collect(),
        })
    }
}

impl Retrieval {
    async fn retrieved(&self, ask: memory_service::Ask) -> Result<Retrieved> {
        let memory_service::Ask { bank, what, levels, blocked } = ask;
        let bank = self.banks().get(bank.as_deref().unwrap_or(Banks::DEFAULT))?;
        let (path, passed, ids) = match what {
            What::Blocks(ids) => (None, vec![], ids),
            What::Text(text) => self.on_path(&bank, (text, Memory::Auto), &blocked, &levels).await?,
            What::Path(path) => {
                self.on_path(&bank, (String::new(), Memory::Path(path)), &blocked, &levels).await?
            }
        };
        let blocks = self.blocks(&bank, &ids).await?;
        let info = bank.info();
        Ok(Retrieved {
            bank: info.name.clone(),
            step: info.step,
            spec: bank.spec().clone(),
            hashes: info.hashes.clone(),
            path,
            blocked: passed,
            ids,
            blocks,
            held: Some(bank),
        })
    }

    /// The path of a text or one that is asked for, the blocked prefixes that were passed over, and the blocks.
    async fn on_path(
        &self,
        bank: &Bank,
        (text, memory): (String, Memory),
        blocked: &[String],
        levels: &[usize],
    ) -> Result<(Option<ClusterPath>, Vec<String>, Vec<ClusterId>)> {
        let blocked = Arc::new(Blocked::new(self.tree(), blocked)?);
        let (path, passed) = self.path(bank, Ask { bank: None, text, memory, blocked }).await?;
        let ids = path.as_ref().map(|path| bank.ids(path)).transpose()?.unwrap_or_default();
        Ok((path, passed, of_levels(bank, ids, levels)?))
    }
}

/// Those of a path's blocks that are of some levels; all for no levels.
fn of_levels(bank: &Bank, ids: Vec<ClusterId>, levels: &[usize]) -> Result<Vec<ClusterId>> {
    let has: Vec<usize> = bank.spec().levels().collect();
    if let Some(other) = levels.iter().find(|level| !has.contains(level)) {
        let expected = format!("some of the levels {has:?}");
        return Err(Error::Setting { name: "levels", expected, found: other.to_string() });
    }
    let wanted = |id: &ClusterId| levels.is_empty() || levels.contains(&usize::from(id.level));
    Ok(ids.into_iter().filter(wanted).collect())
}

fn routes(found: Vec<Vec<Route>>) -> Vec<Vec<proto::Route>> {
    let route = |Route { path, distance, score }: Route| {
        let path = Some(proto::Path::from(&path));
        proto::Route { path, distance, score }
    };
    found.into_iter().map(|routes| routes.into_iter().map(route).collect()).collect()
}

fn cluster(found: ClusterSummary) -> proto::Cluster {
    let term = |term: super::TermWeight| proto::Term { term: term.term, weight: term.weight };
    proto::Cluster {
        path: found.path,
        level: found.level as u32,
        n_windows: found.n_windows,
        share: found.share,
        terms: found.terms.into_iter().map(term).collect(),
        updates: found.updates,
        fetches: found.fetches,
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::UnknownBank { .. } | Error::UnknownPath { .. } => Self::NotFound(message),
            Error::BlockedPath { .. } => Self::Blocked(message),
            Error::Dimension { .. }
            | Error::Setting { .. }
            | Error::BankName { .. }
            | Error::Tree(_)
            | Error::Retrieve(
                retrieve::Error::EmptyText { .. }
                | retrieve::Error::UnknownText { .. }
                | retrieve::Error::Tree(_),
            ) => Self::Invalid(message),
            Error::Bank(memory_bank::Error::UnknownBlock { .. }) => Self::NotFound(message),
            Error::Bank(_) => Self::Unavailable(message),
            Error::Shared(_) => Self::Unavailable(message),
            _ => Self::Internal(message),
        }
    }
}
