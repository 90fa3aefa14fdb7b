use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use signal_hook::SigId;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};

/// Set when the process is told to save and stop; told twice to interrupt, it ends at once. Dropped, signals do
/// again what they did before.
pub(crate) struct Stop {
    pub(crate) flag: Arc<AtomicBool>,
    handlers: Vec<SigId>,
}

impl Stop {
    pub(crate) fn when_told() -> Result<Self> {
        let flag = Arc::<AtomicBool>::default();
        // In this order: the first interruption does not meet the flag yet.
        let mut handlers =
            vec![signal_hook::flag::register_conditional_shutdown(SIGINT, 130, Arc::clone(&flag))?];
        for signal in [SIGINT, SIGTERM, SIGUSR1] {
            handlers.push(signal_hook::flag::register(signal, Arc::clone(&flag))?);
        }
        Ok(Self { flag, handlers })
    }

    pub(crate) fn is_set(&self) -> bool {
        self.flag.load(Ordering::Relaxed)
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        for handler in self.handlers.drain(..) {
            signal_hook::low_level::unregister(handler);
        }
    }
}
