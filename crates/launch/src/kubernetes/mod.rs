//! A run as a job of a Kubernetes cluster: workers as an Indexed Job of a JobSet, shards as a StatefulSet, all in
//! manifests that are rendered and checked here.

mod check;
#[cfg(feature = "kubernetes")]
mod cluster;
mod render;
mod site;
mod yaml;

pub use check::check;
#[cfg(feature = "kubernetes")]
pub use cluster::{Cluster, JobStatus, Phase, PodStatus};
pub use render::{Job, name_of};
pub use site::{Pods, Site, Toleration};
pub use yaml::to_yaml;
