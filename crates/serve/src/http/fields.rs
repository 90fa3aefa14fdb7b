//! The fields of a request for completions as they come: every one that OpenAI's and vLLM's clients send.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// The body of `/v1/completions` and `/v1/chat/completions`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "fields that are taken and ignored are never read")]
pub(super) struct Fields {
    pub(super) model: Option<String>,
    pub(super) prompt: Option<Prompts>,
    pub(super) messages: Option<Vec<Message>>,
    pub(super) max_tokens: Option<usize>,
    pub(super) max_completion_tokens: Option<usize>,
    pub(super) temperature: Option<f64>,
    pub(super) top_p: Option<f64>,
    pub(super) n: Option<usize>,
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<StreamOptions>,
    pub(super) logprobs: Option<Logprobs>,
    pub(super) top_logprobs: Option<usize>,
    pub(super) echo: Option<bool>,
    pub(super) stop: Option<Texts>,
    pub(super) presence_penalty: Option<f64>,
    pub(super) frequency_penalty: Option<f64>,
    pub(super) logit_bias: Option<BTreeMap<String, f64>>,
    pub(super) seed: Option<i64>,
    // vLLM's.
    pub(super) top_k: Option<i64>,
    pub(super) min_p: Option<f64>,
    pub(super) repetition_penalty: Option<f64>,
    pub(super) ignore_eos: Option<bool>,
    // Ours.
    pub(super) memory: Option<MemoryField>,
    pub(super) memory_text: Option<Texts>,
    pub(super) bank: Option<String>,
    pub(super) reroute: Option<RerouteField>,
    // Taken while they ask for nothing.
    pub(super) best_of: Option<usize>,
    pub(super) suffix: Option<Neutral>,
    pub(super) response_format: Option<Neutral>,
    pub(super) tools: Option<Neutral>,
    pub(super) tool_choice: Option<Neutral>,
    pub(super) functions: Option<Neutral>,
    pub(super) function_call: Option<Neutral>,
    pub(super) prediction: Option<Neutral>,
    pub(super) audio: Option<Neutral>,
    pub(super) web_search_options: Option<Neutral>,
    pub(super) use_beam_search: Option<Neutral>,
    pub(super) min_tokens: Option<Neutral>,
    pub(super) stop_token_ids: Option<Neutral>,
    pub(super) include_stop_str_in_output: Option<Neutral>,
    pub(super) bad_words: Option<Neutral>,
    pub(super) allowed_token_ids: Option<Neutral>,
    pub(super) prompt_logprobs: Option<Neutral>,
    pub(super) truncate_prompt_tokens: Option<Neutral>,
    pub(super) structured_outputs: Option<Neutral>,
    pub(super) guided_json: Option<Neutral>,
    pub(super) guided_regex: Option<Neutral>,
    pub(super) guided_choice: Option<Neutral>,
    pub(super) guided_grammar: Option<Neutral>,
    pub(super) logits_processors: Option<Neutral>,
    pub(super) return_token_ids: Option<Neutral>,
    pub(super) return_tokens_as_token_ids: Option<Neutral>,
    pub(super) documents: Option<Neutral>,
    pub(super) chat_template: Option<Neutral>,
    pub(super) continue_final_message: Option<Neutral>,
    // Taken and ignored.
    pub(super) user: Option<IgnoredAny>,
    pub(super) service_tier: Option<IgnoredAny>,
    pub(super) store: Option<IgnoredAny>,
    pub(super) metadata: Option<IgnoredAny>,
    pub(super) safety_identifier: Option<IgnoredAny>,
    pub(super) prompt_cache_key: Option<IgnoredAny>,
    pub(super) prompt_cache_retention: Option<IgnoredAny>,
    pub(super) parallel_tool_calls: Option<IgnoredAny>,
    pub(super) modalities: Option<IgnoredAny>,
    pub(super) reasoning_effort: Option<IgnoredAny>,
    pub(super) verbosity: Option<IgnoredAny>,
    pub(super) request_id: Option<IgnoredAny>,
    pub(super) priority: Option<IgnoredAny>,
    pub(super) cache_salt: Option<IgnoredAny>,
    pub(super) length_penalty: Option<IgnoredAny>,
    pub(super) early_stopping: Option<IgnoredAny>,
    pub(super) skip_special_tokens: Option<IgnoredAny>,
    pub(super) spaces_between_special_tokens: Option<IgnoredAny>,
    pub(super) add_special_tokens: Option<IgnoredAny>,
    pub(super) add_generation_prompt: Option<IgnoredAny>,
    pub(super) chat_template_kwargs: Option<IgnoredAny>,
    pub(super) guided_decoding_backend: Option<IgnoredAny>,
    pub(super) guided_whitespace_pattern: Option<IgnoredAny>,
    pub(super) kv_transfer_params: Option<IgnoredAny>,
    pub(super) vllm_xargs: Option<IgnoredAny>,
    pub(super) mm_processor_kwargs: Option<IgnoredAny>,
    pub(super) detokenize: Option<IgnoredAny>,
}

impl Fields {
    /// The first field that asks for something that is not there.
    pub(super) fn refused(&self) -> Option<&'static str> {
        let fields = [
            ("suffix", &self.suffix),
            ("response_format", &self.response_format),
            ("tools", &self.tools),
            ("tool_choice", &self.tool_choice),
            ("functions", &self.functions),
            ("function_call", &self.function_call),
            ("prediction", &self.prediction),
            ("audio", &self.audio),
            ("web_search_options", &self.web_search_options),
            ("use_beam_search", &self.use_beam_search),
            ("min_tokens", &self.min_tokens),
            ("stop_token_ids", &self.stop_token_ids),
            ("include_stop_str_in_output", &self.include_stop_str_in_output),
            ("bad_words", &self.bad_words),
            ("allowed_token_ids", &self.allowed_token_ids),
            ("prompt_logprobs", &self.prompt_logprobs),
            ("truncate_prompt_tokens", &self.truncate_prompt_tokens),
            ("structured_outputs", &self.structured_outputs),
            ("guided_json", &self.guided_json),
            ("guided_regex", &self.guided_regex),
            ("guided_choice", &self.guided_choice),
            ("guided_grammar", &self.guided_grammar),
            ("logits_processors", &self.logits_processors),
            ("return_token_ids", &self.return_token_ids),
            ("return_tokens_as_token_ids", &self.return_tokens_as_token_ids),
            ("documents", &self.documents),
            ("chat_template", &self.chat_template),
            ("continue_final_message", &self.continue_final_message),
        ];
        fields.into_iter().find(|(_, value)| matches!(value, Some(Neutral(false)))).map(|(name, _)| name)
    }
}

/// What a stream tells at its end.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "the last two are taken and ignored")]
pub(super) struct StreamOptions {
    pub(super) include_usage: Option<bool>,
    pub(super) include_obfuscation: Option<bool>,
    pub(super) continuous_usage_stats: Option<bool>,
}

/// A number in completions, a flag in chats.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub(super) enum Logprobs {
    Flag(bool),
    Count(usize),
}

/// A text or several.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub(super) enum Texts {
    One(String),
    Several(Vec<String>),
}

impl Texts {
    pub(super) fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Several(texts) => texts,
        }
    }
}

/// A message of a chat.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct Message {
    pub(super) role: String,
    pub(super) content: Option<Content>,
    pub(super) name: Option<String>,
}

/// What a message says.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub(super) enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// A part of a message; only text is taken.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct Part {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) text: Option<String>,
}

/// A memory by name or by path.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub(super) enum MemoryField {
    Text(String),
    Indices(Vec<u32>),
}

/// When memory is asked for anew.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RerouteField {
    pub(super) every_tokens: Option<usize>,
    pub(super) entropy: Option<f64>,
    pub(super) min_tokens: Option<usize>,
}

/// A text, texts, token ids, or several lists of them.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Prompts {
    Texts(Vec<String>),
    Ids(Vec<Vec<u32>>),
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptsVisitor)
    }
}

struct PromptsVisitor;

/// One element of a list of prompts. Lists of numbers are read as such, so that a body takes few times its own bytes.
#[derive(Deserialize)]
#[serde(untagged)]
enum Item {
    Id(u32),
    Ids(Vec<u32>),
    Text(String),
}

impl<'de> Visitor<'de> for PromptsVisitor {
    type Value = Prompts;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, a list of texts, a list of token ids, or a list of such lists")
    }

    fn visit_str<E>(self, text: &str) -> Result<Prompts, E> {
        Ok(Prompts::Texts(vec![text.to_owned()]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Prompts, A::Error> {
        let wrong = || serde::de::Error::custom(format!("expected {}", Expecting));
        let first = match items.next_element::<Item>()? {
            None => return Ok(Prompts::Texts(vec![])),
            Some(first) => first,
        };
        match first {
            Item::Id(id) => {
                let mut ids = vec![id];
                while let Some(id) = items.next_element::<u32>()? {
                    ids.push(id);
                }
                Ok(Prompts::Ids(vec![ids]))
            }
            Item::Text(text) => {
                let mut texts = vec![text];
                while let Some(text) = items.next_element::<String>()? {
                    texts.push(text);
                }
                Ok(Prompts::Texts(texts))
            }
            Item::Ids(ids) => {
                let mut lists = vec![ids];
                while let Some(item) = items.next_element::<Vec<u32>>()? {
                    lists.push(item);
                }
                if lists.iter().any(Vec::is_empty) {
                    return Err(wrong());
                }
                Ok(Prompts::Ids(lists))
            }
        }
    }
}

/// The same words, for a list that holds an empty one.
struct Expecting;

impl fmt::Display for Expecting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a token id at least in each list")
    }
}

/// Whether a value asks for nothing: null, false, 0, nothing in it, `none`, `auto`, or `{"type": "text"}`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Neutral(pub(super) bool);

impl<'de> Deserialize<'de> for Neutral {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NeutralVisitor)
    }
}

struct NeutralVisitor;

impl<'de> Visitor<'de> for NeutralVisitor {
    type Value = Neutral;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<Neutral, E> {
        Ok(Neutral(true))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Neutral, E> {
        Ok(Neutral(!value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Neutral, E> {
        Ok(Neutral(value == 0))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Neutral, E> {
        Ok(Neutral(value == 0))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Neutral, E> {
        Ok(Neutral(value == 0.0))
    }

    fn visit_str<E>(self, value: &str) -> Result<Neutral, E> {
        Ok(Neutral(matches!(value, "" | "none" | "auto" | "text")))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Neutral, A::Error> {
        let mut neutral = true;
        while items.next_element::<IgnoredAny>()?.is_some() {
            neutral = false;
        }
        Ok(Neutral(neutral))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Neutral, A::Error> {
        let mut neutral = true;
        while let Some(key) = entries.next_key::<String>()? {
            let value: Neutral = entries.next_value()?;
            neutral &= value.0 && key == "type";
        }
        Ok(Neutral(neutral))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::body::parse;

    #[test]
    fn prompts_come_in_four_forms() {
        let of = |prompt: &str| parse::<Fields>(format!("{{\"prompt\": {prompt}}}").as_bytes());
        assert_eq!(of("\"a\"").unwrap().prompt, Some(Prompts::Texts(vec!["a".into()])));
        assert_eq!(of("[\"a\", \"b\"]").unwrap().prompt, Some(Prompts::Texts(vec!["a".into(), "b".into()])));
        assert_eq!(of("[1, 2]").unwrap().prompt, Some(Prompts::Ids(vec![vec![1, 2]])));
        assert_eq!(of("[[1], [2, 3]]").unwrap().prompt, Some(Prompts::Ids(vec![vec![1], vec![2, 3]])));
        for wrong in ["[1, \"a\"]", "[[1], 2]", "[[1], []]", "{}", "[-1]", "[5000000000]", "3", "[[[1]]]"] {
            let error = of(wrong).unwrap_err();
            assert!(error.message.starts_with("prompt"), "{wrong}: {}", error.message);
        }
    }

    #[test]
    fn what_asks_for_nothing_is_taken() {
        let body = r#"{"suffix": null, "tools": [], "response_format": {"type": "text"}, "min_tokens": 0,
            "use_beam_search": false, "tool_choice": "none", "user": "x", "metadata": {"a": "b"}, "store": true}"#;
        assert_eq!(parse::<Fields>(body.as_bytes()).unwrap().refused(), None);
        let table = [
            ("suffix", "\"x\""),
            ("response_format", "{\"type\": \"json_object\"}"),
            ("tools", "[1]"),
            ("min_tokens", "3"),
            ("guided_regex", "\"a*\""),
        ];
        for (name, value) in table {
            let body = format!("{{\"{name}\": {value}}}");
            assert_eq!(parse::<Fields>(body.as_bytes()).unwrap().refused(), Some(name));
        }
    }
}
