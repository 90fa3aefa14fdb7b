//! The endpoint of a worker.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::observer::Seen;
use super::{Spent, Status};

pub(super) fn bind(address: SocketAddr) -> Result<TcpListener> {
    let listen = || {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        eprintln!("{:>18}: http://{}/status", "observe", listener.local_addr()?);
        Ok::<_, std::io::Error>(listener)
    };
    listen().with_context(|| format!("observe.listen: {address}"))
}

/// Serves `/status` as JSON, `/metrics` as Prometheus text, and `/live`.
pub(super) async fn serve(seen: Arc<Seen>, listener: TcpListener) {
    let router = Router::new()
        .route("/status", get(status))
        .route("/metrics", get(metrics))
        .route("/live", get(async || "live\n"))
        .with_state(seen);
    let served = async { axum::serve(tokio::net::TcpListener::from_std(listener)?, router).await };
    if let Err(error) = served.await {
        eprintln!("the endpoint of observe.listen failed: {error}");
    }
}

async fn status(State(seen): State<Arc<Seen>>) -> impl IntoResponse {
    let kind = [(header::CONTENT_TYPE, "application/json")];
    match serde_json::to_string(&seen.status()) {
        Ok(text) => (kind, text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn metrics(State(seen): State<Arc<Seen>>) -> impl IntoResponse {
    let mut text = String::new();
    match encode(&mut text, &registry(&seen.status())) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

type Seconds = Counter<f64, AtomicU64>;

/// The numbers of a status, as they are scraped.
fn registry(status: &Status) -> Registry {
    let labels = [("rank".into(), status.rank.to_string().into())];
    let mut registry = Registry::with_prefix_and_labels("anchorage_worker", labels.into_iter());
    let gauges = [
        ("step", "Last step", Some(status.step as f64)),
        ("steps", "Steps of the whole run", Some(status.steps as f64)),
        ("checkpoint_step", "Newest checkpoint", status.checkpoint.map(|step| step as f64)),
        ("tokens_seen", "Targets scored since the run began", Some(status.tokens_seen as f64)),
        ("loss", "Loss of the last step, nats", Some(status.loss)),
        ("validation_loss", "Last loss on held-out documents, nats", status.validation_loss),
        ("gradient_norm", "Of the anchor, before clipping", Some(status.gradient_norm)),
        ("memory_gradient_norm", "Of all blocks, before clipping", Some(status.memory_gradient_norm)),
        ("tokens_per_second", "Targets a second of the whole job", Some(status.tokens_per_s)),
        ("mfu_ratio", "Model FLOPs utilisation", status.mfu),
        ("goodput_ratio", "Part of the time spent on steps that were kept", Some(status.goodput)),
        ("left_seconds", "Until the last step", status.seconds_left),
    ];
    for (name, help, value) in gauges {
        if let Some(value) = value {
            let gauge = Gauge::<f64, AtomicU64>::default();
            gauge.set(value);
            registry.register(name, help, gauge);
        }
    }
    let counters = [
        ("rollbacks", "Returns to a checkpoint", status.rollbacks),
        ("fetched_bytes", "Blocks from shards", status.fetched_bytes),
        ("pushed_bytes", "Gradients to shards", status.pushed_bytes),
        ("retries", "Requests to shards that were tried again", status.retries),
    ];
    for (name, help, value) in counters {
        let counter = Counter::<u64>::default();
        counter.inc_by(value);
        registry.register(name, help, counter);
    }
    let spent = Family::<Vec<(&str, &str)>, Seconds>::default();
    for (cause, ms) in Spent::CAUSES.into_iter().zip(status.spent.values()) {
        spent.get_or_create(&vec![("cause", cause)]).inc_by(ms / 1e3);
    }
    registry.register_with_unit("spent", "Time of steps by what it went on", Unit::Seconds, spent);
    registry
}
