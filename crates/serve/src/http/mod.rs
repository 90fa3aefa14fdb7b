//! The service over HTTP: completions in the form of OpenAI's, memory by text, banks, and the page.
//!
//! ```text
//! connections  accept, time limits, TLS ─ router: who asks ([`access`]) ─ body: bytes ─ fields: JSON
//!   ─ request: one checked value ─ run: tokens, memory, the engine ─ render | stream: the answer
//! ```
//!
//! | | |
//! |---|---|
//! | `POST /v1/completions`, `/v1/chat/completions` | continue or score texts with memory |
//! | `GET /v1/models`, `POST /v1/embeddings` | what is served; vectors of texts |
//! | `POST /v1/route`, `/v1/retrieve` | the paths of texts; their blocks |
//! | `GET /v1/explain/…`, `/v1/tree`, `/v1/tree/fetches` | what clusters are about |
//! | `GET`, `POST /v1/banks`, `DELETE /v1/banks/NAME` | banks; the last two for admins |
//! | `GET /live`, `/ready`, `/metrics`, `/` | for operators, without a key; the page |
//!
//! Every bound is in [`HttpLimits`]; what is beyond is refused with OpenAI's error shape.

mod access;
mod app;
mod body;
mod chat;
mod complete;
mod connections;
mod error;
mod fields;
mod metrics;
mod models;
mod options;
mod render;
mod request;
mod router;
mod run;
mod stream;
mod twins;

pub use app::{App, Parts};
pub use chat::ChatTemplate;
pub use connections::serve;
pub use options::HttpLimits;
use router::router;

/// What keeps a run from being served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A bound of 0.
    #[error("limits.{key}: expected at least 1, found 0")]
    Limit {
        /// The bound.
        key: &'static str,
    },
    /// A key whose block-list is not of the tree.
    #[error("{0}")]
    Keys(String),
    /// A chat template that is none.
    #[error("chat template: {0}")]
    Template(String),
}
