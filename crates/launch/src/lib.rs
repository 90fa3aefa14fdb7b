//! A run as a job of several processes: which worker a process is, as its launcher says, and processes on
//! this machine that are started, watched and started again; and a run as a job of a site ([`slurm`],
//! [`kubernetes`]).

mod error;
pub mod kubernetes;
mod ranks;
mod shell;
pub mod slurm;
mod supervisor;

pub use error::{Error, Result};
pub use ranks::Ranks;
pub use supervisor::{Event, Role, Supervisor};

/// What a process exits with that has saved and wants to be started again: `EX_TEMPFAIL` of sysexits.h, by
/// which Slurm and others know a job to requeue.
pub const REQUEUE: u8 = 75;

/// A variable of processes that a [`Supervisor`] starts: they are to call [`end_with_parent`].
pub const CHILD: &str = "ANCHORAGE_CHILD";

/// Has the system tell this process to stop when the one that started it is gone: nobody would watch it.
pub fn end_with_parent() {
    #[cfg(target_os = "linux")]
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM));
}
