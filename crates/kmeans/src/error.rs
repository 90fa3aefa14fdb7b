/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can be wrong with the points or the options.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Points have at least one dimension.
    #[error("points have dimension 0, expected at least 1")]
    ZeroDimension,
    /// The values are not rows of the dimension.
    #[error("{values} values are not rows of dimension {dim}")]
    Length {
        /// Values given.
        values: usize,
        /// Dimension of a point.
        dim: usize,
    },
    /// A tree needs points; and an index of a point is a `u32`.
    #[error("{found} points, expected 1 to {max}")]
    PointCount {
        /// Points given.
        found: usize,
        /// The most that indices can name.
        max: u32,
    },
    /// A point holds NaN or infinity, or its squared norm overflows.
    #[error("point {row} has squared norm {norm_squared}, expected a finite one")]
    NonFinite {
        /// Row of the point.
        row: usize,
        /// The squared norm found.
        norm_squared: f32,
    },
    /// An option outside its range.
    #[error("{option} is {found}, expected {expected}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// The range.
        expected: String,
        /// The value given.
        found: String,
    },
    /// The tree refused its arrays or an embedding.
    #[error(transparent)]
    Tree(#[from] cluster_tree::Error),
}
