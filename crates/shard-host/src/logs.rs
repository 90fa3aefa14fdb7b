use clap::ValueEnum;
use tracing_subscriber::fmt;

/// How log lines look, on the standard error.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum Logs {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Begins to log events of at least `level`. Does nothing when that was done already.
pub fn start_logs(logs: Logs, level: tracing::Level) {
    let lines = fmt().with_max_level(level).with_writer(std::io::stderr).with_ansi(false);
    // Only fails when something logs already.
    let _ = match logs {
        Logs::Text => lines.try_init(),
        Logs::Json => lines.json().flatten_event(true).try_init(),
    };
}
