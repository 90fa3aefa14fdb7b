//! Which seeds are run, and what is said of one that fails.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{available_parallelism, scope};

/// Runs every seed, on all cores; returns what they found.
///
/// # Panics
/// At the first seeds that fail, with what to do to see them again.
pub(crate) fn run<T: Send>(simulate: impl Fn(u64) -> Result<T, String> + Sync) -> Vec<T> {
    let (first, n) = (from_environment("FIRST", 1), from_environment("SEEDS", 200));
    let (next, ended) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    let failed = AtomicU64::new(0);
    let work = || {
        while failed.load(Ordering::Relaxed) == 0 {
            let nth = next.fetch_add(1, Ordering::Relaxed);
            if nth >= n {
                return;
            }
            let seed = first + nth;
            let outcome = catch_unwind(AssertUnwindSafe(|| simulate(seed)))
                .unwrap_or_else(|panic| Err(format!("panicked: {}", text(&*panic))));
            failed.fetch_add(u64::from(outcome.is_err()), Ordering::Relaxed);
            ended.lock().unwrap_or_else(PoisonError::into_inner).push(outcome.map_err(|why| {
                format!(
                    "seed {seed}: {why}\nagain: ANCHORAGE_SIM_FIRST={seed} ANCHORAGE_SIM_SEEDS=1 \
                     cargo test --release -p memory-service --test simulation"
                )
            }));
        }
    };
    scope(|scope| {
        for _ in 0..available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    let ended = ended.into_inner().unwrap_or_else(PoisonError::into_inner);
    ended.into_iter().map(|outcome| outcome.unwrap_or_else(|why| panic!("{why}"))).collect()
}

/// Whether these are the seeds of every day, which together must have met every kind of fault.
pub(crate) fn are_many() -> bool {
    from_environment("SEEDS", 200) >= 200
}

fn from_environment(name: &str, default: u64) -> u64 {
    let name = format!("ANCHORAGE_SIM_{name}");
    match std::env::var(&name) {
        Ok(value) => value.parse().unwrap_or_else(|_| panic!("{name} is {value:?}, expected a number")),
        Err(_) => default,
    }
}

fn text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}
