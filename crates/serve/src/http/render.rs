//! Answers as OpenAI's clients read them.

use cluster_tree::ClusterPath;
use corpus::Tokenizer;
use generate::engine::{Finish, Reason, TokenScore};
use serde_json::{Map, Value, json};

use super::run::{Done, Prepared};
use crate::memory::Memory;

/// Which of the two kinds of completions is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Chat,
}

/// What every part of an answer begins with.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub(super) kind: Kind,
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
}

impl Head {
    /// An answer, or a chunk of a stream of one.
    pub(super) fn around(&self, is_chunk: bool, choices: Vec<Value>) -> Map<String, Value> {
        let object = match (self.kind, is_chunk) {
            (Kind::Text, _) => "text_completion",
            (Kind::Chat, false) => "chat.completion",
            (Kind::Chat, true) => "chat.completion.chunk",
        };
        let mut map = Map::new();
        map.insert("id".into(), json!(self.id));
        map.insert("object".into(), json!(object));
        map.insert("created".into(), json!(self.created));
        map.insert("model".into(), json!(self.model));
        map.insert("choices".into(), Value::Array(choices));
        map
    }
}

/// The tokens of the prompts, each counted once, and those generated.
pub(super) fn usage(n_prompt: usize, n_generated: usize) -> Value {
    json!({
        "prompt_tokens": n_prompt,
        "completion_tokens": n_generated,
        "total_tokens": n_prompt + n_generated,
    })
}

/// `stop` or `length`.
pub(super) fn finish_reason(finish: &Finish) -> &'static str {
    match finish.reason {
        Reason::Stop => "stop",
        Reason::Length | Reason::Failed(_) => "length",
    }
}

/// One choice of a whole answer.
pub(super) fn choice(
    tokenizer: &Tokenizer,
    kind: Kind,
    done: &Done,
    echo: bool,
    has_logprobs: bool,
) -> Value {
    let scores: Vec<&TokenScore> = done.tokens.iter().map(|token| &token.score).collect();
    let logprobs = match (has_logprobs, kind) {
        (false, _) => Value::Null,
        (true, Kind::Chat) => chat_logprobs(tokenizer, &scores),
        (true, Kind::Text) => {
            let mut table = LogprobTable::default();
            if echo {
                table.prompt(tokenizer, &done.prompt, &done.prompt_scores);
            }
            scores.iter().for_each(|score| table.add(tokenizer, score));
            table.into_value()
        }
    };
    let (index, reason) = (done.index, finish_reason(&done.finish));
    match kind {
        Kind::Text => {
            let text = if echo { format!("{}{}", done.prompt.text, done.text) } else { done.text.clone() };
            json!({"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason})
        }
        Kind::Chat => {
            let message = json!({"role": "assistant", "content": done.text, "refusal": null});
            json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
        }
    }
}

/// OpenAI's table of a text's tokens: columns of one length.
#[derive(Debug, Default)]
pub(super) struct LogprobTable {
    tokens: Vec<Value>,
    logprobs: Vec<Value>,
    top: Vec<Value>,
    offsets: Vec<Value>,
    /// Characters so far.
    offset: usize,
}

impl LogprobTable {
    /// A table that goes on after so many characters.
    pub(super) fn after(offset: usize) -> Self {
        Self { offset, ..Self::default() }
    }

    pub(super) fn offset(&self) -> usize {
        self.offset
    }

    /// The caller's tokens of a prompt. The first of them has no log probability, as in OpenAI's answers.
    pub(super) fn prompt(&mut self, tokenizer: &Tokenizer, prompt: &Prepared, scores: &[TokenScore]) {
        for (i, score) in scores.iter().skip(prompt.n_added).enumerate() {
            match i {
                0 => self.add(tokenizer, &TokenScore { token: score.token, logprob: None, top: vec![] }),
                _ => self.add(tokenizer, score),
            }
        }
    }

    pub(super) fn add(&mut self, tokenizer: &Tokenizer, score: &TokenScore) {
        let text = token_text(tokenizer, score.token);
        self.offsets.push(json!(self.offset));
        self.offset += text.chars().count();
        self.top.push(match score.logprob {
            None => Value::Null,
            Some(logprob) => {
                // The likeliest first; the chosen token is there whether it is one of them or not.
                let chosen = (score.token, logprob);
                let mut map = Map::new();
                for &(token, logprob) in score.top.iter().chain([&chosen]) {
                    map.entry(token_text(tokenizer, token)).or_insert(number(logprob));
                }
                Value::Object(map)
            }
        });
        self.logprobs.push(score.logprob.map_or(Value::Null, number));
        self.tokens.push(Value::String(text));
    }

    pub(super) fn into_value(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.logprobs,
            "top_logprobs": self.top,
            "text_offset": self.offsets,
        })
    }
}

/// The form of chats: a list of tokens, each with the likeliest beside it.
pub(super) fn chat_logprobs(tokenizer: &Tokenizer, scores: &[&TokenScore]) -> Value {
    let entry = |token: u32, logprob: Option<f32>| {
        let text = token_text(tokenizer, token);
        let bytes: Vec<u8> = text.bytes().collect();
        (text, logprob.map_or(Value::Null, number), bytes)
    };
    let row = |score: &&TokenScore| {
        let top = score.top.iter().map(|&(token, logprob)| {
            let (token, logprob, bytes) = entry(token, Some(logprob));
            json!({"token": token, "logprob": logprob, "bytes": bytes})
        });
        let (token, logprob, bytes) = entry(score.token, score.logprob);
        json!({"token": token, "logprob": logprob, "bytes": bytes, "top_logprobs": top.collect::<Vec<_>>()})
    };
    json!({"content": scores.iter().map(row).collect::<Vec<_>>(), "refusal": null})
}

/// A log probability; JSON has no infinity, below which nothing is.
fn number(logprob: f32) -> Value {
    json!(if logprob.is_finite() { logprob } else { f32::MIN })
}

/// What a token spells. One that is part of a character has the form `token_id:N`, which is that of no other.
pub(super) fn token_text(tokenizer: &Tokenizer, token: u32) -> String {
    match tokenizer.decode(&[token]) {
        Ok(text) if !text.contains('\u{fffd}') => text,
        _ => format!("token_id:{token}"),
    }
}

/// What is told of one completion beside OpenAI's fields.
pub(super) struct Told<'a> {
    pub(super) prompt: &'a Prepared,
    pub(super) finish: &'a Finish,
    pub(super) rerouted: &'a [(usize, Option<ClusterPath>)],
}

/// The object `anchorage`: of several completions that of the first, with the longest times of all.
pub(super) fn anchorage(memory: &Memory, completions: &[Told<'_>]) -> Value {
    let most = |ms: fn(&Told<'_>) -> f64| rounded(completions.iter().map(ms).fold(0.0, f64::max));
    let timing = json!({
        "queue_ms": most(|told| told.finish.queue_ms),
        "route_ms": most(|told| told.prompt.selected.route_ms),
        "fetch_ms": most(|told| told.prompt.selected.fetch_ms),
        "prefill_ms": most(|told| told.finish.prefill_ms),
        "decode_ms": most(|told| told.finish.decode_ms),
        "rest_ms": most(|told| told.finish.rest_ms),
    });
    let mut object = Map::new();
    object.insert("memory".into(), json!(memory_text(memory)));
    if let Some(first) = completions.first() {
        object.extend(of_completion(first));
    }
    object.insert("timing".into(), timing);
    if completions.len() > 1 {
        let choices = completions.iter().map(|told| Value::Object(of_completion(told)));
        object.insert("choices".into(), choices.collect());
    }
    Value::Object(object)
}

fn of_completion(told: &Told<'_>) -> Map<String, Value> {
    let selected = &told.prompt.selected;
    let path = |path: &Option<ClusterPath>| path.as_ref().map(ToString::to_string);
    let bank = selected.bank.as_ref();
    let rerouted = told.rerouted.iter().map(|(at, found)| json!({"at": at, "path": path(found)}));
    let cached = selected.cached.iter().map(|fetch| json!({"level": fetch.level, "cached": fetch.cached}));
    let mut map = Map::new();
    map.insert("path".into(), json!(path(&selected.path)));
    map.insert("bank".into(), json!(bank.map(|bank| bank.info().name.clone())));
    map.insert("step".into(), json!(selected.bank_version.map(|step| step.0)));
    map.insert("blocked".into(), json!(selected.blocked));
    map.insert("rerouted".into(), rerouted.collect());
    map.insert("levels".into(), cached.collect());
    map
}

fn memory_text(memory: &Memory) -> String {
    match memory {
        Memory::Auto => "auto".into(),
        Memory::Off => "off".into(),
        Memory::Generic => "generic".into(),
        Memory::Path(path) => path.to_string(),
    }
}

/// Milliseconds with three places.
fn rounded(ms: f64) -> f64 {
    (ms * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        let texts = ["naïve cat 東京", "a cat"].into_iter().cycle().take(20).map(|text| Ok(text.to_owned()));
        Tokenizer::train(texts, 270, 1 << 16).unwrap()
    }

    #[test]
    fn a_table_has_columns_of_one_length_and_offsets_in_characters() {
        let tokenizer = tokenizer();
        let text = "naïve cat";
        let ids: Vec<u32> = std::iter::once(tokenizer.eot()).chain(tokenizer.encode(text).unwrap()).collect();
        let score = |&token: &u32| TokenScore { token, logprob: Some(-1.5), top: vec![(token, -1.5)] };
        let scores: Vec<TokenScore> = ids.iter().map(score).collect();
        let prompt =
            Prepared { tokens: ids.clone(), n_added: 1, text: text.into(), selected: Default::default() };
        let mut table = LogprobTable::default();
        table.prompt(&tokenizer, &prompt, &scores);
        let value = table.into_value();
        let columns = ["tokens", "token_logprobs", "top_logprobs", "text_offset"];
        for column in columns {
            assert_eq!(value[column].as_array().unwrap().len(), ids.len() - 1, "{column}");
        }
        assert_eq!((&value["token_logprobs"][0], &value["top_logprobs"][0]), (&Value::Null, &Value::Null));
        assert_eq!(value["token_logprobs"][1], -1.5);
        assert_eq!(value["text_offset"][0], 0);
    }

    #[test]
    fn the_chosen_token_is_beside_the_likeliest_once() {
        let tokenizer = tokenizer();
        let id = |text: &str| tokenizer.encode(text).unwrap()[0];
        let (a, b) = (id("a"), id("c"));
        let mut table = LogprobTable::after(3);
        table.add(&tokenizer, &TokenScore { token: b, logprob: Some(-2.0), top: vec![(a, -0.5)] });
        table.add(&tokenizer, &TokenScore { token: a, logprob: Some(-0.5), top: vec![(a, -0.5)] });
        assert_eq!(table.offset(), 5);
        let value = table.into_value();
        assert_eq!(value["top_logprobs"], json!([{"a": -0.5, "c": -2.0}, {"a": -0.5}]));
        assert_eq!(value["text_offset"], json!([3, 4]));
        assert_eq!(number(f32::NEG_INFINITY), json!(f32::MIN));
    }

    #[test]
    fn a_token_of_half_a_character_has_a_name_of_its_own() {
        let tokenizer = tokenizer();
        let halves = tokenizer.encode("🦀").unwrap();
        assert!(
            halves.iter().all(|&id| token_text(&tokenizer, id) == format!("token_id:{id}")),
            "{halves:?}"
        );
        assert_eq!(token_text(&tokenizer, tokenizer.eot()), "<|endoftext|>");
    }
}
