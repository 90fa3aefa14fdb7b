use std::sync::Arc;
use std::time::{Duration, Instant};

use anchor::{Logits, Scores, Segment, SequenceCache};
use corpus::{TextStream, Tokenizer};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tokio::sync::mpsc::Sender;

use super::distribution::Distribution;
use super::queue::{Answer, Waiting};
use super::text::{Shown, StopText};
use super::{Event, Finish, Reason, Request, Reroute, Token, TokenScore};
use crate::Result;
use crate::choose::{Seen, choose};

/// A request that has its pages.
pub(super) struct Sequence {
    request: Request,
    cache: SequenceCache,
    /// The prompt and what was generated; the cache holds the first of them.
    tokens: Vec<u32>,
    random: ChaCha8Rng,
    seen: Seen,
    text: TextStream,
    stops: StopText,
    events: Sender<Event>,
    answer: Arc<Answer>,
    /// Since when it waits for the memory of a reroute.
    resting: Option<Instant>,
    /// Tokens generated since the last reroute.
    n_since_reroute: usize,
    prompt_scores: Vec<TokenScore>,
    times: Times,
}

struct Times {
    queued: Instant,
    admitted: Instant,
    first_token: Option<Instant>,
    rest: Duration,
}

/// That a sequence is at its end.
pub(super) struct Ended {
    reason: Reason,
    stop: Option<String>,
    /// Text that was held back.
    text: String,
}

impl Ended {
    pub(super) fn failed(why: impl std::fmt::Display) -> Self {
        Self { reason: Reason::Failed(why.to_string()), stop: None, text: String::new() }
    }

    pub(super) fn has_failed(&self) -> bool {
        matches!(self.reason, Reason::Failed(_))
    }
}

impl Sequence {
    pub(super) fn new(waiting: Waiting, cache: SequenceCache) -> Self {
        let Waiting { mut request, events, answer, since } = waiting;
        let tokens = request.prompt.clone();
        let mut seen = Seen::new();
        if request.sampling.repetition_penalty != 1.0 {
            seen.extend(tokens.iter().map(|&token| (token, 0)));
        }
        let mut prompt_scores = vec![];
        if request.prompt_logprobs.is_some() {
            prompt_scores.push(TokenScore { token: tokens[0], logprob: None, top: vec![] });
        }
        Self {
            cache,
            random: ChaCha8Rng::seed_from_u64(request.sampling.seed),
            seen,
            text: TextStream::default(),
            stops: StopText::new(std::mem::take(&mut request.stop)),
            events,
            answer,
            resting: None,
            n_since_reroute: 0,
            prompt_scores,
            times: Times { queued: since, admitted: Instant::now(), first_token: None, rest: Duration::ZERO },
            request,
            tokens,
        }
    }

    /// Tokens of its own.
    pub(super) fn n_generated(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Whether it has no token of its own yet.
    pub(super) fn is_prompt(&self) -> bool {
        self.n_generated() == 0
    }

    /// Whether nobody waits for it any more.
    pub(super) fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// Whether it waits for the memory of a reroute.
    pub(super) fn rests(&self) -> bool {
        self.resting.is_some()
    }

    /// Goes on if the memory of a reroute has come.
    pub(super) fn resume(&mut self) {
        let Some(since) = self.resting else { return };
        if let Some(memory) = self.answer.take() {
            self.request.memory = memory;
            self.times.rest += since.elapsed();
            self.resting = None;
        }
    }

    /// Tokens that have to go through the decoder before the next one is chosen. The last of a prompt that is only
    /// scored does not.
    pub(super) fn n_left(&self) -> usize {
        let unscored = usize::from(self.request.max_new_tokens == 0);
        let only_ends = unscored == 1 && self.request.prompt_logprobs.is_none();
        if only_ends { 0 } else { self.tokens.len() - unscored - self.cache.len() }
    }

    /// What is scored of its next `n` tokens.
    pub(super) fn scores(&self, n: usize) -> Scores {
        if self.is_prompt() && self.request.prompt_logprobs.is_some() {
            Scores::All
        } else if n == self.n_left() {
            Scores::Last
        } else {
            Scores::None
        }
    }

    /// Its next `n` tokens as a part of a step.
    pub(super) fn segment(&mut self, n: usize, scores: Scores) -> Segment<'_> {
        let tokens = &self.tokens[self.cache.len()..][..n];
        Segment { tokens, cache: &mut self.cache, memory: &self.request.memory, scores }
    }

    /// Takes the scores of its last tokens in the cache, `n_rows` of `logits` from `first_row` on: the prompt's are
    /// told, and the one behind it, or behind the last token generated, is chosen. Says whether this was the end.
    ///
    /// # Errors
    /// When scores are not finite.
    pub(super) fn accept(
        &mut self,
        tokenizer: &Tokenizer,
        logits: &Logits,
        (first_row, n_rows): (usize, usize),
    ) -> Result<Option<Ended>> {
        let first_position = self.cache.len() - n_rows;
        for i in 0..n_rows {
            let (row, next) = (logits.row(first_row + i), first_position + i + 1);
            if let Some(&token) = self.request.prompt.get(next) {
                let n_top = self.request.prompt_logprobs.unwrap_or(0);
                self.prompt_scores.push(Distribution::new(row)?.score(token, n_top));
            } else {
                self.tell_prompt();
                return self.generate(tokenizer, row);
            }
        }
        Ok(if self.n_left() == 0 { self.end_of_prompt() } else { None })
    }

    /// The end of a prompt that is only scored.
    pub(super) fn end_of_prompt(&mut self) -> Option<Ended> {
        (self.request.max_new_tokens == 0).then(|| {
            self.tell_prompt();
            self.times.first_token = Some(Instant::now());
            Ended { reason: Reason::Length, stop: None, text: String::new() }
        })
    }

    fn tell_prompt(&mut self) {
        if !self.prompt_scores.is_empty() {
            let scores = std::mem::take(&mut self.prompt_scores);
            self.tell(Event::Prompt(scores));
        }
    }

    /// There is room for every event by construction, and one that nobody takes is a cancelled request's.
    fn tell(&self, event: Event) {
        let _ = self.events.try_send(event);
    }

    /// Chooses the next token by the scores `row` [V].
    fn generate(&mut self, tokenizer: &Tokenizer, row: &[f32]) -> Result<Option<Ended>> {
        // Some models have rows that no token of their tokenizer has.
        let spelled = &row[..row.len().min(tokenizer.vocab_size())];
        let token = choose(spelled, &self.request.sampling, &self.seen, &mut self.random)?;
        let score = match self.request.logprobs {
            Some(n_top) => Distribution::new(row)?.score(token, n_top),
            None => TokenScore { token, logprob: None, top: vec![] },
        };
        if self.is_prompt() {
            self.text = TextStream::behind(tokenizer, self.tokens.last().copied())?;
        }
        self.times.first_token.get_or_insert_with(Instant::now);
        *self.seen.entry(token).or_default() += 1;
        self.tokens.push(token);
        self.n_since_reroute += 1;
        let is_eot = tokenizer.ends().contains(&token);
        let piece = if is_eot { String::new() } else { self.text.push(tokenizer, token)? };
        let Shown { text, stop } = self.stops.push(&piece);
        let ended = self.ended(tokenizer, is_eot, stop)?;
        self.tell(Event::Token(Token { id: token, text, score }));
        if ended.is_none() && self.reroutes(row)? {
            self.n_since_reroute = 0;
            self.resting = Some(Instant::now());
            // An answer to nothing is no answer to this.
            self.answer.take();
            self.tell(Event::Reroute { tokens: self.tokens.clone() });
        }
        Ok(ended)
    }

    /// Whether the token that was chosen is the last.
    fn ended(&mut self, tokenizer: &Tokenizer, is_eot: bool, stop: Option<String>) -> Result<Option<Ended>> {
        if stop.is_some() {
            return Ok(Some(Ended { reason: Reason::Stop, stop, text: String::new() }));
        }
        let reason = if is_eot && !self.request.ignore_eot {
            Reason::Stop
        } else if self.n_generated() == self.request.max_new_tokens {
            Reason::Length
        } else {
            return Ok(None);
        };
        let Shown { mut text, stop } = self.stops.push(&self.text.finish(tokenizer)?);
        text += &self.stops.finish();
        let reason = if stop.is_some() { Reason::Stop } else { reason };
        Ok(Some(Ended { reason, stop, text }))
    }

    /// Whether the memory is asked for behind a token that these scores chose.
    fn reroutes(&self, row: &[f32]) -> Result<bool> {
        Ok(match self.request.reroute {
            None => false,
            Some(Reroute::EveryTokens(n)) => self.n_since_reroute >= n,
            Some(Reroute::Entropy { nats, min_tokens }) => {
                self.n_since_reroute >= min_tokens && Distribution::new(row)?.entropy() >= nats
            }
        })
    }

    /// Its pages, and the last event with where it goes.
    pub(super) fn end(self, ended: Ended) -> (SequenceCache, Sender<Event>, Finish) {
        let (n_prompt, n_generated) = (self.request.prompt.len(), self.n_generated());
        let Ended { reason, stop, text } = ended;
        let Times { queued, admitted, first_token, rest } = self.times;
        let rest = rest + self.resting.map_or(Duration::ZERO, |since| since.elapsed());
        let first_token = first_token.unwrap_or_else(Instant::now);
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        let finish = Finish {
            stop,
            text,
            queue_ms: ms(admitted - queued),
            prefill_ms: ms(first_token - admitted),
            decode_ms: ms(first_token.elapsed().saturating_sub(rest)),
            rest_ms: ms(rest),
            ..Finish::new(reason, n_prompt, n_generated)
        };
        (self.cache, self.events, finish)
    }
}
