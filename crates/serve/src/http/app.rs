use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use corpus::Tokenizer;
use generate::engine::Engine;
use memory_bank::TierOptions;
use memory_service::security::ReloadingApiKeys;
use tokio::sync::Semaphore;

use super::HttpLimits;
use super::access::Gate;
use super::chat::ChatTemplate;
use super::metrics::Metrics;
use super::request::Bounds;
use crate::http::Error;
use crate::memory::{Memory, Retrieval};

/// What a server of a run is made of.
pub struct Parts {
    /// The name of what is served: the model of requests.
    pub name: String,
    /// The step of its checkpoint.
    pub step: u64,
    /// Parameters of the anchor.
    pub n_parameters: u64,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// What generates.
    pub engine: Engine,
    /// Positions that a sequence of the engine may have.
    pub positions: usize,
    /// What finds memory; none of a run without.
    pub retrieval: Option<Retrieval>,
    /// The memory of requests that say nothing.
    pub memory: Memory,
    /// How chats become text; without it there are none.
    pub chat: Option<ChatTemplate>,
    /// Who may ask; without it everyone who reaches the server may, and nobody changes its banks.
    pub keys: Option<ReloadingApiKeys>,
    /// Caches of banks that are loaded by request.
    pub tiers: TierOptions,
    /// Bounds.
    pub limits: HttpLimits,
}

/// A run as it is served. A clone is another handle.
#[derive(Clone)]
pub struct App(Arc<Served>);

pub(super) struct Served {
    pub(super) name: String,
    pub(super) step: u64,
    pub(super) n_parameters: u64,
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) engine: Engine,
    pub(super) retrieval: Option<Retrieval>,
    pub(super) chat: Option<ChatTemplate>,
    pub(super) tiers: TierOptions,
    pub(super) limits: HttpLimits,
    pub(super) bounds: Bounds,
    pub(super) gate: Gate,
    pub(super) metrics: Metrics,
    /// Requests that may begin.
    pub(super) free: Arc<Semaphore>,
    /// Seconds since 1970 at the start.
    pub(super) created: u64,
    ready: AtomicBool,
}

impl App {
    /// Checks the parts.
    ///
    /// # Errors
    /// On a limit of 0, and on block-lists of keys that are not of the tree.
    pub fn new(parts: Parts) -> Result<Self, Error> {
        let Parts { name, step, n_parameters, tokenizer, engine, positions, retrieval, memory, .. } = parts;
        parts.limits.check()?;
        let bounds = Bounds {
            model: name.clone(),
            vocab_size: tokenizer.vocab_size(),
            positions,
            sequences: parts.limits.sequences,
            prompt_tokens: parts.limits.prompt_tokens.min(positions),
            n_levels: retrieval.as_ref().map(|retrieval| retrieval.tree().n_levels()),
            memory,
        };
        let gate = Gate::new(parts.keys, retrieval.as_ref().map(|retrieval| Arc::clone(retrieval.tree())));
        gate.check().map_err(Error::Keys)?;
        Ok(Self(Arc::new(Served {
            name,
            step,
            n_parameters,
            tokenizer,
            engine,
            retrieval,
            chat: parts.chat,
            tiers: parts.tiers,
            bounds,
            gate,
            metrics: Metrics::new(),
            free: Arc::new(Semaphore::new(parts.limits.requests.min(Semaphore::MAX_PERMITS))),
            limits: parts.limits,
            created: unix_seconds(),
            ready: AtomicBool::new(true),
        })))
    }

    pub(super) fn served(&self) -> &Served {
        &self.0
    }

    pub(super) fn is_ready(&self) -> bool {
        self.0.ready.load(Ordering::Relaxed)
    }

    /// Says at `/ready` that no more requests should come.
    pub(super) fn end(&self) {
        self.0.ready.store(false, Ordering::Relaxed);
    }
}

pub(super) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
