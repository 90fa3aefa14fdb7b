//! `/v1/completions` and `/v1/chat/completions`.

use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures::future::try_join_all;
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::access::Caller;
use super::app::{App, unix_seconds};
use super::body::{self, Json};
use super::error::{Answer, ApiError};
use super::fields::Fields;
use super::render::{Head, Kind, Told, anchorage, choice, usage};
use super::request::{self, Completion};
use super::run::{Done, prepare, submit};
use super::stream;

/// `POST /v1/completions`.
pub(super) async fn completions(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Body,
) -> Answer<Response> {
    let bytes = body::read(&headers, body, &app.served().limits).await?;
    let asked = request::completion(body::parse(&bytes)?, &app.served().bounds, rand::random())?;
    drop(bytes);
    answer(app, caller, Kind::Text, asked).await
}

/// `POST /v1/chat/completions`.
pub(super) async fn chats(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Body,
) -> Answer<Response> {
    let Some(template) = &app.served().chat else {
        let message = "this run has no chat template, expected a file chat_template.jinja in its folder or \
                       serve.chat_template; /v1/completions continues texts";
        return Err(ApiError::not_found(message, "no_chat_template"));
    };
    let bytes = body::read(&headers, body, &app.served().limits).await?;
    let fields: Fields = body::parse(&bytes)?;
    let messages = request::messages(&fields)?;
    let (prompt, said) = (template.render(messages)?, super::chat::said(messages)?);
    let mut asked = request::chat(fields, prompt, &app.served().bounds, rand::random())?;
    if asked.memory == crate::memory::Memory::Auto {
        // What was said is routed, without the words of the template.
        asked.memory_texts.get_or_insert_with(|| vec![said]);
    }
    answer(app.clone(), caller, Kind::Chat, asked).await
}

/// A name for an answer, as OpenAI's are.
fn id(kind: Kind) -> String {
    let prefix = if kind == Kind::Text { "cmpl" } else { "chatcmpl" };
    format!("{prefix}-{:016x}", rand::random::<u64>())
}

async fn answer(app: App, caller: Caller, kind: Kind, asked: Completion) -> Answer<Response> {
    let begin = Instant::now();
    let limit = Duration::from_secs(app.served().limits.request_s);
    let head = Head { kind, id: id(kind), created: unix_seconds(), model: app.served().name.clone() };
    let work = async {
        let mut asked = asked;
        let prompts = prepare(&app, &mut asked, &caller).await?;
        let sequences = submit(&app, &asked, &caller, &prompts)?;
        if asked.stream {
            let left = limit.saturating_sub(begin.elapsed());
            let parts = stream::Parts { app: app.clone(), _caller: caller.clone(), head, asked, begin, left };
            return Ok(stream::respond(parts, sequences));
        }
        let finished = sequences.into_iter().map(|sequence| sequence.finish(&app));
        let done = try_join_all(finished).await?;
        let n_prompt = prompts.iter().map(|prompt| prompt.tokens.len() - prompt.n_added).sum();
        for done in &done {
            app.served().metrics.finished(begin, &done.finish);
        }
        Ok(Json(whole(&app, &head, &asked, &done, n_prompt)).into_response())
    };
    match timeout(limit, work).await {
        Ok(answer) => answer,
        Err(_) => Err(too_late(limit)),
    }
}

/// 408: the request as a whole took too long.
pub(super) fn too_late(limit: Duration) -> ApiError {
    let message = format!("the request was not done after {} s", limit.as_secs());
    ApiError { code: Some("deadline_exceeded"), ..ApiError::new(StatusCode::REQUEST_TIMEOUT, message) }
}

fn whole(app: &App, head: &Head, asked: &Completion, done: &[Done], n_prompt: usize) -> Map<String, Value> {
    let tokenizer = &app.served().tokenizer;
    let choices =
        done.iter().map(|done| choice(tokenizer, head.kind, done, asked.echo, asked.logprobs.is_some()));
    let mut map = head.around(false, choices.collect());
    let n_generated = done.iter().map(|done| done.finish.n_generated).sum();
    map.insert("usage".into(), usage(n_prompt, n_generated));
    let told: Vec<Told<'_>> = done
        .iter()
        .map(|done| Told { prompt: &done.prompt, finish: &done.finish, rerouted: &done.rerouted })
        .collect();
    map.insert("anchorage".into(), anchorage(&asked.memory, &told));
    map
}
