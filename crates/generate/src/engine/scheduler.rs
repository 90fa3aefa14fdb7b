use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use anchor::{Decoder, KvPages, Logits, Scores};
use corpus::Tokenizer;
use rayon::prelude::*;

use super::queue::{Shared, Waiting};
use super::sequence::{Ended, Sequence};
use super::{EngineOptions, EngineStats, Event, Finish, Reason};
use crate::{Error, Result};

/// Rows of scores that prompts have in a step at most: with a vocabulary of 50,000 this is 12.8 MB.
const SCORED_ROWS: usize = 64;

/// Scores in a step from which on tokens are chosen on all threads.
const MANY_SCORES: usize = 1 << 14;

/// The engine's thread: the only owner of the keys and values, and of the sequences that run.
pub(super) struct Scheduler {
    decoder: Arc<Decoder>,
    tokenizer: Arc<Tokenizer>,
    options: EngineOptions,
    pages: KvPages,
    shared: Arc<Shared>,
    /// In the order in which they came.
    running: Vec<Sequence>,
    /// Something has ended in the last step, so that there may be room for what waits.
    has_room: bool,
    stats: EngineStats,
}

/// What one sequence has in a step.
#[derive(Clone, Copy)]
struct Part {
    /// Its place among the running.
    index: usize,
    n_tokens: usize,
    scores: Scores,
}

impl Part {
    fn n_rows(&self) -> usize {
        match self.scores {
            Scores::None => 0,
            Scores::Last => 1,
            Scores::All => self.n_tokens,
        }
    }
}

/// However the thread ends, nobody waits for it any more.
pub(super) struct Ending(pub(super) Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        let mut inbox = self.0.inbox();
        inbox.ended = true;
        inbox.waiting.clear();
    }
}

impl Scheduler {
    pub(super) fn new(
        (decoder, tokenizer): (Arc<Decoder>, Arc<Tokenizer>),
        options: EngineOptions,
        pages: KvPages,
        shared: Arc<Shared>,
    ) -> Self {
        let stats = EngineStats::default();
        let scheduler =
            Self { decoder, tokenizer, options, pages, shared, running: vec![], has_room: false, stats };
        scheduler.shared.publish(scheduler.stats());
        scheduler
    }

    /// Runs until no handle is left and what ran is finished.
    pub(super) fn run(mut self) {
        let _ending = Ending(self.shared.clone());
        while self.wait() {
            self.sweep();
            self.admit();
            self.step();
        }
    }

    /// Waits until there is something to do; false when there never will be.
    fn wait(&mut self) -> bool {
        let shared = self.shared.clone();
        let mut inbox = shared.inbox();
        loop {
            if inbox.closed {
                for waiting in std::mem::take(&mut inbox.waiting) {
                    self.stats.failed += 1;
                    tell_stopped(waiting);
                }
                if self.running.is_empty() {
                    return false;
                }
            }
            if inbox.woken || self.has_room || !self.running.iter().all(Sequence::rests) {
                (inbox.woken, self.has_room) = (false, false);
                return true;
            }
            inbox = shared.wait(inbox);
        }
    }

    /// Takes the pages of what was cancelled, and goes on with what has its memory.
    fn sweep(&mut self) {
        for mut sequence in std::mem::take(&mut self.running) {
            if sequence.is_cancelled() {
                let (cache, ..) = sequence.end(Ended::failed("cancelled"));
                self.pages.release(cache);
                self.stats.cancelled += 1;
            } else {
                sequence.resume();
                self.running.push(sequence);
            }
        }
    }

    /// Admits what waits, first come first served, while there are places and pages.
    fn admit(&mut self) {
        let shared = self.shared.clone();
        let mut inbox = shared.inbox();
        inbox.forget_cancelled();
        while self.running.len() < self.options.max_sequences {
            let Some(Waiting { request, .. }) = inbox.waiting.front() else { break };
            let n_positions = request.prompt.len() + request.max_new_tokens;
            let Some(cache) = self.pages.reserve(n_positions) else { break };
            let admitted = inbox.waiting.pop_front().map(|waiting| Sequence::new(waiting, cache));
            self.running.extend(admitted);
        }
        drop(inbox);
        self.shared.publish(self.stats());
    }

    /// One token of each sequence that generates, and a piece of the prompts.
    fn step(&mut self) {
        let began = Instant::now();
        let mut ended: Vec<(usize, Ended)> = vec![];
        for (index, sequence) in self.running.iter_mut().enumerate() {
            if sequence.n_left() == 0 && !sequence.rests() {
                ended.extend(sequence.end_of_prompt().map(|end| (index, end)));
            }
        }
        let parts = self.plan();
        if !parts.is_empty() {
            match self.forward(&parts) {
                Ok(logits) => ended.extend(self.accept(&parts, &logits)),
                Err(error) => ended.extend(self.step_alone(&parts, &error)),
            }
            self.stats.steps += 1;
            self.stats.busy_s += began.elapsed().as_secs_f64();
        }
        self.end(ended);
    }

    /// What each sequence has in the next step, in the order of the sequences. How a prompt is cut changes no result.
    fn plan(&self) -> Vec<Part> {
        let active = || self.running.iter().enumerate().filter(|(_, s)| !s.rests() && s.n_left() > 0);
        let n_generating = active().filter(|(_, sequence)| !sequence.is_prompt()).count();
        let step_tokens = self.options.step_tokens;
        let mut for_prompts = step_tokens.saturating_sub(n_generating).max(step_tokens / 4).max(1);
        let mut for_rows = SCORED_ROWS;
        let mut parts = vec![];
        for (index, sequence) in active() {
            let mut n_tokens = sequence.n_left();
            if sequence.is_prompt() {
                n_tokens = n_tokens.min(for_prompts);
                if sequence.scores(n_tokens) == Scores::All {
                    n_tokens = n_tokens.min(for_rows);
                    for_rows -= n_tokens;
                }
                for_prompts -= n_tokens;
            }
            if n_tokens > 0 {
                parts.push(Part { index, n_tokens, scores: sequence.scores(n_tokens) });
            }
        }
        parts
    }

    fn forward(&mut self, parts: &[Part]) -> Result<Logits> {
        let Self { decoder, pages, running, .. } = self;
        let mut parts = parts.iter().peekable();
        let mut segments = vec![];
        for (index, sequence) in running.iter_mut().enumerate() {
            if let Some(part) = parts.next_if(|part| part.index == index) {
                segments.push(sequence.segment(part.n_tokens, part.scores));
            }
        }
        // A step that fails or panics has appended nothing: positions count when all are written.
        caught(|| Ok(decoder.step(pages, &mut segments)?))
    }

    /// A failed step once more, each sequence alone, which has the same results: those fail that fail alone.
    fn step_alone(&mut self, parts: &[Part], error: &Error) -> Vec<(usize, Ended)> {
        if let [part] = parts {
            return vec![(part.index, Ended::failed(error))];
        }
        let mut ended = vec![];
        for part in parts {
            match self.forward(&[*part]) {
                Ok(logits) => ended.extend(self.accept(&[*part], &logits)),
                Err(error) => ended.push((part.index, Ended::failed(error))),
            }
        }
        ended
    }

    /// Gives each sequence its rows, and tells which have ended.
    fn accept(&mut self, parts: &[Part], logits: &Logits) -> Vec<(usize, Ended)> {
        let mut rows = vec![];
        let (mut first_row, mut left) = (0, parts.iter().peekable());
        for (index, sequence) in self.running.iter_mut().enumerate() {
            if let Some(part) = left.next_if(|part| part.index == index) {
                let was_prompt = sequence.is_prompt();
                self.stats.prompt_tokens += if was_prompt { part.n_tokens as u64 } else { 0 };
                rows.push((index, sequence, (first_row, part.n_rows())));
                first_row += part.n_rows();
            }
        }
        let tokenizer = &*self.tokenizer;
        let choose = |(index, sequence, rows): (usize, &mut Sequence, (usize, usize))| {
            let (before, index) = (sequence.n_generated(), index);
            let ended = caught(|| sequence.accept(tokenizer, logits, rows));
            let ended = ended.unwrap_or_else(|error| Some(Ended::failed(error)));
            (index, ended, sequence.n_generated() - before)
        };
        let vocab_size = self.decoder.config().vocab_size;
        let chosen: Vec<_> = if rows.len() > 1 && logits.n_rows() * vocab_size >= MANY_SCORES {
            rows.into_par_iter().map(choose).collect()
        } else {
            rows.into_iter().map(choose).collect()
        };
        self.stats.generated_tokens += chosen.iter().map(|(.., n)| *n as u64).sum::<u64>();
        chosen.into_iter().filter_map(|(index, ended, _)| Some((index, ended?))).collect()
    }

    /// Gives back the pages of these sequences, then tells their callers.
    fn end(&mut self, mut ended: Vec<(usize, Ended)>) {
        if ended.is_empty() {
            self.shared.publish(self.stats());
            return;
        }
        self.has_room = true;
        ended.sort_by_key(|(index, _)| *index);
        let mut told = vec![];
        for (index, ended) in ended.into_iter().rev() {
            let failed = ended.has_failed();
            let (cache, events, finish) = self.running.remove(index).end(ended);
            self.pages.release(cache);
            self.stats.failed += u64::from(failed);
            self.stats.completed += u64::from(!failed);
            told.push((events, finish));
        }
        let mut inbox = self.shared.inbox();
        for (_, finish) in &told {
            inbox.took((finish.prefill_ms + finish.decode_ms + finish.rest_ms) / 1e3);
        }
        drop(inbox);
        self.shared.publish(self.stats());
        for (events, finish) in told {
            let _ = events.try_send(Event::Done(finish));
        }
    }

    fn stats(&self) -> EngineStats {
        EngineStats {
            running: self.running.len(),
            resting: self.running.iter().filter(|sequence| sequence.rests()).count(),
            free_pages: self.pages.n_free(),
            total_pages: self.pages.n_pages(),
            ..self.stats.clone()
        }
    }
}

fn tell_stopped(waiting: Waiting) {
    let reason = Reason::Failed("the engine stops".into());
    let finish = Finish {
        queue_ms: waiting.since.elapsed().as_secs_f64() * 1e3,
        ..Finish::new(reason, waiting.request.prompt.len(), 0)
    };
    let _ = waiting.events.try_send(Event::Done(finish));
}

/// A panic of `f` as an error.
fn caught<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    let message = |panic: Box<dyn Any + Send>| {
        let text = panic.downcast_ref::<&str>().map(ToString::to_string);
        text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
    };
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| Err(Error::Panicked { message: message(panic) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_that_says_what_it_said() {
        let index = [0].len();
        let error = caught(|| Ok([1, 2][index + 1])).unwrap_err().to_string();
        assert_eq!(error, "panicked: index out of bounds: the len is 2 but the index is 2");
        let said = caught::<()>(|| panic!("a defect")).unwrap_err().to_string();
        assert_eq!(said, "panicked: a defect");
        assert_eq!(caught(|| Ok(3)).unwrap(), 3);
    }
}
