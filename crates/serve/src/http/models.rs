//! `/v1/models` and `/v1/embeddings`.

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::app::App;
use super::body::{self, Json};
use super::error::{Answer, ApiError};
use super::fields::Prompts;
use super::request::check_model;

fn model(app: &App) -> Value {
    let served = app.served();
    let banks = served.retrieval.as_ref().map(|retrieval| retrieval.banks().list()).unwrap_or_default();
    json!({
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "anchorage",
        "max_model_len": served.bounds.positions,
        "anchorage": {
            "run": served.name,
            "step": served.step,
            "parameters": served.n_parameters,
            "has_chat": served.chat.is_some(),
            "banks": banks.iter().map(|bank| &bank.name).collect::<Vec<_>>(),
        },
    })
}

/// `GET /v1/models`.
pub(super) async fn models(State(app): State<App>) -> Json<Value> {
    Json(json!({"object": "list", "data": [model(&app)]}))
}

/// `GET /v1/models/NAME`.
pub(super) async fn one(State(app): State<App>, Path(name): Path<String>) -> Answer<Json<Value>> {
    check_model(Some(&name), &app.served().name)?;
    Ok(Json(model(&app)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "the last is taken and ignored")]
struct EmbeddingFields {
    model: Option<String>,
    input: Option<Prompts>,
    encoding_format: Option<Format>,
    dimensions: Option<usize>,
    user: Option<IgnoredAny>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    #[default]
    Float,
    Base64,
}

/// `POST /v1/embeddings`: those of the embedder that the tree was made with.
pub(super) async fn embeddings(
    State(app): State<App>,
    headers: HeaderMap,
    body: Body,
) -> Answer<Json<Value>> {
    let served = app.served();
    let bytes = body::read(&headers, body, &served.limits).await?;
    let fields: EmbeddingFields = body::parse(&bytes)?;
    check_model(fields.model.as_deref(), &served.name)?;
    let Some(retrieval) = &served.retrieval else {
        return Err(ApiError::not_found("this run has no embedder", "no_memory"));
    };
    let dim = retrieval.tree().dim();
    if let Some(found) = fields.dimensions.filter(|found| *found != dim) {
        return Err(ApiError::field("dimensions", format!("expected {dim}, found {found}")));
    }
    let texts = match fields.input {
        Some(Prompts::Texts(texts)) => texts,
        Some(Prompts::Ids(lists)) => {
            let text = |ids: &Vec<u32>| served.tokenizer.decode(ids).map_err(|e| ApiError::field("input", e));
            lists.iter().map(text).collect::<Answer<_>>()?
        }
        None => return Err(ApiError::field("input", "expected a text at least, found nothing")),
    };
    let most = served.limits.texts;
    if texts.is_empty() || texts.len() > most {
        return Err(ApiError::field("input", format!("expected 1 to {most} texts, found {}", texts.len())));
    }
    if let Some(blank) = texts.iter().position(|text| text.trim().is_empty()) {
        return Err(ApiError::field("input", format!("text {blank} is blank, expected a word at least")));
    }
    let n_tokens: usize = texts.iter().map(|text| text.split_whitespace().count()).sum();
    let rows = retrieval.embed(texts).await?;
    let format = fields.encoding_format.unwrap_or_default();
    let data = rows.iter().enumerate().map(
        |(index, row)| json!({"object": "embedding", "index": index, "embedding": encoded(row, format)}),
    );
    Ok(Json(json!({
        "object": "list",
        "data": data.collect::<Vec<_>>(),
        "model": served.name,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    })))
}

/// Base64 is that of the numbers in little endian, 4 bytes each.
fn encoded(row: &[f32], format: Format) -> Value {
    match format {
        Format::Float => json!(row),
        Format::Base64 => {
            let bytes: Vec<u8> = row.iter().flat_map(|value| value.to_le_bytes()).collect();
            json!(STANDARD.encode(bytes))
        }
    }
}
