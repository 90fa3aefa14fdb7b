//! Paths to handlers, and what is around all of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};

use super::app::App;
use super::error::ApiError;
use super::{complete, models, twins};
use crate::page::{CONTENT_SECURITY_POLICY, asset};

/// All of the service.
pub(super) fn router(app: App) -> Router {
    let asked = Router::new()
        .route("/v1/completions", post(complete::completions))
        .route("/v1/chat/completions", post(complete::chats))
        .route("/v1/models", get(models::models))
        .route("/v1/models/{*name}", get(models::one))
        .route("/v1/embeddings", post(models::embeddings))
        .route("/v1/route", post(twins::route))
        .route("/v1/retrieve", post(twins::retrieve))
        .route("/v1/explain", get(twins::explain_root))
        .route("/v1/explain/", get(twins::explain_root))
        .route("/v1/explain/{*path}", get(twins::explain))
        .route("/v1/tree", get(twins::tree))
        .route("/v1/tree/fetches", get(twins::fetches))
        .route("/v1/banks", get(twins::banks).post(twins::load))
        .route("/v1/banks/{name}", delete(twins::unload))
        .route_layer(from_fn_with_state(app.clone(), enter));
    Router::new()
        .merge(asked)
        .route("/live", get(async || "live\n"))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .fallback(page)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(app.clone(), measured))
        .with_state(app)
}

/// Lets a request in when it may be one more, and its key allows it.
async fn enter(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let served = app.served();
    let Ok(permit) = Arc::clone(&served.free).try_acquire_owned() else {
        let message = format!("{} requests run already, which is the most", served.limits.requests);
        return ApiError::busy(message, Duration::from_secs(1)).closing().into_response();
    };
    match served.gate.enter(request.headers(), permit, Instant::now()) {
        Ok(caller) => {
            request.extensions_mut().insert(caller.clone());
            let response = next.run(request).await;
            // A stream holds it until it ends.
            drop(caller);
            response
        }
        Err(error) => error.closing().into_response(),
    }
}

/// Routes as they are counted: those with names below them are one, and all others are one.
const ROUTES: [&str; 13] = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/models",
    "/v1/embeddings",
    "/v1/route",
    "/v1/retrieve",
    "/v1/explain",
    "/v1/tree/fetches",
    "/v1/tree",
    "/v1/banks",
    "/live",
    "/ready",
    "/metrics",
];

/// The route that a path is counted as.
fn route_of(path: &str) -> &'static str {
    let below =
        |route: &str| path.strip_prefix(route).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    match ROUTES.iter().find(|route| below(route)) {
        Some(route) => route,
        None => "/",
    }
}

async fn measured(State(app): State<App>, request: Request, next: Next) -> Response {
    let (begin, route) = (Instant::now(), route_of(request.uri().path()));
    let response = next.run(request).await;
    app.served().metrics.answered(route, response.status().as_u16(), begin);
    response
}

async fn ready(State(app): State<App>) -> impl IntoResponse {
    match app.is_ready() {
        true => (StatusCode::OK, "ready\n"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
    }
}

async fn metrics(State(app): State<App>) -> Response {
    let served = app.served();
    let memory = served.retrieval.as_ref().map(|retrieval| retrieval.stats());
    match served.metrics.text(&served.engine.stats(), memory.as_ref()) {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => ApiError::internal(error).into_response(),
    }
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("{method} is not a method of {}", shortened(uri.path()));
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

/// Files of the page; nothing else is here.
async fn page(method: Method, uri: Uri, headers: HeaderMap) -> Response {
    let Some(asset) = asset(uri.path()).filter(|_| method == Method::GET || method == Method::HEAD) else {
        let message = format!("{method} {} is not a path of this server", shortened(uri.path()));
        return ApiError::not_found(message, "unknown_url").into_response();
    };
    let told = [
        (header::CONTENT_TYPE, asset.content_type),
        (header::CACHE_CONTROL, "no-cache"),
        (header::ETAG, &asset.etag),
        (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    let known =
        headers.get(header::IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == asset.etag.as_bytes());
    match known {
        true => (StatusCode::NOT_MODIFIED, told).into_response(),
        false => (told, asset.bytes).into_response(),
    }
}

fn shortened(path: &str) -> String {
    path.chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_few_names() {
        let table = [
            ("/v1/completions", "/v1/completions"),
            ("/v1/explain/3/49", "/v1/explain"),
            ("/v1/tree/fetches", "/v1/tree/fetches"),
            ("/v1/tree", "/v1/tree"),
            ("/v1/banks/x", "/v1/banks"),
            ("/main.js", "/"),
            ("/v1/completionsx", "/"),
            ("/", "/"),
        ];
        for (path, expected) in table {
            assert_eq!(route_of(path), expected, "{path}");
        }
    }
}
