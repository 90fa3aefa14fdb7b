use std::path::PathBuf;

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can be wrong with the points or the options.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Too few or too many dimensions.
    #[error("points have dimension {found}, expected 1 to {max}")]
    Dimension {
        /// Dimension given.
        found: usize,
        /// The most there may be.
        max: usize,
    },
    /// Points that are too unlike to be added up.
    #[error(
        "points have norms from {least_norm} to values of {largest}, expected less far apart: the least are lost in sums"
    )]
    Spread {
        /// The largest |value|.
        largest: f32,
        /// The least norm.
        least_norm: f32,
    },
    /// A centroid to start from that holds NaN or infinity, or has a squared norm above 1e30.
    #[error("start {index} has squared norm {squared_norm}, expected at most 1e30")]
    Start {
        /// Index of the centroid.
        index: usize,
        /// The squared norm found.
        squared_norm: f32,
    },
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
    /// A point that holds NaN or infinity, is all zeros, or has a squared norm above 1e30.
    #[error("point {row} has squared norm {squared_norm}, expected one above 0 and at most 1e30")]
    Point {
        /// Row of the point.
        row: usize,
        /// The squared norm found.
        squared_norm: f32,
    },
    /// An order that is not one of all the points.
    #[error("an order of {found} points, expected each of {expected} rows once")]
    Order {
        /// Rows there are.
        expected: usize,
        /// Rows named.
        found: usize,
    },
    /// Reading points, or reading or writing the journal, failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of points that is cut short, or of another dimension.
    #[error("{}: {found} bytes, expected a multiple of {row_bytes}, the bytes of a point", path.display())]
    FileLength {
        /// The file.
        path: PathBuf,
        /// Bytes of a point.
        row_bytes: u64,
        /// Bytes found.
        found: u64,
    },
    /// A file that is not a `.npy` of rows of f32.
    #[error("{}: expected a .npy file of little-endian f32, two dimensions, C order, found {found}", path.display())]
    Npy {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        found: String,
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
