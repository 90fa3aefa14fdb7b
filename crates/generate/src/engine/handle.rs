use std::sync::Arc;
use std::time::{Duration, Instant};

use anchor::{Decoder, KvPages, PathMemory};
use corpus::Tokenizer;
use tokio::sync::mpsc::{Receiver, channel};

use super::queue::{Answer, Shared, Waiting};
use super::scheduler::Scheduler;
use super::{EngineOptions, EngineStats, Event, Finish, Reason, Request};
use crate::{Error, Result};

/// Why a request was not taken.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The queue is full.
    #[error("{waiting} requests wait already; try again in {} s", retry_after.as_secs())]
    Busy {
        /// Requests in the queue.
        waiting: usize,
        /// When there may be room, from how long requests took of late: whole seconds, at least 1.
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
pub struct Engine {
    handle: Arc<Handle>,
}

/// All clones of an engine.
struct Handle {
    shared: Arc<Shared>,
    options: EngineOptions,
    vocab_size: usize,
    /// Positions that a sequence can have.
    limit: usize,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.inbox().closed = true;
        self.shared.wake();
    }
}

impl Engine {
    /// Starts the thread.
    ///
    /// # Errors
    /// When an option is out of range, there is no room for a single page, or no thread can be had.
    pub fn start(decoder: Arc<Decoder>, tokenizer: Arc<Tokenizer>, options: EngineOptions) -> Result<Self> {
        options.check()?;
        let page_bytes = decoder.position_bytes() * KvPages::PAGE;
        let n_pages = usize::try_from(options.kv_mib << 20).unwrap_or(usize::MAX) / page_bytes;
        if n_pages == 0 {
            let expected = format!("room for a page of {page_bytes} bytes");
            return Err(Error::Engine { key: "kv_mib", expected, found: options.kv_mib });
        }
        let limit = decoder.config().max_seq_len.min(n_pages * KvPages::PAGE);
        let vocab_size = decoder.config().vocab_size;
        let shared = Arc::new(Shared::default());
        let pages = decoder.pages(n_pages * KvPages::PAGE);
        let scheduler = Scheduler::new((decoder, tokenizer), options.clone(), pages, shared.clone());
        let thread = std::thread::Builder::new().name("engine".into());
        thread.spawn(move || scheduler.run()).map_err(Error::Thread)?;
        Ok(Self { handle: Arc::new(Handle { shared, options, vocab_size, limit }) })
    }

    /// Puts a request into the queue, or refuses it at once. Never blocks for longer than a moment.
    ///
    /// # Errors
    /// As [`Refused`] says.
    pub fn submit(&self, request: Request) -> std::result::Result<Generation, Refused> {
        let Handle { shared, options, vocab_size, limit } = &*self.handle;
        request.check(*vocab_size)?;
        let (prompt, new) = (request.prompt.len(), request.max_new_tokens);
        if prompt.saturating_add(new) > *limit {
            return Err(Refused::TooLong { prompt, new, limit: *limit });
        }
        // A token and a reroute for each new token, the prompt and the end: the thread never waits for a reader.
        let (sender, receiver) = channel(2 * new + 2);
        let answer = Arc::new(Answer::default());
        let mut inbox = shared.inbox();
        if inbox.ended {
            return Err(Refused::Stopped);
        }
        if inbox.waiting.len() >= options.max_waiting {
            inbox.forget_cancelled();
        }
        let waiting = inbox.waiting.len();
        if waiting >= options.max_waiting {
            inbox.n_refused += 1;
            let retry_after = inbox.retry_after(options.max_sequences);
            return Err(Refused::Busy { waiting, retry_after });
        }
        let since = Instant::now();
        inbox.waiting.push_back(Waiting { request, events: sender, answer: answer.clone(), since });
        drop(inbox);
        shared.wake();
        Ok(Generation {
            events: receiver,
            answer,
            shared: shared.clone(),
            n_prompt: prompt,
            n_seen: 0,
            done: false,
        })
    }

    /// What it does now and has done.
    pub fn stats(&self) -> EngineStats {
        self.handle.shared.stats()
    }

    /// The longest prompt and completion together, in tokens, that it takes.
    pub fn max_positions(&self) -> usize {
        self.handle.limit
    }
}

/// The answer to one request, as it comes. Dropped, the request is cancelled and its pages are free at the next step.
pub struct Generation {
    events: Receiver<Event>,
    answer: Arc<Answer>,
    shared: Arc<Shared>,
    n_prompt: usize,
    n_seen: usize,
    done: bool,
}

impl Generation {
    /// The next event; none after [`Event::Done`], with which every answer ends. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        if self.done {
            return None;
        }
        let event = self.events.recv().await;
        self.n_seen += usize::from(matches!(event, Some(Event::Token(_))));
        self.done = matches!(event, None | Some(Event::Done(_)));
        // A thread that ends without a word has panicked.
        Some(event.unwrap_or_else(|| {
            let reason = Reason::Failed("the engine has stopped".into());
            Event::Done(Finish::new(reason, self.n_prompt, self.n_seen))
        }))
    }

    /// The memory from the next token on; answers [`Event::Reroute`], and the sequence goes on. Before that it does
    /// nothing.
    pub fn set_memory(&self, memory: PathMemory) {
        self.answer.put(memory);
        self.shared.wake();
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.done {
            self.events.close();
            self.shared.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Sampling;
    use super::super::scheduler::Ending;
    use super::*;

    #[tokio::test]
    async fn a_thread_that_panics_keeps_nobody_waiting() {
        let shared = Arc::new(Shared::default());
        let options = EngineOptions::default();
        let handle = Handle { shared: shared.clone(), options, vocab_size: 10, limit: 100 };
        let engine = Engine { handle: Arc::new(handle) };
        let request = Request {
            prompt: vec![0, 1],
            memory: PathMemory::default(),
            sampling: Sampling::default(),
            max_new_tokens: 4,
            stop: vec![],
            logprobs: None,
            prompt_logprobs: None,
            reroute: None,
            ignore_eot: false,
        };
        let mut waiting = engine.submit(request.clone()).unwrap();
        let thread = std::thread::spawn(move || {
            let _ending = Ending(shared);
            panic!("a defect");
        });
        assert!(thread.join().is_err());
        let expected = Finish::new(Reason::Failed("the engine has stopped".into()), 2, 0);
        assert_eq!(waiting.next().await, Some(Event::Done(expected)));
        assert_eq!(waiting.next().await, None);
        assert!(matches!(engine.submit(request), Err(Refused::Stopped)));
    }
}
