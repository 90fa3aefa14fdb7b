use std::sync::Arc;
use std::time::Duration;

use anchor::{Decoder, PathMemory};
use corpus::Tokenizer;

use super::{EngineOptions, EngineStats, Event, Request};
use crate::{Error, Result};

/// Why a request was not taken.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The queue is full.
    #[error("{waiting} requests wait already; try again in {} s", retry_after.as_secs())]
    Busy {
        /// Requests in the queue.
        waiting: usize,
        /// When there may be room, from how long requests took of late.
        retry_after: Duration,
    },
    /// It can never fit.
    #[error("prompt of {prompt} tokens plus {new} new ones exceeds the {limit} positions there are")]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for.
        new: usize,
        /// Positions of the anchor, or of all pages when those are fewer.
        limit: usize,
    },
    /// A part of it is out of range.
    #[error(transparent)]
    Invalid(#[from] Error),
    /// The engine's thread has ended.
    #[error("the engine has stopped")]
    Stopped,
}

/// A running engine. Cheap to clone; when the last one is dropped, what waits fails, what runs is finished, and the
/// thread ends.
#[derive(Clone)]
pub struct Engine {}

impl Engine {
    /// Starts the thread.
    ///
    /// # Errors
    /// When an option is out of range, there is no room for a single page, or no thread can be had.
    pub fn start(decoder: Arc<Decoder>, tokenizer: Arc<Tokenizer>, options: EngineOptions) -> Result<Self> {
        options.check()?;
        let _ = (decoder, tokenizer);
        Ok(Self {})
    }

    /// Puts a request into the queue, or refuses it at once.
    ///
    /// # Errors
    /// As [`Refused`] says.
    pub fn submit(&self, request: Request) -> std::result::Result<Generation, Refused> {
        let _ = request;
        Err(Refused::Stopped)
    }

    /// What it does now and has done.
    pub fn stats(&self) -> EngineStats {
        EngineStats::default()
    }
}

/// The answer to one request, as it comes. Dropped, the request is cancelled and its pages are free at the next step.
pub struct Generation {}

impl Generation {
    /// The next event; none after [`Event::Done`], with which every answer ends. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        None
    }

    /// The memory from the next token on; answers [`Event::Reroute`], and the sequence goes on. At any other time it
    /// does nothing.
    pub fn set_memory(&self, memory: PathMemory) {
        let _ = memory;
    }
}
