//! What is measured, as Prometheus reads it at `/metrics`.

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use generate::engine::{EngineStats, Finish};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::memory::{MemoryStats, Selected};

const PREFIX: &str = "anchorage_serve";

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Outcome {
    route: &'static str,
    code: u16,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfRoute {
    route: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfTier {
    bank: String,
    tier: String,
    level: u64,
    result: &'static str,
}

/// What requests add to.
pub(super) struct Metrics {
    registry: Registry,
    requests: Family<Outcome, Counter>,
    latency: Family<OfRoute, Histogram, fn() -> Histogram>,
    first_token: Histogram,
    queue: Histogram,
    route: Histogram,
    fetch: Histogram,
    routed: Counter,
    left: Counter,
    failed_in_stream: Counter,
}

/// 100 µs to 52 s, in doublings.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(100e-6, 2.0, 20))
}

impl Metrics {
    pub(super) fn new() -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        let (requests, latency) =
            (Family::default(), Family::new_with_constructor(seconds as fn() -> Histogram));
        registry.register("requests", "Requests by route and status", Clone::clone(&requests));
        let help = "Time until a request is answered; of a stream, until it begins";
        registry.register_with_unit("request", help, Unit::Seconds, Clone::clone(&latency));
        let mut histogram = |name: &str, help: &str| {
            let histogram = seconds();
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
            histogram
        };
        let first_token = histogram("first_token", "Time from a request to its first token");
        let queue = histogram("queue", "Time that sequences wait to run");
        let route = histogram("route", "Time of embedding and routing a text");
        let fetch = histogram("fetch", "Time of fetching the blocks of a path");
        let mut counter = |name: &str, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let routed = counter("routed_texts", "Texts and embeddings routed by request");
        let left = counter("disconnects", "Streams whose client went away");
        let failed_in_stream = counter("stream_failures", "Streams that failed after they began");
        Self { registry, requests, latency, first_token, queue, route, fetch, routed, left, failed_in_stream }
    }

    /// A request that was answered.
    pub(super) fn answered(&self, route: &'static str, code: u16, begin: Instant) {
        self.requests.get_or_create(&Outcome { route, code }).inc();
        self.latency.get_or_create(&OfRoute { route }).observe(begin.elapsed().as_secs_f64());
    }

    /// Memory that was found for a sequence.
    pub(super) fn selected(&self, selected: &Selected) {
        if selected.path.is_some() {
            self.route.observe(selected.route_ms / 1e3);
            self.fetch.observe(selected.fetch_ms / 1e3);
        }
    }

    pub(super) fn first_token(&self, begin: Instant) {
        self.first_token.observe(begin.elapsed().as_secs_f64());
    }

    pub(super) fn ended(&self, finish: &Finish) {
        self.queue.observe(finish.queue_ms / 1e3);
    }

    /// A sequence of an answer that came whole: its first token came before it was decoded on.
    pub(super) fn finished(&self, begin: Instant, finish: &Finish) {
        self.ended(finish);
        let after = (finish.decode_ms + finish.rest_ms) / 1e3;
        self.first_token.observe((begin.elapsed().as_secs_f64() - after).max(0.0));
    }

    pub(super) fn routed(&self, n: usize) {
        self.routed.inc_by(n as u64);
    }

    pub(super) fn left(&self) {
        self.left.inc();
    }

    pub(super) fn failed_in_stream(&self) {
        self.failed_in_stream.inc();
    }

    /// All of it as text, with what the engine and the banks count.
    pub(super) fn text(
        &self,
        engine: &EngineStats,
        memory: Option<&MemoryStats>,
    ) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode_registry(&mut text, &self.registry)?;
        encode_registry(&mut text, &counted(engine, memory))?;
        encode_eof(&mut text)?;
        Ok(text)
    }
}

/// What others count.
fn counted(engine: &EngineStats, memory: Option<&MemoryStats>) -> Registry {
    let mut registry = Registry::with_prefix(PREFIX);
    for (name, help, value) in [
        ("running_sequences", "Sequences that run", engine.running),
        ("resting_sequences", "Of those, the ones that wait for other memory", engine.resting),
        ("waiting_sequences", "Sequences in the queue", engine.waiting),
        ("free_pages", "Pages of keys and values that no sequence has", engine.free_pages),
        ("pages", "All pages of keys and values", engine.total_pages),
    ] {
        gauge(&mut registry, name, help, value as u64);
    }
    for (name, help, value) in [
        ("completed_sequences", "Sequences that ended by themselves", engine.completed),
        ("failed_sequences", "Sequences that failed", engine.failed),
        ("cancelled_sequences", "Sequences whose caller went away", engine.cancelled),
        ("refused_sequences", "Sequences refused for a full queue", engine.refused),
        ("prompt_tokens", "Tokens of prompts that went through the decoder", engine.prompt_tokens),
        ("generated_tokens", "Tokens generated", engine.generated_tokens),
        ("steps", "Steps of the decoder", engine.steps),
    ] {
        counter(&mut registry, name, help, value);
    }
    let busy = Counter::<f64, AtomicU64>::default();
    busy.inc_by(engine.busy_s);
    registry.register_with_unit("busy", "Time spent in steps", Unit::Seconds, busy);
    if let Some(memory) = memory {
        of_memory(&mut registry, memory);
    }
    registry
}

fn of_memory(registry: &mut Registry, memory: &MemoryStats) {
    gauge(registry, "packed_bytes", "Bytes of packed blocks held", memory.packed.bytes);
    gauge(registry, "packed_blocks", "Packed blocks held", memory.packed.n_blocks);
    counter(registry, "prefetched_blocks", "Blocks fetched before anyone asked", memory.prefetched);
    let blocks = Family::<OfTier, Counter>::default();
    let add = |bank: &str, tier: &str, level: usize, counts: [(&'static str, u64); 2]| {
        for (result, n) in counts {
            let labels = OfTier { bank: bank.to_owned(), tier: tier.to_owned(), level: level as u64, result };
            blocks.get_or_create(&labels).inc_by(n);
        }
    };
    for level in &memory.packed.levels {
        add("", "packed", level.level, [("hit", level.n_hits), ("miss", level.n_misses)]);
    }
    for bank in &memory.banks {
        for tier in &bank.tiers.tiers {
            for level in &tier.levels {
                add(&bank.name, &tier.name, level.level, [("hit", level.n_hits), ("miss", level.n_misses)]);
            }
        }
    }
    let help = "Blocks asked for of the packed ones (all banks) and of each tier, by level: found or not";
    registry.register("blocks", help, blocks);
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let gauge = Gauge::<i64>::default();
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    registry.register(name, help, gauge);
}

fn counter(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let counter = Counter::<u64>::default();
    counter.inc_by(value);
    registry.register(name, help, counter);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_holds_what_happened_and_ends_once() {
        let metrics = Metrics::new();
        metrics.answered("/v1/completions", 200, Instant::now());
        let stats = EngineStats { running: 3, generated_tokens: 7, ..EngineStats::default() };
        let text = metrics.text(&stats, Some(&MemoryStats::default())).unwrap();
        for line in [
            "anchorage_serve_requests_total{route=\"/v1/completions\",code=\"200\"} 1",
            "anchorage_serve_running_sequences 3",
            "anchorage_serve_generated_tokens_total 7",
            "anchorage_serve_first_token_seconds_count 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        assert_eq!((text.matches("# EOF").count(), text.ends_with("# EOF\n")), (1, true));
    }
}
