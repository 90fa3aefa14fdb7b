//! Memory by text over HTTP: routes, blocks, what clusters are about, and banks.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use cluster_tree::{ClusterId, ClusterPath};
use memory_bank::Encoded;
use memory_service::security::KeyRole;
use safetensors::tensor::{Dtype, View, serialize};
use serde::Deserialize;
use serde_json::{Value, json};

use super::access::Caller;
use super::app::App;
use super::body::{self, Json};
use super::error::{Answer, ApiError};
use super::fields::MemoryField;
use super::request;
use crate::memory::{Ask, BankInfo, BankSource, Banks, ClusterSummary, Memory, Retrieval, Route};

fn retrieval(app: &App) -> Answer<&Retrieval> {
    let message = "this run has no memory";
    app.served().retrieval.as_ref().ok_or_else(|| ApiError::not_found(message, "no_memory"))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RouteFields {
    texts: Option<Vec<String>>,
    embeddings: Option<Vec<Vec<f32>>>,
    n: Option<usize>,
}

/// `POST /v1/route`: the paths of texts, or of embeddings that were made elsewhere.
pub(super) async fn route(State(app): State<App>, headers: HeaderMap, body: Body) -> Answer<Json<Value>> {
    let bytes = body::read(&headers, body, &app.served().limits).await?;
    let fields: RouteFields = body::parse(&bytes)?;
    let retrieval = retrieval(&app)?;
    let n = fields.n.unwrap_or(usize::MAX);
    if n == 0 {
        return Err(ApiError::field("n", "expected at least 1, found 0"));
    }
    let routes = match (fields.texts, fields.embeddings) {
        (Some(texts), None) => {
            check_count(&app, "texts", texts.len())?;
            retrieval.route(texts).await?
        }
        (None, Some(rows)) => {
            check_count(&app, "embeddings", rows.len())?;
            retrieval.route_embeddings(rows).await?
        }
        _ => return Err(ApiError::field("texts", "expected either texts or embeddings")),
    };
    app.served().metrics.routed(routes.len());
    let route = |Route { path, distance, score }: &Route| json!({"path": path.to_string(), "distance": distance, "score": score});
    let list = |routes: Vec<Route>| routes.iter().take(n).map(route).collect::<Vec<_>>();
    Ok(Json(json!({"routes": routes.into_iter().map(list).collect::<Vec<_>>()})))
}

fn check_count(app: &App, name: &str, found: usize) -> Answer<()> {
    let most = app.served().limits.texts;
    match (1..=most).contains(&found) {
        true => Ok(()),
        false => Err(ApiError::field(name, format!("expected 1 to {most}, found {found}"))),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RetrieveFields {
    text: Option<String>,
    path: Option<MemoryField>,
    bank: Option<String>,
    levels: Option<Vec<usize>>,
}

/// `POST /v1/retrieve`: the blocks of a text or a path, as a file of safetensors.
pub(super) async fn retrieve(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Body,
) -> Answer<Response> {
    let bytes = body::read(&headers, body, &app.served().limits).await?;
    let fields: RetrieveFields = body::parse(&bytes)?;
    let retrieval = retrieval(&app)?;
    let (text, memory) = match (fields.text, fields.path) {
        (Some(text), None) => (text, Memory::Auto),
        (None, Some(path)) => (String::new(), path_of(path, &app)?),
        _ => return Err(ApiError::field("text", "expected either text or path")),
    };
    if memory == Memory::Auto && text.trim().is_empty() {
        return Err(ApiError::field("text", "expected a text, found nothing but white space"));
    }
    let ask = Ask { bank: fields.bank, text, memory, blocked: Arc::clone(&caller.blocked) };
    let selected = retrieval.select(ask).await?;
    app.served().metrics.selected(&selected);
    let (Some(bank), Some(path)) = (selected.bank, selected.path) else {
        let message = format!("all memory of the text is blocked: {}", selected.blocked.join(", "));
        return Err(ApiError::forbidden(message, "memory_blocked"));
    };
    let there: Vec<usize> = bank.spec().levels().collect();
    let levels = fields.levels.unwrap_or_else(|| there.clone());
    if let Some(level) =
        levels.iter().enumerate().find(|(i, l)| !there.contains(l) || levels[..*i].contains(l))
    {
        let message = format!("expected some of {there:?}, each once, found {}", level.1);
        return Err(ApiError::field("levels", message));
    }
    let ids: Vec<ClusterId> = path.ids().filter(|id| levels.contains(&usize::from(id.level))).collect();
    let blocks = retrieval.blocks(&bank, &ids).await?;
    let tensor = |(id, block): (&ClusterId, Arc<Encoded>)| {
        let shape = bank.spec().block_shape(usize::from(id.level)); // [L, 3, r, d] of FFN memory
        (format!("level{}", id.level), Tensor { shape, values: Encoded::into_values(block) })
    };
    let tensors: Vec<(String, Tensor)> = ids.iter().zip(blocks).map(tensor).collect();
    let metadata = HashMap::from([
        ("path".to_owned(), path.to_string()),
        ("bank".to_owned(), bank.info().name.clone()),
        ("step".to_owned(), bank.version().step.0.to_string()),
        ("dtype".to_owned(), bank.info().dtype.to_string()),
    ]);
    let file = serialize(tensors, Some(metadata)).map_err(ApiError::internal)?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], file).into_response())
}

fn path_of(field: MemoryField, app: &App) -> Answer<Memory> {
    let memory = request::memory(Some(field), &app.served().bounds)
        .map_err(|error| ApiError { param: Some("path".into()), ..error })?;
    match memory {
        Memory::Path(_) | Memory::Generic => Ok(memory),
        Memory::Auto | Memory::Off => Err(ApiError::field("path", "expected a path or \"generic\"")),
    }
}

/// Numbers of a block, as the file has them.
struct Tensor {
    shape: Vec<usize>,
    values: Vec<f32>,
}

impl View for Tensor {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    fn data_len(&self) -> usize {
        size_of_val(&self.values[..])
    }
}

/// `GET /v1/explain`: the root of the tree.
pub(super) async fn explain_root(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
) -> Answer<Response> {
    let mut told = retrieval(&app)?.explain(&[])?;
    hide_children(&caller, &mut told.children);
    Ok(Json(told).into_response())
}

/// `GET /v1/explain/3/49`: what a cluster is about.
pub(super) async fn explain(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(path): Path<String>,
) -> Answer<Response> {
    let path = path.trim_end_matches('/');
    let shortened: String = path.chars().take(100).collect();
    let wrong = || ApiError::field("path", format!("expected indices such as 3/49, found {shortened:?}"));
    let indices: Vec<u32> = match path {
        "" => vec![],
        path => path.split('/').map(|part| part.parse().map_err(|_| wrong())).collect::<Answer<_>>()?,
    };
    let mut told = retrieval(&app)?.explain(&indices).map_err(|error| match error {
        crate::memory::Error::UnknownPath { .. } => ApiError::not_found(error.to_string(), "unknown_path"),
        other => other.into(),
    })?;
    if let Some(prefix) = blocked_prefix(&caller, &indices) {
        let message = format!("cluster {shortened} is blocked by {prefix}");
        return Err(ApiError::forbidden(message, "memory_blocked"));
    }
    hide_children(&caller, &mut told.children);
    Ok(Json(told).into_response())
}

/// The blocked prefix of a cluster, by its indices from level 0 down.
fn blocked_prefix(caller: &Caller, indices: &[u32]) -> Option<String> {
    caller.blocked.prefix_of(&ClusterPath::new(indices.to_vec()).ok()?)
}

/// Takes the words of blocked clusters away; their sizes stay.
fn hide_children(caller: &Caller, children: &mut [ClusterSummary]) {
    for child in children {
        let indices: Option<Vec<u32>> = child.path.split('/').map(|part| part.parse().ok()).collect();
        if indices.is_some_and(|indices| blocked_prefix(caller, &indices).is_some()) {
            child.terms.clear();
        }
    }
}

/// `GET /v1/tree`: all clusters that hold documents, with their terms, but those of blocked ones.
pub(super) async fn tree(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
) -> Answer<Json<Value>> {
    let retrieval = retrieval(&app)?.clone();
    // Of a large tree this is some work.
    let told = tokio::task::spawn_blocking(move || whole_tree(&retrieval, &caller)).await;
    Ok(Json(told.map_err(ApiError::internal)?))
}

/// Terms of a cluster that the whole tree tells.
const N_TERMS: usize = 6;

fn whole_tree(retrieval: &Retrieval, caller: &Caller) -> Value {
    let (tree, page, fetches) = (retrieval.tree(), retrieval.page(), retrieval.fetches());
    let branching: Vec<usize> = (0..tree.n_levels()).map(|level| tree.branching(level)).collect();
    let is_blocked = |level: usize, index: u32| {
        let mut indices = vec![index; level + 1];
        for above in (0..level).rev() {
            indices[above] = indices[above + 1] / branching[above + 1] as u32;
        }
        !caller.blocked.is_empty() && blocked_prefix(caller, &indices).is_some()
    };
    let level = |level: usize| -> Value {
        let mut terms: HashMap<u32, Vec<&str>> = HashMap::new();
        if let Some(page) = page {
            for row in page.clusters.get(level).into_iter().flatten().filter(|row| !is_blocked(level, row.i))
            {
                let words = row.t.iter().filter_map(|&word| page.words.get(word as usize));
                terms.insert(row.i, words.take(N_TERMS).map(String::as_str).collect());
            }
        }
        let fetches = fetches.get(level);
        let row = |(index, &n): (u32, &u64)| {
            let fetches = fetches.and_then(|counts| counts.get(index as usize)).copied().unwrap_or(0);
            let terms = terms.remove(&index).unwrap_or_default();
            json!({"index": index, "n": n, "terms": terms, "fetches": fetches})
        };
        (0..).zip(tree.counts(level)).filter(|(_, n)| **n > 0).map(row).collect()
    };
    let levels: Vec<Value> = (0..tree.n_levels()).map(level).collect();
    json!({"branching": branching, "has_terms": page.is_some(), "levels": levels})
}

/// `GET /v1/tree/fetches`: by level, pairs of index and times fetched, of those that were.
pub(super) async fn fetches(State(app): State<App>) -> Answer<Json<Value>> {
    let pairs = |counts: Vec<u64>| -> Vec<(usize, u64)> {
        counts.into_iter().enumerate().filter(|(_, n)| *n > 0).collect()
    };
    let levels: Vec<_> = retrieval(&app)?.fetches().into_iter().map(pairs).collect();
    Ok(Json(json!({"levels": levels})))
}

/// `GET /v1/banks`.
pub(super) async fn banks(State(app): State<App>, Extension(caller): Extension<Caller>) -> Json<Value> {
    let Some(retrieval) = &app.served().retrieval else { return Json(json!({"banks": []})) };
    let is_admin = !app.served().gate.has_keys() || caller.role == KeyRole::Admin;
    let banks = retrieval.banks().list().into_iter().map(|info| bank(&info, is_admin));
    Json(json!({"banks": banks.collect::<Vec<_>>()}))
}

/// A bank; where it is, is told to who may change it.
fn bank(info: &BankInfo, is_admin: bool) -> Value {
    let mut value = serde_json::to_value(info).unwrap_or_default();
    if let Some(map) = value.as_object_mut()
        && !is_admin
    {
        map.remove("source");
    }
    value
}

fn check_admin(app: &App, caller: &Caller) -> Answer<()> {
    if !app.served().gate.has_keys() {
        let message = "banks are changed with an admin's key, and there are no keys (serve.keys)";
        return Err(ApiError::forbidden(message, "admin_only"));
    }
    match caller.role {
        KeyRole::Admin => Ok(()),
        KeyRole::User => {
            let name = caller.name.as_deref().unwrap_or_default();
            let message = format!("banks are changed with an admin's key, and {name} is a user");
            Err(ApiError::forbidden(message, "admin_only"))
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BankFields {
    name: Option<String>,
    source: Option<String>,
}

/// `POST /v1/banks`: loads a bank, or puts it in the place of the one of its name.
pub(super) async fn load(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Body,
) -> Answer<Json<Value>> {
    check_admin(&app, &caller)?;
    let bytes = body::read(&headers, body, &app.served().limits).await?;
    let fields: BankFields = body::parse(&bytes)?;
    let name = fields.name.as_deref().unwrap_or(Banks::DEFAULT);
    let source = fields.source.filter(|source| !source.is_empty());
    let source = source.ok_or_else(|| ApiError::field("source", "expected a folder, a URL or shards"))?;
    let source = BankSource::parse(&source, &app.served().tiers);
    let info = retrieval(&app)?.banks().load(name, source).await.map_err(|error| {
        tracing::warn!(%error, bank = name, "not loaded, what was there before stays");
        load_error(error)
    })?;
    tracing::info!(bank = name, step = info.step.0, by = caller.name.as_deref(), "bank loaded");
    Ok(Json(bank(&info, true)))
}

/// What cannot be loaded is the caller's: it named the source.
fn load_error(error: crate::memory::Error) -> ApiError {
    let message = error.to_string();
    let known: ApiError = error.into();
    match known.status.is_client_error() {
        true => known,
        false => ApiError { status: StatusCode::BAD_REQUEST, ..ApiError::field("source", message) },
    }
}

/// `DELETE /v1/banks/NAME`.
pub(super) async fn unload(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
) -> Answer<Json<Value>> {
    check_admin(&app, &caller)?;
    retrieval(&app)?.banks().unload(&name)?;
    tracing::info!(bank = name, by = caller.name.as_deref(), "bank unloaded");
    Ok(Json(json!({"name": name, "deleted": true})))
}
