//! A run as a job of Slurm: the site's section of it, the batch script, and Slurm's programs.
//!
//! Workers are one step of the job and shards another, on the same nodes or, in a heterogeneous job, in another
//! partition. A process that dies alone is started again on its node by who keeps it; a job that loses a node is
//! queued again by Slurm, and one that has saved before its time limit by its script.

mod programs;
mod script;
mod site;

pub use programs::{JobId, JobState, cancel, find, requeue, stop, submit};
pub use script::Script;
pub use site::{ShardSite, Site, WorkerSite};
