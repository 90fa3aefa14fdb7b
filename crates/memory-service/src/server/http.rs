//! What operators look at, over plain HTTP.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::host::Host;

/// Serves `/metrics`, `/live` and `/ready` until the server stops.
pub(crate) async fn serve(host: Arc<Host>, listener: TcpListener, mut stopped: watch::Receiver<bool>) {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/live", get(async || "live\n"))
        .route("/ready", get(ready))
        .with_state(host);
    let served = axum::serve(listener, router).with_graceful_shutdown(async move {
        // An error is the end of the server too.
        let _ = stopped.changed().await;
    });
    if let Err(error) = served.await {
        tracing::warn!(%error, "the HTTP server failed");
    }
}

async fn ready(State(host): State<Arc<Host>>) -> impl IntoResponse {
    if host.is_ready() {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
    }
}

async fn metrics(State(host): State<Arc<Host>>) -> impl IntoResponse {
    host.update_metrics();
    let mut text = String::new();
    match encode(&mut text, &host.metrics.registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}
