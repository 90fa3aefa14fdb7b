//! Progress of long work: a bar on a terminal, a plain line now and then elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Seconds between plain lines.
const PLAIN_EVERY: Duration = Duration::from_secs(10);

pub(crate) struct Progress {
    what: String,
    total: u64,
    bar: Option<ProgressBar>,
    last_line: Instant,
}

impl Progress {
    /// Work named `what` of `total` units.
    pub(crate) fn new(what: impl Into<String>, total: u64) -> Self {
        let what = what.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total);
            let style =
                ProgressStyle::with_template("{prefix:>18} [{bar:30}] {percent:>3}% {msg} (left: {eta})");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
            bar.set_prefix(what.clone());
            bar
        });
        Self { what, total, bar, last_line: Instant::now() }
    }

    /// `done` units are done (of `total`, which may have become known only now).
    pub(crate) fn set(&mut self, done: u64, total: u64, message: impl FnOnce() -> String) {
        self.total = total;
        match &self.bar {
            Some(bar) => {
                bar.set_length(total);
                bar.set_position(done);
                bar.set_message(message());
            }
            None if self.last_line.elapsed() >= PLAIN_EVERY => {
                self.last_line = Instant::now();
                eprintln!("{}: {} of {} {}", self.what, done, total, message());
            }
            None => {}
        }
    }

    /// Says something that stays.
    pub(crate) fn tell(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    /// Replaces the bar by one last line.
    pub(crate) fn finish(self, message: impl AsRef<str>) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!("{:>18}: {}", self.what, message.as_ref());
    }
}
