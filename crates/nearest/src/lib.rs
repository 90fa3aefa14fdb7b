//! The nearest of a few candidates to each of many vectors, exactly, at the speed of 8-bit integers.
//!
//! Vectors and candidates are coded as integers of 8 bits, times a scale of their own, after an origin near them is
//! taken away. Products of codes give every score within a bound that is known (Cauchy–Schwarz on what the codes
//! leave out), so most candidates cannot be the nearest; the few that could are compared by their true distances. The
//! answer is that of comparing all of them, and since sums of integers have no order, it has the same bits on every
//! processor.
//!
//! Shapes: N rows, K candidates of a group, D dimensions.

mod codes;
mod distance;
#[allow(unsafe_code)] // Chooses its instructions at run time.
mod kernel;
mod panels;

pub use codes::Codes;
pub use distance::squared_distance;
pub use panels::{Interval, Panels};

/// The largest squared norm that a vector or a candidate may have, so that no distance overflows.
pub const MAX_SQUARED_NORM: f32 = 1e30;

/// The most dimensions, so that sums of products of codes stay within 32 bits.
pub const MAX_DIM: usize = 1 << 16;
