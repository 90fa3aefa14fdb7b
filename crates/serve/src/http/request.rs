//! A request for completions, checked: fields in, one value out, and no side effects.

use std::collections::BTreeMap;

use cluster_tree::ClusterPath;
use generate::engine::{Reroute, Sampling};

use super::error::{Answer, ApiError};
use super::fields::{Fields, Logprobs, MemoryField, Message, Prompts, RerouteField};
use crate::memory::Memory;

/// Stop texts of a request: OpenAI has 4, harnesses send more.
const MAX_STOPS: usize = 16;
/// Bytes of a stop text.
const MAX_STOP_BYTES: usize = 1024;
/// Likeliest tokens beside each.
const MAX_LOGPROBS: usize = 20;
/// Tokens that are made likelier or less likely.
const MAX_BIASES: usize = 1024;
/// Tokens of a completion without max_tokens, as OpenAI has it.
const DEFAULT_TOKENS: usize = 16;
/// The same of a chat.
const DEFAULT_CHAT_TOKENS: usize = 512;

/// What requests are checked against.
#[derive(Clone, Debug)]
pub(super) struct Bounds {
    /// The name of what is served.
    pub(super) model: String,
    pub(super) vocab_size: usize,
    /// Positions of a sequence.
    pub(super) positions: usize,
    /// Prompts times completions of each.
    pub(super) sequences: usize,
    pub(super) prompt_tokens: usize,
    /// Levels of the tree; none of a run without memory.
    pub(super) n_levels: Option<usize>,
    /// Of requests that say nothing.
    pub(super) memory: Memory,
}

/// One prompt.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Prompt {
    Text(String),
    /// What a template of chats made: tokens that it spells are those tokens.
    Chat(String),
    Ids(Vec<u32>),
}

/// What is asked for, whole and within bounds.
#[derive(Clone, Debug)]
pub(super) struct Completion {
    pub(super) prompts: Vec<Prompt>,
    /// Completions of each prompt.
    pub(super) n: usize,
    /// None takes what fits, up to [`DEFAULT_CHAT_TOKENS`].
    pub(super) max_tokens: Option<usize>,
    pub(super) sampling: Sampling,
    pub(super) stop: Vec<String>,
    pub(super) logprobs: Option<usize>,
    pub(super) echo: bool,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) ignore_eos: bool,
    pub(super) memory: Memory,
    /// What is routed instead of the prompts, one for each.
    pub(super) memory_texts: Option<Vec<String>>,
    pub(super) bank: Option<String>,
    pub(super) reroute: Option<Reroute>,
}

impl Completion {
    /// Tokens that a prompt of `n_prompt` may be continued by.
    pub(super) fn new_tokens(&self, n_prompt: usize, positions: usize) -> usize {
        let room = positions.saturating_sub(n_prompt);
        self.max_tokens.unwrap_or(room.min(DEFAULT_CHAT_TOKENS))
    }
}

/// The request of `/v1/completions`. `seed` is that of a request that gives none.
pub(super) fn completion(fields: Fields, bounds: &Bounds, seed: u64) -> Answer<Completion> {
    if fields.messages.is_some() {
        return Err(ApiError::field("messages", "is of /v1/chat/completions, expected prompt"));
    }
    for (name, is_there) in [
        ("max_completion_tokens", fields.max_completion_tokens.is_some()),
        ("top_logprobs", fields.top_logprobs.is_some()),
    ] {
        if is_there {
            return Err(ApiError::field(name, "is of /v1/chat/completions"));
        }
    }
    let logprobs = match fields.logprobs {
        None | Some(Logprobs::Flag(false)) => None,
        Some(Logprobs::Count(n)) => Some(at_most("logprobs", n, MAX_LOGPROBS)?),
        Some(Logprobs::Flag(true)) => {
            return Err(ApiError::field("logprobs", "expected 0 to 20, found true"));
        }
    };
    let prompts = match &fields.prompt {
        None => return Err(ApiError::field("prompt", "expected a text or token ids, found nothing")),
        Some(Prompts::Texts(texts)) => texts.iter().cloned().map(Prompt::Text).collect(),
        Some(Prompts::Ids(lists)) => lists.iter().cloned().map(Prompt::Ids).collect(),
    };
    let max_tokens = Some(fields.max_tokens.unwrap_or(DEFAULT_TOKENS));
    checked(fields, Asked { prompts, max_tokens, logprobs }, bounds, seed)
}

/// The request of `/v1/chat/completions`, of which `prompt` is the chat as one text.
pub(super) fn chat(fields: Fields, prompt: String, bounds: &Bounds, seed: u64) -> Answer<Completion> {
    let logprobs = match (fields.logprobs, fields.top_logprobs) {
        (None | Some(Logprobs::Flag(false)), None) => None,
        (Some(Logprobs::Flag(true)), n) => Some(at_most("top_logprobs", n.unwrap_or(0), MAX_LOGPROBS)?),
        (_, Some(_)) => return Err(ApiError::field("top_logprobs", "expected logprobs = true with it")),
        (Some(Logprobs::Count(n)), None) => {
            return Err(ApiError::field("logprobs", format!("expected true or false, found {n}")));
        }
    };
    if fields.echo == Some(true) {
        return Err(ApiError::field("echo", "is of /v1/completions"));
    }
    if fields.prompt.is_some() {
        return Err(ApiError::field("prompt", "is of /v1/completions, expected messages"));
    }
    let max_tokens = fields.max_completion_tokens.or(fields.max_tokens);
    checked(fields, Asked { prompts: vec![Prompt::Chat(prompt)], max_tokens, logprobs }, bounds, seed)
}

/// The messages of a chat, at least one.
pub(super) fn messages(fields: &Fields) -> Answer<&[Message]> {
    match fields.messages.as_deref() {
        None | Some([]) => Err(ApiError::field("messages", "expected one at least, found none")),
        Some(messages) => Ok(messages),
    }
}

/// What the two kinds of requests say differently.
struct Asked {
    prompts: Vec<Prompt>,
    max_tokens: Option<usize>,
    logprobs: Option<usize>,
}

fn checked(fields: Fields, asked: Asked, bounds: &Bounds, seed: u64) -> Answer<Completion> {
    let Asked { prompts, max_tokens, logprobs } = asked;
    let (model, of_model) = model_and_memory(fields.model.as_deref(), &bounds.model);
    check_model(model, &bounds.model)?;
    if let Some(name) = fields.refused() {
        return Err(ApiError::field(name, "is not supported, expected it to be left out"));
    }
    let n = fields.n.unwrap_or(1);
    check_sequences(prompts.len(), n, bounds.sequences)?;
    if fields.best_of.is_some_and(|best_of| best_of != 1 && best_of != n) {
        return Err(ApiError::field("best_of", "is not supported, expected it to be left out, or n"));
    }
    for prompt in &prompts {
        check_prompt(prompt, bounds)?;
    }
    let stream = fields.stream.unwrap_or(false);
    if fields.stream_options.is_some() && !stream {
        return Err(ApiError::field("stream_options", "expected stream = true with it"));
    }
    let include_usage = fields.stream_options.as_ref().and_then(|o| o.include_usage).unwrap_or(false);
    let sampling = sampling(&fields, bounds, seed)?;
    let stop = stops(fields.stop.map(|stop| stop.into_vec()).unwrap_or_default())?;
    let memory = memory(fields.memory.or(of_model), bounds)?;
    let memory_texts = fields.memory_text.map(|texts| texts.into_vec());
    if let Some(texts) = &memory_texts {
        if memory != Memory::Auto {
            return Err(ApiError::field("memory_text", "expected memory = \"auto\" with it"));
        }
        if texts.len() != prompts.len() {
            let (expected, found) = (prompts.len(), texts.len());
            return Err(ApiError::field(
                "memory_text",
                format!("expected {expected} as prompts, found {found}"),
            ));
        }
    }
    let reroute = fields.reroute.map(reroute).transpose()?;
    if reroute.is_some() && memory != Memory::Auto {
        return Err(ApiError::field("reroute", "expected memory = \"auto\" with it"));
    }
    Ok(Completion {
        prompts,
        n,
        max_tokens,
        sampling,
        stop,
        logprobs,
        echo: fields.echo.unwrap_or(false),
        stream,
        include_usage,
        ignore_eos: fields.ignore_eos.unwrap_or(false),
        memory,
        memory_texts,
        bank: fields.bank,
        reroute,
    })
}

/// A model by its name, and the memory that may be behind it, as in `NAME:off`: for clients that send no fields of ours.
fn model_and_memory<'a>(asked: Option<&'a str>, served: &'a str) -> (Option<&'a str>, Option<MemoryField>) {
    match asked.and_then(|asked| asked.strip_prefix(served)?.strip_prefix(':')) {
        Some(memory) => (Some(served), Some(MemoryField::Text(memory.to_owned()))),
        None => (asked, None),
    }
}

/// The name of what is served, if any is given.
pub(super) fn check_model(asked: Option<&str>, served: &str) -> Answer<()> {
    match asked.filter(|asked| *asked != served) {
        None => Ok(()),
        Some(asked) => {
            let asked: String = asked.chars().take(100).collect();
            let message = format!("model: {asked:?} is not served, expected {served:?}");
            let error = ApiError::not_found(message, "model_not_found");
            Err(ApiError { param: Some("model".into()), ..error })
        }
    }
}

fn check_sequences(prompts: usize, n: usize, most: usize) -> Answer<()> {
    if prompts == 0 {
        return Err(ApiError::field("prompt", "expected one at least, found none"));
    }
    if n == 0 || n > most {
        return Err(ApiError::field("n", format!("expected 1 to {most}, found {n}")));
    }
    if prompts > most / n {
        let message = format!("expected at most {most} prompts times n, found {prompts} times {n}");
        return Err(ApiError::field("prompt", message));
    }
    Ok(())
}

fn check_prompt(prompt: &Prompt, bounds: &Bounds) -> Answer<()> {
    let Prompt::Ids(ids) = prompt else { return Ok(()) };
    check_length(ids.len(), "", bounds)?;
    match ids.iter().find(|&&id| id as usize >= bounds.vocab_size) {
        Some(id) => {
            let message = format!("expected token ids below {}, found {id}", bounds.vocab_size);
            Err(ApiError::field("prompt", message))
        }
        None => Ok(()),
    }
}

/// That a prompt of so many tokens, "at least" or exactly, is allowed.
pub(super) fn check_length(n_tokens: usize, how: &str, bounds: &Bounds) -> Answer<()> {
    if n_tokens <= bounds.prompt_tokens {
        return Ok(());
    }
    let message = format!("expected at most {} tokens, found {how}{n_tokens}", bounds.prompt_tokens);
    Err(ApiError { code: Some("context_length_exceeded"), ..ApiError::field("prompt", message) })
}

fn at_most(name: &str, found: usize, most: usize) -> Answer<usize> {
    match found <= most {
        true => Ok(found),
        false => Err(ApiError::field(name, format!("expected 0 to {most}, found {found}"))),
    }
}

fn sampling(fields: &Fields, bounds: &Bounds, seed: u64) -> Answer<Sampling> {
    let within = |name: &str, value: Option<f64>, default: f64, (least, most): (f64, f64)| {
        let found = value.unwrap_or(default);
        match (least..=most).contains(&found) {
            true => Ok(found),
            false => Err(ApiError::field(name, format!("expected {least} to {most}, found {found}"))),
        }
    };
    let top_p = within("top_p", fields.top_p, 1.0, (0.0, 1.0))?;
    let top_k = match fields.top_k.unwrap_or(0) {
        -1 => 0,
        k if k >= 0 => usize::try_from(k).unwrap_or(usize::MAX),
        k => return Err(ApiError::field("top_k", format!("expected -1, 0 (all) or more, found {k}"))),
    };
    let sampling = Sampling {
        temperature: within("temperature", fields.temperature, 1.0, (0.0, 100.0))?,
        top_k,
        // Of a top_p of 0 the likeliest token is left.
        top_p: top_p.max(f64::MIN_POSITIVE),
        min_p: within("min_p", fields.min_p, 0.0, (0.0, 1.0))?,
        presence_penalty: within("presence_penalty", fields.presence_penalty, 0.0, (-2.0, 2.0))?,
        frequency_penalty: within("frequency_penalty", fields.frequency_penalty, 0.0, (-2.0, 2.0))?,
        repetition_penalty: within("repetition_penalty", fields.repetition_penalty, 1.0, (0.01, 100.0))?,
        logit_bias: biases(fields.logit_bias.as_ref(), bounds.vocab_size)?,
        seed: fields.seed.map_or(seed, |seed| seed as u64),
    };
    sampling
        .check()
        .map_err(|error| ApiError::new(axum::http::StatusCode::BAD_REQUEST, error.to_string()))?;
    Ok(sampling)
}

fn biases(found: Option<&BTreeMap<String, f64>>, vocab_size: usize) -> Answer<BTreeMap<u32, f32>> {
    let Some(found) = found else { return Ok(BTreeMap::new()) };
    let wrong = |message: String| ApiError::field("logit_bias", message);
    if found.len() > MAX_BIASES {
        return Err(wrong(format!("expected at most {MAX_BIASES} tokens, found {}", found.len())));
    }
    let bias = |(token, &bias): (&String, &f64)| {
        let id = token.parse::<u32>().ok().filter(|&id| (id as usize) < vocab_size);
        let token: String = token.chars().take(40).collect();
        let id =
            id.ok_or_else(|| wrong(format!("expected token ids below {vocab_size}, found {token:?}")))?;
        match (-100.0..=100.0).contains(&bias) {
            true => Ok((id, bias as f32)),
            false => Err(wrong(format!("expected -100 to 100, found {bias}"))),
        }
    };
    found.iter().map(bias).collect()
}

fn stops(stop: Vec<String>) -> Answer<Vec<String>> {
    if stop.len() > MAX_STOPS {
        return Err(ApiError::field(
            "stop",
            format!("expected at most {MAX_STOPS} texts, found {}", stop.len()),
        ));
    }
    match stop.iter().find(|text| text.is_empty() || text.len() > MAX_STOP_BYTES) {
        None => Ok(stop),
        Some(text) => {
            let message = format!("expected texts of 1 to {MAX_STOP_BYTES} bytes, found {}", text.len());
            Err(ApiError::field("stop", message))
        }
    }
}

/// The memory that a field names, of `bounds` without one.
pub(super) fn memory(field: Option<MemoryField>, bounds: &Bounds) -> Answer<Memory> {
    let Some(field) = field else { return Ok(bounds.memory.clone()) };
    let wrong = |message: String| ApiError::field("memory", message);
    let off = matches!(&field, MemoryField::Text(text) if text == "off");
    let Some(n_levels) = bounds.n_levels else {
        return if off {
            Ok(Memory::Off)
        } else {
            Err(wrong("this run has no memory, expected \"off\"".into()))
        };
    };
    match field {
        MemoryField::Indices(indices) if indices.len() == n_levels => {
            ClusterPath::new(indices).map(Memory::Path).map_err(|error| wrong(error.to_string()))
        }
        MemoryField::Indices(indices) => {
            Err(wrong(format!("expected {n_levels} indices, one a level, found {}", indices.len())))
        }
        MemoryField::Text(text) => match text.as_str() {
            "auto" => Ok(Memory::Auto),
            "off" => Ok(Memory::Off),
            "generic" => Ok(Memory::Generic),
            path => ClusterPath::parse(path, n_levels).map(Memory::Path).map_err(|_| {
                let path: String = path.chars().take(100).collect();
                wrong(format!(
                    "expected \"auto\", \"off\", \"generic\" or a path of {n_levels} indices such as \"3/49\", \
                     found {path:?}"
                ))
            }),
        },
    }
}

fn reroute(field: RerouteField) -> Answer<Reroute> {
    let wrong = |message: &str| Err(ApiError::field("reroute", message));
    match field {
        RerouteField { every_tokens: Some(0), .. } => wrong("expected every_tokens of at least 1, found 0"),
        RerouteField { every_tokens: Some(n), entropy: None, min_tokens: None } => {
            Ok(Reroute::EveryTokens(n))
        }
        RerouteField { every_tokens: None, entropy: Some(nats), min_tokens } => match nats > 0.0 {
            true => Ok(Reroute::Entropy { nats, min_tokens: min_tokens.unwrap_or(8).max(1) }),
            false => wrong("expected an entropy above 0"),
        },
        _ => wrong("expected {\"every_tokens\": n}, or {\"entropy\": nats} with min_tokens or without"),
    }
}

#[cfg(test)]
mod tests;
