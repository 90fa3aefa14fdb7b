use std::path::PathBuf;

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a job does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A variable of the launcher that says nothing sensible.
    #[error("{name}: expected {expected}, found {found}")]
    Variable {
        /// Its name.
        name: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A program that cannot be started, or a log that cannot be written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The program or the file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A path that cannot be written into a script.
    #[error("{}: expected a path that is UTF-8", path.display())]
    NoText {
        /// The path.
        path: PathBuf,
    },
    /// A program of the site that is not there.
    #[error("{program}: not found; is this a machine of a site with Slurm?")]
    Missing {
        /// Its name.
        program: &'static str,
    },
    /// A program of the site that failed.
    #[error("{program}: {said}")]
    Refused {
        /// Its name.
        program: &'static str,
        /// What it said, in one line.
        said: String,
    },
    /// A program of the site that answered something else.
    #[error("{program}: expected {expected}, found {found}")]
    Answer {
        /// Its name.
        program: &'static str,
        /// What it should print.
        expected: &'static str,
        /// What it printed.
        found: String,
    },
    /// A key of a site's file that no job can have.
    #[error("{section}.{key}: expected {expected}, found {found}")]
    Site {
        /// `slurm` or `kubernetes`.
        section: &'static str,
        /// Below the section.
        key: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A manifest that no cluster would take.
    #[error("{object}: {path}: expected {expected}, found {found}")]
    Manifest {
        /// Its kind and name.
        object: String,
        /// Where in it.
        path: String,
        /// What may be there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// What the cluster has, beside what was asked for.
    #[cfg(feature = "kubernetes")]
    #[error("{name}: expected {expected}, found {found}")]
    Job {
        /// Kind and name.
        name: String,
        /// What should be there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// What the cluster refuses, or that it is not reached.
    #[cfg(feature = "kubernetes")]
    #[error("{what}: {reason}")]
    Cluster {
        /// Kind and name of what was asked about.
        what: String,
        /// What it says.
        reason: String,
    },
    /// A role that ended and is not started again.
    #[error("{role} ended with {ended}{}{}: its log is {}", again(*started_again), said(last_line), log.display())]
    Ended {
        /// Such as `worker 1`.
        role: String,
        /// Its exit code or signal.
        ended: String,
        /// How often it was started again since the job came further.
        started_again: usize,
        /// The last line of its log.
        last_line: String,
        /// All of it.
        log: PathBuf,
    },
}

fn again(times: usize) -> String {
    match times {
        0 => String::new(),
        times => format!(" once more, started again {times} times without progress"),
    }
}

fn said(last_line: &str) -> String {
    match last_line.is_empty() {
        true => String::new(),
        false => format!(" ({last_line})"),
    }
}
