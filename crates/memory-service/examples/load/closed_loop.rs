//! The loop that measures a fetch, of our side and, by its path, of the peers in bench/shard/peers: clients beside
//! each other, each with one request under way.

use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::Barrier;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Blocks that clients choose from.
pub(crate) const N_BLOCKS: u32 = 64;

/// One client with connections of its own.
pub(crate) trait Client: Send + 'static {
    /// Fetches a block; returns its bytes.
    fn fetch(&mut self, index: u32) -> impl Future<Output = Result<usize>> + Send;
}

/// The number at a place of a block: whole, so that every side makes the same.
pub(crate) fn number(index: u32, place: usize) -> f32 {
    ((index as usize * 31 + place * 7) & 255) as f32
}

/// Fails on a block that begins with another number than it should.
pub(crate) fn check_first(index: u32, first: f32) -> Result<()> {
    let expected = number(index, 0);
    if first == expected {
        Ok(())
    } else {
        Err(format!("block {index} begins with {first}, not {expected}").into())
    }
}

/// All clients fetch one block after another for some seconds; requests under way at the end are finished and count.
pub(crate) async fn run<C: Client>(clients: Vec<C>, seconds: f64, server_pid: u32) -> Result<Value> {
    let ready = Arc::new(Barrier::new(clients.len() + 1));
    let mut tasks = vec![];
    for (place, mut client) in clients.into_iter().enumerate() {
        let ready = Arc::clone(&ready);
        tasks.push(tokio::spawn(async move {
            let mut index = 7 * place as u32;
            // The first ones open connections and fill caches.
            for _ in 0..4 {
                client.fetch(index % N_BLOCKS).await?;
                index += 1;
            }
            ready.wait().await;
            let end = Instant::now() + Duration::from_secs_f64(seconds);
            let (mut ms, mut bytes) = (vec![], 0);
            loop {
                let start = Instant::now();
                if start >= end {
                    return Ok::<_, Box<dyn Error + Send + Sync>>((ms, bytes));
                }
                bytes += client.fetch(index % N_BLOCKS).await?;
                ms.push(start.elapsed().as_secs_f64() * 1e3);
                index += 1;
            }
        }));
    }
    // A client that fails before never comes: wait for the first that ends too.
    let started = tokio::time::timeout(Duration::from_secs(30), ready.wait()).await;
    started.map_err(|_| "a client was not ready within 30 s")?;
    let (own, server, start) = (cpu_s("self")?, cpu_s(&server_pid.to_string())?, Instant::now());
    let (mut ms, mut bytes) = (vec![], 0);
    for task in tasks {
        let (times, n_bytes) = task.await??;
        ms.extend(times);
        bytes += n_bytes;
    }
    let seconds = start.elapsed().as_secs_f64();
    let (own, server) = (cpu_s("self")? - own, cpu_s(&server_pid.to_string())? - server);
    Ok(json!({
        "requests": ms.len(), "seconds": seconds, "bytes": bytes, "client_cpu_s": own, "server_cpu_s": server,
        "p50_ms": quantile(&mut ms, 0.5), "p99_ms": quantile(&mut ms, 0.99),
    }))
}

/// The value that a share of all are below; of none, 0.
pub(crate) fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let place = (values.len() as f64 * share) as usize;
    values.get(place.min(values.len().saturating_sub(1))).copied().unwrap_or_default()
}

/// Seconds that the threads of a process have run, in hundredths.
pub(crate) fn cpu_s(process: &str) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The name before may hold spaces.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks =
        |place: usize| -> Result<f64> { Ok(fields.get(place).ok_or("no times in /proc/PID/stat")?.parse()?) };
    Ok((ticks(11)? + ticks(12)?) / 100.0)
}

/// Answers each line of the input, cut into words, by a line of JSON, until it ends.
pub(crate) fn answer_lines(mut answer: impl FnMut(&[&str]) -> Result<Value>) -> Result<()> {
    use std::io::{BufRead, Write};
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let answer = answer(&line.split_whitespace().collect::<Vec<_>>())?;
        let mut out = std::io::stdout().lock();
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

/// Returns when the input ends: what started this process is gone, so it ends too.
pub(crate) async fn input_ended() {
    let (ended, end) = tokio::sync::oneshot::channel::<()>();
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        drop(ended);
    });
    let _ = end.await;
}
