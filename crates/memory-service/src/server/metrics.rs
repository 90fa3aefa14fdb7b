use std::sync::atomic::AtomicU64;

use bytes::Bytes;
use cluster_tree::ClusterId;
use memory_bank::Pushed;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use tonic::Code;

use crate::wire::Dtype;

/// What a shard counts, scraped as Prometheus text at `/metrics`.
pub(crate) struct Metrics {
    pub(crate) registry: Registry,
    /// Seconds until a request is answered in full.
    pub(crate) latency: Family<Call, Histogram, fn() -> Histogram>,
    requests: Family<Outcome, Counter>,
    pub(crate) fence_wait: Histogram,
    blocks: Family<Level, Counter>,
    bytes: Family<Direction, Counter>,
    refused: Counter,
    updates: Counter,
    update_seconds: Counter<f64, AtomicU64>,
    pub(crate) applied: Gauge,
    pub(crate) fence_lag: Gauge,
    touched: Family<Level, Gauge>,
    row_bytes: Family<Place, Gauge>,
    in_use: Family<Resource, Gauge>,
    pub(crate) save_seconds: Histogram,
    pub(crate) saved_bytes: Counter,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub(crate) struct Call {
    pub(crate) call: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Outcome {
    call: &'static str,
    code: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Level {
    level: u8,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Direction {
    direction: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Place {
    place: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Resource {
    resource: &'static str,
}

/// 50 µs to 26 s, in doublings.
fn latency() -> Histogram {
    Histogram::new(exponential_buckets(50e-6, 2.0, 20))
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("anchorage_shard");
        let metrics = Self {
            latency: Family::new_with_constructor(latency),
            requests: Family::default(),
            fence_wait: latency(),
            blocks: Family::default(),
            bytes: Family::default(),
            refused: Counter::default(),
            updates: Counter::default(),
            update_seconds: Counter::default(),
            applied: Gauge::default(),
            fence_lag: Gauge::default(),
            touched: Family::default(),
            row_bytes: Family::default(),
            in_use: Family::default(),
            save_seconds: Histogram::new(exponential_buckets(0.01, 2.0, 16)),
            saved_bytes: Counter::default(),
            registry: Registry::default(),
        };
        let m = &metrics;
        registry.register_with_unit(
            "request",
            "Time until a request is answered in full",
            Unit::Seconds,
            m.latency.clone(),
        );
        registry.register("requests", "Requests by call and status code", m.requests.clone());
        let waits = m.fence_wait.clone();
        registry.register_with_unit(
            "fence_wait",
            "Time that fetches wait for their step",
            Unit::Seconds,
            waits,
        );
        registry.register("fetched_blocks", "Blocks sent by level", m.blocks.clone());
        registry.register_with_unit(
            "block",
            "Bytes of blocks sent and received",
            Unit::Bytes,
            m.bytes.clone(),
        );
        registry.register("refused", "Requests refused under overload", m.refused.clone());
        registry.register("updated_blocks", "Blocks updated", m.updates.clone());
        let seconds = m.update_seconds.clone();
        registry.register_with_unit("optimizer", "Time spent in updates", Unit::Seconds, seconds);
        registry.register("applied_step", "Last step applied", m.applied.clone());
        let lag = "Steps that some rank has pushed and that wait for another";
        registry.register("fence_lag_steps", lag, m.fence_lag.clone());
        registry.register("touched_blocks", "Blocks updated at least once, by level", m.touched.clone());
        let rows = "Bytes of updated blocks with their moments, in memory and on disk";
        registry.register_with_unit("row", rows, Unit::Bytes, m.row_bytes.clone());
        registry.register("in_use", "Bounded resources in use", m.in_use.clone());
        registry.register_with_unit(
            "save",
            "Time to write a checkpoint",
            Unit::Seconds,
            m.save_seconds.clone(),
        );
        let saved = m.saved_bytes.clone();
        registry.register_with_unit("saved", "Bytes written to checkpoints", Unit::Bytes, saved);
        Self { registry, ..metrics }
    }

    pub(crate) fn refused(&self) {
        self.refused.inc();
    }

    pub(crate) fn fetched(&self, ids: &[ClusterId], blocks: &[Bytes], dtype: Dtype) {
        // What the caller holds is not sent.
        for (id, _) in ids.iter().zip(blocks).filter(|(_, block)| !block.is_empty()) {
            self.blocks.get_or_create(&Level { level: id.level }).inc();
        }
        let len: usize = blocks.iter().map(|block| block.len() / size_of::<f32>()).sum();
        self.bytes.get_or_create(&Direction { direction: "sent" }).inc_by((len * dtype.size()) as u64);
    }

    pub(crate) fn touched(&self, level: u8, n: usize) {
        self.touched.get_or_create(&Level { level }).set(n as i64);
    }

    pub(crate) fn row_bytes(&self, place: &'static str, n_bytes: u64) {
        self.row_bytes.get_or_create(&Place { place }).set(n_bytes as i64);
    }

    pub(crate) fn received(&self, n_bytes: usize) {
        self.bytes.get_or_create(&Direction { direction: "received" }).inc_by(n_bytes as u64);
    }

    pub(crate) fn pushed(&self, pushed: &Pushed) {
        self.updates.inc_by(pushed.n_updates as u64);
        self.update_seconds.inc_by(pushed.updating.as_secs_f64());
        self.applied.set(pushed.applied.0 as i64);
    }

    pub(crate) fn ended(&self, call: &'static str, code: Code) {
        self.requests.get_or_create(&Outcome { call, code: code_name(code) }).inc();
    }

    pub(crate) fn in_use(&self, resource: &'static str, n: usize) {
        self.in_use.get_or_create(&Resource { resource }).set(n as i64);
    }
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Cancelled => "cancelled",
        Code::InvalidArgument => "invalid_argument",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::NotFound => "not_found",
        Code::PermissionDenied => "permission_denied",
        Code::ResourceExhausted => "resource_exhausted",
        Code::FailedPrecondition => "failed_precondition",
        Code::Unavailable => "unavailable",
        Code::Unauthenticated => "unauthenticated",
        _ => "internal",
    }
}
