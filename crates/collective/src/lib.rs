//! What the workers of a job tell each other: gradients summed over all of them, and small messages.
//!
//! Every worker has a connection to every other one. A sum is taken apart by ranks: each adds up one slice
//! of what all have and sends it to the others, so that a worker of W sends (W-1)/W of the array twice, as
//! in a ring, in two rounds. The order of the additions is that of a tree over the step's micro-batches
//! ([`TreeSum`]): how many workers share them changes no bit of the sum.

mod error;
mod leaves;
mod link;
mod local;
mod mesh;
#[cfg(feature = "nccl")]
mod nccl;
mod reduce;
mod stream;
mod tcp;
mod tree_sum;

/// What sums the gradients of a model over all workers.
#[derive(Default)]
pub enum Engine {
    /// The workers themselves ([`all_reduce`]): the bits of one worker alone, for any number of them.
    #[default]
    Tcp,
    /// NCCL, on the GPUs.
    #[cfg(feature = "nccl")]
    Nccl(Nccl),
}

pub use error::{Error, Result};
pub use leaves::Leaves;
pub use local::local;
pub use mesh::{Call, Mesh};
#[cfg(feature = "nccl")]
pub use nccl::{Group, Nccl};
pub use reduce::all_reduce;
pub use tcp::{TcpOptions, TlsConfigs, is_on_this_machine, join};
pub use tree_sum::TreeSum;
