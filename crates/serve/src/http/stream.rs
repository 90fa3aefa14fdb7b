//! Answers in parts: server-sent events, each a chunk in JSON, and `[DONE]`.

use std::convert::Infallible;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::future::try_join_all;
use futures::stream;
use generate::engine::{Event, Finish, TokenScore};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::access::Caller;
use super::app::App;
use super::complete::too_late;
use super::error::Answer;
use super::render::{Head, Kind, LogprobTable, Told, anchorage, chat_logprobs, finish_reason, usage};
use super::request::Completion;
use super::run::Sequence;

/// Chunks that wait for a client to take them.
const WAITING: usize = 32;

/// What a stream is made of beside its sequences.
pub(super) struct Parts {
    pub(super) app: App,
    /// Held until the stream ends.
    pub(super) _caller: Caller,
    pub(super) head: Head,
    pub(super) asked: Completion,
    /// When the request came.
    pub(super) begin: Instant,
    /// What is left of its time.
    pub(super) left: Duration,
}

/// An answer that is sent while it is made. A client that goes away ends it: its sequences are cancelled.
pub(super) fn respond(parts: Parts, sequences: Vec<Sequence>) -> Response {
    let (sender, receiver) = mpsc::channel::<Bytes>(WAITING);
    tokio::spawn(async move {
        let app = parts.app.clone();
        let work = async {
            let result = match timeout(parts.left, drive(&parts, sequences, &sender)).await {
                Ok(result) => result,
                Err(_) => Err(too_late(Duration::from_secs(app.served().limits.request_s))),
            };
            if let Err(error) = result {
                app.served().metrics.failed_in_stream();
                // The status has been sent; the event is all that can tell.
                let _ = sender.send(event(&error.body())).await;
            }
            let _ = sender.send(Bytes::from_static(b"data: [DONE]\n\n")).await;
        };
        tokio::select! {
            () = sender.closed() => app.served().metrics.left(),
            () = work => {}
        }
    });
    let body = stream::unfold(receiver, async |mut receiver| {
        let bytes = receiver.recv().await?;
        Some((Ok::<_, Infallible>(bytes), receiver))
    });
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-cache"),
        // A proxy that gathers answers would gather this one.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, Body::from_stream(body)).into_response()
}

fn event(value: &Value) -> Bytes {
    Bytes::from(format!("data: {value}\n\n"))
}

/// One completion, done.
struct Ended {
    sequence: Sequence,
    finish: Finish,
}

async fn drive(parts: &Parts, sequences: Vec<Sequence>, sender: &mpsc::Sender<Bytes>) -> Answer<()> {
    let n = sequences.len();
    let ended = Mutex::new(Vec::<Ended>::with_capacity(n));
    let n_prompt = {
        let firsts = sequences.iter().step_by(parts.asked.n);
        firsts.map(|sequence| sequence.prompt.tokens.len() - sequence.prompt.n_added).sum()
    };
    let lanes = sequences.into_iter().map(|sequence| {
        let table = LogprobTable::default();
        let lane = Lane { parts, sender, ended: &ended, n, table, is_first: true };
        lane.run(sequence)
    });
    try_join_all(lanes).await?;
    if parts.asked.include_usage {
        let ended = ended.into_inner().unwrap_or_else(PoisonError::into_inner);
        let n_generated = ended.iter().map(|ended| ended.finish.n_generated).sum();
        let mut chunk = parts.head.around(true, vec![]);
        chunk.insert("usage".into(), usage(n_prompt, n_generated));
        chunk.insert("anchorage".into(), told(parts, &ended));
        send(sender, &Value::Object(chunk)).await;
    }
    Ok(())
}

fn told(parts: &Parts, ended: &[Ended]) -> Value {
    let mut ended: Vec<&Ended> = ended.iter().collect();
    ended.sort_by_key(|ended| ended.sequence.index);
    let told = ended.iter().map(|Ended { sequence, finish }| Told {
        prompt: &sequence.prompt,
        finish,
        rerouted: &sequence.rerouted,
    });
    anchorage(&parts.asked.memory, &told.collect::<Vec<_>>())
}

/// A client that has gone is noticed by who waits for it.
async fn send(sender: &mpsc::Sender<Bytes>, chunk: &Value) {
    let _ = sender.send(event(chunk)).await;
}

/// One sequence on its way to the client.
struct Lane<'a> {
    parts: &'a Parts,
    sender: &'a mpsc::Sender<Bytes>,
    ended: &'a Mutex<Vec<Ended>>,
    /// Sequences of the request.
    n: usize,
    /// What of the log probabilities has not been sent.
    table: LogprobTable,
    is_first: bool,
}

impl Lane<'_> {
    async fn run(mut self, mut sequence: Sequence) -> Answer<()> {
        let (app, index) = (&self.parts.app, sequence.index);
        let tokenizer = &app.served().tokenizer;
        let (echo, logprobs) = (self.parts.asked.echo, self.parts.asked.logprobs.is_some());
        if echo && !logprobs {
            let text = sequence.prompt.text.clone();
            self.send(index, text, Value::Null, None).await;
        }
        let mut has_token = false;
        loop {
            match sequence.next(app).await? {
                Event::Prompt(scores) => {
                    self.table.prompt(tokenizer, &sequence.prompt, &scores);
                    let (text, table) = (sequence.prompt.text.clone(), self.take_table());
                    self.send(index, text, table, None).await;
                }
                Event::Token(token) => {
                    if !std::mem::replace(&mut has_token, true) {
                        app.served().metrics.first_token(self.parts.begin);
                    }
                    let table = if logprobs { self.scores(&token.score) } else { Value::Null };
                    if logprobs || !token.text.is_empty() {
                        self.send(index, token.text, table, None).await;
                    }
                }
                Event::Done(finish) => {
                    app.served().metrics.ended(&finish);
                    return self.end(sequence, finish).await;
                }
                Event::Reroute { .. } => {}
            }
        }
    }

    fn scores(&mut self, score: &TokenScore) -> Value {
        let tokenizer = &self.parts.app.served().tokenizer;
        match self.parts.head.kind {
            Kind::Chat => chat_logprobs(tokenizer, &[score]),
            Kind::Text => {
                self.table.add(tokenizer, score);
                self.take_table()
            }
        }
    }

    fn take_table(&mut self) -> Value {
        let next = LogprobTable::after(self.table.offset());
        std::mem::replace(&mut self.table, next).into_value()
    }

    /// The last chunk of a sequence; that of the last of all tells of memory and times.
    async fn end(mut self, sequence: Sequence, mut finish: Finish) -> Answer<()> {
        let (index, text, reason) =
            (sequence.index, std::mem::take(&mut finish.text), finish_reason(&finish));
        let told = {
            let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
            ended.push(Ended { sequence, finish });
            let is_last = ended.len() == self.n && !self.parts.asked.include_usage;
            is_last.then(|| told(self.parts, &ended))
        };
        self.send(index, text, Value::Null, Some((reason, told))).await;
        Ok(())
    }

    async fn send(
        &mut self,
        index: usize,
        text: String,
        logprobs: Value,
        end: Option<(&'static str, Option<Value>)>,
    ) {
        let (reason, told) = end.map_or((None, None), |(reason, told)| (Some(reason), told));
        let choice = match self.parts.head.kind {
            Kind::Text => {
                json!({"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason})
            }
            Kind::Chat => {
                let delta =
                    match (std::mem::replace(&mut self.is_first, false), text.is_empty() && reason.is_some())
                    {
                        (true, _) => json!({"role": "assistant", "content": text}),
                        (false, true) => json!({}),
                        (false, false) => json!({"content": text}),
                    };
                json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})
            }
        };
        let mut chunk = self.parts.head.around(true, vec![choice]);
        if let Some(told) = told {
            chunk.insert("anchorage".into(), told);
        }
        send(self.sender, &Value::Object(chunk)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::error::ApiError;

    #[test]
    fn an_event_is_one_line_of_json() {
        let text = event(&json!({"text": "a\nb"}));
        assert_eq!(text, Bytes::from_static(b"data: {\"text\":\"a\\nb\"}\n\n"));
        let error = ApiError::internal("x").body();
        assert!(event(&error).starts_with(b"data: {\"error\""));
    }
}
