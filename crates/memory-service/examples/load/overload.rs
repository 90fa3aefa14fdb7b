//! A shard asked for twice what it can give: requests come at their own pace, whatever becomes of those before.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cluster_tree::ClusterId;
use memory_bank::{Block, Error, Step};
use memory_service::{READY, RemoteBank};
use serde_json::{Value, json};
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::bank::Sizes;
use crate::closed_loop::{N_BLOCKS, Result, cpu_s, quantile, run as measure};
use crate::fetch::fetchers;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The shard that is asked for too much.
    address: String,
    #[arg(long)]
    pid: u32,
    /// One with room for more, for a few clients that each wait for their answer.
    #[arg(long)]
    roomy_address: String,
    #[arg(long)]
    roomy_pid: u32,
    #[command(flatten)]
    sizes: Sizes,
    #[arg(long)]
    bulk: bool,
    #[arg(long)]
    level: u8,
    /// Of the overload; each rate of the curve takes half as long.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
}

/// Clients that each wait for their answer: where the curve begins.
const CLIENTS: usize = 8;
/// Clients of the curve and of the overload, each with a connection of its own: many more than the shard fetches
/// for at once.
const MANY: usize = 64;
/// Offered rates of the curve, as shares of the pace of the clients that wait.
const CURVE: [f64; 6] = [0.5, 0.75, 0.9, 1.0, 1.25, 1.5];

/// A client, and the block that it fetches into, whose array is used again.
type Fetcher = (RemoteBank, [Block; 1]);

/// What became of the requests.
#[derive(Default)]
struct Seen {
    served: Vec<f64>,
    refused: Vec<f64>,
    /// Anything else.
    errors: Vec<String>,
    /// When it was time for a request and every client had one under way.
    unsent: usize,
    /// Clients that have none; the last to come back goes first, while its array is in the cache.
    free: Vec<Fetcher>,
}

/// The peak is the highest goodput of any rate, of the same clients against the same shard; the best rate is
/// measured again after the overload, since how fast this machine is changes by the minute.
pub(crate) async fn run(args: Args) -> Result<()> {
    let closed = closed(&args).await?;
    let mut free = vec![];
    for _ in 0..MANY {
        let bank = args.sizes.connect(&args.address, args.bulk).await?;
        let mut block = [Block { id: ClusterId { level: args.level, index: 0 }, values: vec![] }];
        // Connections are open before it begins.
        bank.fetch_into(Step(0), &mut block).await?;
        free.push((bank, block));
    }
    let goodput = |line: &Value| line["goodput_per_s"].as_f64().unwrap_or_default();
    let (mut curve, mut best, mut peak) = (vec![], 0.0, 0.0);
    for share in CURVE {
        let line = offer(&mut free, share * closed, args.seconds / 2.0, args.pid).await?;
        if goodput(&line) > peak {
            (best, peak) = (share, goodput(&line));
        }
        curve.push(json!({"offered_per_s": share * closed, "goodput_per_s": line["goodput_per_s"]}));
    }
    let health = tokio::spawn(watch_health(args.address.clone(), args.seconds));
    let mut line = offer(&mut free, 2.0 * peak, args.seconds, args.pid).await?;
    line["health"] = health.await??;
    let again = offer(&mut free, best * closed, args.seconds / 2.0, args.pid).await?;
    line["peak_per_s"] = json!(peak.max(goodput(&again)));
    line["peak_server_cpu_ms"] = again["server_cpu_ms"].clone();
    line["peak_client_cpu_ms"] = again["client_cpu_ms"].clone();
    line["closed_loop_per_s"] = json!(closed);
    line["curve"] = json!(curve);
    println!("{line}");
    Ok(())
}

/// Blocks per second of a few clients, each with one request under way.
async fn closed(args: &Args) -> Result<f64> {
    let clients = fetchers(&args.sizes, &args.roomy_address, args.bulk, args.level, CLIENTS).await?;
    let seen = measure(clients, args.seconds / 2.0, args.roomy_pid).await?;
    let of = |key: &str| seen[key].as_f64().unwrap_or_default();
    Ok(of("requests") / of("seconds"))
}

/// Offers requests at a rate for some seconds: one is sent when it is time, by a client that has none under way.
async fn offer(free: &mut Vec<Fetcher>, per_s: f64, seconds: f64, server_pid: u32) -> Result<Value> {
    let seen = Arc::new(Mutex::new(Seen { free: std::mem::take(free), ..Seen::default() }));
    let (own, server) = (cpu_s("self")?, cpu_s(&server_pid.to_string())?);
    let (start, mut n) = (Instant::now(), 0);
    let mut requests = tokio::task::JoinSet::new();
    while start.elapsed().as_secs_f64() < seconds {
        while (n as f64) < start.elapsed().as_secs_f64() * per_s {
            n += 1;
            let mut now = lock(&seen);
            match now.free.pop() {
                Some(client) => drop(requests.spawn(request(client, n % N_BLOCKS, Arc::clone(&seen)))),
                None => now.unsent += 1,
            }
        }
        // Their results are kept already.
        while requests.try_join_next().is_some() {}
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // What is under way now does not count: as much was at the beginning of a longer run.
    let Seen { mut served, mut refused, errors, unsent, .. } = {
        let mut now = lock(&seen);
        let free = std::mem::take(&mut now.free);
        std::mem::replace(&mut *now, Seen { free, ..Seen::default() })
    };
    let seconds = start.elapsed().as_secs_f64();
    let (own, server) = (cpu_s("self")? - own, cpu_s(&server_pid.to_string())? - server);
    requests.join_all().await;
    *free = std::mem::take(&mut lock(&seen).free);
    let per_served = |cpu_s: f64| cpu_s * 1e3 / (served.len() as f64).max(1.0);
    let (server_cpu_ms, client_cpu_ms) = (per_served(server), per_served(own));
    Ok(json!({
        "sent_per_s": (n as usize - unsent) as f64 / seconds,
        "goodput_per_s": served.len() as f64 / seconds,
        "refused_per_s": refused.len() as f64 / seconds,
        "server_cpu_ms": server_cpu_ms,
        "client_cpu_ms": client_cpu_ms,
        "served_p50_ms": quantile(&mut served, 0.5),
        "refusal_p50_ms": quantile(&mut refused, 0.5),
        "refusal_p99_ms": quantile(&mut refused, 0.99),
        "errors": errors.len(),
        "first_error": errors.first(),
    }))
}

async fn request(client: (RemoteBank, [Block; 1]), index: u32, seen: Arc<Mutex<Seen>>) {
    let (bank, mut block) = client;
    block[0].id.index = index;
    let start = Instant::now();
    let fetched = bank.fetch_into(Step(0), &mut block).await;
    let ms = start.elapsed().as_secs_f64() * 1e3;
    let mut seen = lock(&seen);
    seen.free.push((bank, block));
    match fetched {
        Ok(()) => seen.served.push(ms),
        Err(Error::Remote { message, .. }) if message.starts_with("ResourceExhausted") => {
            seen.refused.push(ms)
        }
        Err(error) => seen.errors.push(error.to_string()),
    }
}

/// Asks the health service every 50 ms, over a connection of its own.
async fn watch_health(address: String, seconds: f64) -> Result<Value> {
    let mut client = HealthClient::new(Endpoint::from_shared(format!("http://{address}"))?.connect().await?);
    let (start, mut ms, mut serving) = (Instant::now(), vec![], true);
    while start.elapsed().as_secs_f64() < seconds {
        for service in ["", READY] {
            let asked = Instant::now();
            let answer = client.check(HealthCheckRequest { service: service.to_owned() }).await?.into_inner();
            ms.push(asked.elapsed().as_secs_f64() * 1e3);
            serving &= answer.status() == ServingStatus::Serving;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(
        json!({"checks": ms.len(), "serving": serving, "p50_ms": quantile(&mut ms, 0.5), "worst_ms": quantile(&mut ms, 1.0)}),
    )
}

fn lock(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}
