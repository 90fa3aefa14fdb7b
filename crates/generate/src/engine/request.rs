use std::collections::BTreeMap;

use anchor::PathMemory;

use crate::{Error, Result};

/// A prompt to continue or to score.
#[derive(Clone)]
pub struct Request {
    /// Its tokens; the end-of-text token that begins a document is the caller's to put there.
    pub prompt: Vec<u32>,
    /// The memory it begins with.
    pub memory: PathMemory,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens to generate at most; 0 only scores the prompt.
    pub max_new_tokens: usize,
    /// Texts that end the completion; they are not part of its text. None of them is empty.
    pub stop: Vec<String>,
    /// Log probabilities of the chosen tokens, with this many of the likeliest beside each.
    pub logprobs: Option<usize>,
    /// Log probabilities of the prompt's tokens, with this many of the likeliest beside each.
    pub prompt_logprobs: Option<usize>,
    /// When the memory is asked for anew; none keeps it.
    pub reroute: Option<Reroute>,
    /// Goes on after a token that ends texts, which has no text then.
    pub ignore_eot: bool,
}

/// How a token is chosen from the scores of all: penalties and biases, then the temperature, then `min_p`, `top_k`
/// and `top_p` in this order, each over what the one before has left.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the scores; 0 takes the likeliest token, the first of equals.
    pub temperature: f64,
    /// Only this many of the likeliest; 0 is all.
    pub top_k: usize,
    /// Only the likeliest that together have this probability.
    pub top_p: f64,
    /// Only those with at least this part of the likeliest one's probability.
    pub min_p: f64,
    /// Taken from the score of every token that was generated.
    pub presence_penalty: f64,
    /// Taken from a token's score once for each time it was generated.
    pub frequency_penalty: f64,
    /// Divides positive scores of tokens of the prompt and the completion, multiplies negative ones; 1 is none.
    pub repetition_penalty: f64,
    /// Added to the scores of tokens.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Seeds the random numbers of this request.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: BTreeMap::new(),
            seed: 1,
        }
    }
}

impl Sampling {
    /// Fails on an option out of range.
    pub fn check(&self) -> Result<()> {
        let within = |key, found: f64, expected, allowed: bool| match allowed && found.is_finite() {
            true => Ok(()),
            false => Err(Error::Option { key, expected, found }),
        };
        let Self { temperature, top_p, min_p, repetition_penalty, .. } = *self;
        within("temperature", temperature, "0 or more", temperature >= 0.0)?;
        within("top_p", top_p, "a number in (0, 1]", top_p > 0.0 && top_p <= 1.0)?;
        within("min_p", min_p, "a number in [0, 1]", (0.0..=1.0).contains(&min_p))?;
        within("repetition_penalty", repetition_penalty, "more than 0", repetition_penalty > 0.0)?;
        for (key, penalty) in
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)]
        {
            within(key, penalty, "a number", true)?;
        }
        for &bias in self.logit_bias.values() {
            within("logit_bias", f64::from(bias), "a number", true)?;
        }
        Ok(())
    }
}

/// The most of the likeliest tokens that can stand beside a token.
pub const MAX_TOP: usize = 256;

/// The most stop texts of a request.
pub const MAX_STOPS: usize = 64;

/// The most bytes of one.
const MAX_STOP_BYTES: usize = 1024;

impl Request {
    /// Fails on what no engine of this vocabulary can do.
    pub(super) fn check(&self, vocab_size: usize) -> Result<()> {
        let fail = |what, expected: String, found: String| Err(Error::Request { what, expected, found });
        self.sampling.check()?;
        if self.prompt.is_empty() {
            return fail("prompt", "at least the end-of-text token".into(), "0 tokens".into());
        }
        let tokens = self.prompt.iter().chain(self.sampling.logit_bias.keys());
        if let Some(token) = tokens.into_iter().find(|&&token| token as usize >= vocab_size) {
            return fail("token", format!("an id below {vocab_size}"), token.to_string());
        }
        if self.stop.len() > MAX_STOPS {
            return fail("stop", format!("at most {MAX_STOPS} texts"), self.stop.len().to_string());
        }
        if let Some(stop) = self.stop.iter().find(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES) {
            return fail("stop", format!("texts of 1 to {MAX_STOP_BYTES} bytes"), stop.len().to_string());
        }
        for (what, n) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            if let Some(n) = n.filter(|&n| n > MAX_TOP) {
                return fail(what, format!("at most {MAX_TOP}"), n.to_string());
            }
        }
        match self.reroute {
            Some(Reroute::EveryTokens(0)) => fail("reroute", "every 1 token or more".into(), "0".into()),
            Some(Reroute::Entropy { nats, .. }) if !(nats.is_finite() && nats >= 0.0) => {
                fail("reroute", "an entropy of 0 nats or more".into(), nats.to_string())
            }
            _ => Ok(()),
        }
    }
}

/// When a sequence asks for its memory anew. Keys and values of the tokens before stay as they are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reroute {
    /// After every so many generated tokens, at least 1.
    EveryTokens(usize),
    /// After a token that was drawn from a distribution of at least this entropy, before penalties and temperature.
    Entropy {
        /// The entropy, in nats.
        nats: f64,
        /// Tokens generated at least since the last time, or since the beginning.
        min_tokens: usize,
    },
}

/// What a request is answered with, in this order: the prompt if its scores are asked for, tokens and reroutes, the end.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The scores of all tokens of the prompt; the first has no log probability.
    Prompt(Vec<TokenScore>),
    /// A generated token.
    Token(Token),
    /// The sequence rests until [`super::Generation::set_memory`].
    Reroute {
        /// The prompt and what was generated.
        tokens: Vec<u32>,
    },
    /// The end; nothing follows.
    Done(Finish),
}

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Which.
    pub id: u32,
    /// Text that is certain now: no half character, and nothing that may begin a stop text. What was held back
    /// comes with a later token or with the end.
    pub text: String,
    /// Its score; without log probabilities unless they were asked for.
    pub score: TokenScore,
}

/// A token in the distribution of the model, before penalties and temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenScore {
    /// The token.
    pub token: u32,
    /// Its log probability, in nats.
    pub logprob: Option<f32>,
    /// The likeliest tokens and their log probabilities, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Finish {
    /// Why.
    pub reason: Reason,
    /// The stop text that ended it.
    pub stop: Option<String>,
    /// Text that had been held back; it follows the texts of the tokens.
    pub text: String,
    /// Tokens of the prompt.
    pub n_prompt: usize,
    /// Tokens generated, the end-of-text token included.
    pub n_generated: usize,
    /// Milliseconds in the queue.
    pub queue_ms: f64,
    /// Milliseconds from there to the first token, or to the end of the prompt.
    pub prefill_ms: f64,
    /// Milliseconds from there to the end, without `rest_ms`.
    pub decode_ms: f64,
    /// Milliseconds of waiting for memory at reroutes.
    pub rest_ms: f64,
}

impl Finish {
    /// An end without text or times.
    pub(super) fn new(reason: Reason, n_prompt: usize, n_generated: usize) -> Self {
        Self {
            reason,
            stop: None,
            text: String::new(),
            n_prompt,
            n_generated,
            queue_ms: 0.0,
            prefill_ms: 0.0,
            decode_ms: 0.0,
            rest_ms: 0.0,
        }
    }
}

/// Why a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A stop text or the end-of-text token.
    Stop,
    /// `max_new_tokens`.
    Length,
    /// It could not go on; the text says why.
    Failed(String),
}
