//! Where the points are: in memory, or in a file that is read piece by piece.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::sums::Grid;
use crate::{Error, Result};

/// Rows that one task of a pass over all points reads.
const CHUNK_ROWS: usize = 2048;

/// The part of the least norm that rounding may take of a point when points are added up.
const LOST: f64 = 1e-3;

/// What a `.npy` file begins with.
const NPY_MAGIC: &[u8] = b"\x93NUMPY";

/// N points of D dimensions, by index.
pub trait Rows: Sync {
    /// Number of points N.
    fn len(&self) -> usize;

    /// Dimension D.
    fn dim(&self) -> usize;

    /// All values, `[N, D]`, if they are in memory.
    fn in_memory(&self) -> Option<&[f32]>;

    /// Reads the rows of `indices` into `to`, `[indices.len(), D]`.
    ///
    /// # Errors
    /// When reading fails.
    fn read(&self, indices: &[u32], to: &mut [f32]) -> Result<()>;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Points that are in memory, `[N, D]` row-major.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    values: &'a [f32],
    dim: usize,
}

impl<'a> Matrix<'a> {
    /// # Errors
    /// On a dimension of 0, and on values that are not rows of it.
    pub fn new(values: &'a [f32], dim: usize) -> Result<Self> {
        check_dim(dim)?;
        if !values.len().is_multiple_of(dim) {
            return Err(Error::Length { values: values.len(), dim });
        }
        Ok(Self { values, dim })
    }

    pub(crate) fn row(&self, index: u32) -> &'a [f32] {
        &self.values[index as usize * self.dim..][..self.dim]
    }
}

impl Rows for Matrix<'_> {
    fn len(&self) -> usize {
        self.values.len() / self.dim
    }

    fn dim(&self) -> usize {
        self.dim
    }

    fn in_memory(&self) -> Option<&[f32]> {
        Some(self.values)
    }

    fn read(&self, indices: &[u32], to: &mut [f32]) -> Result<()> {
        for (&index, to) in indices.iter().zip(to.chunks_exact_mut(self.dim)) {
            to.copy_from_slice(self.row(index));
        }
        Ok(())
    }
}

/// Points in a file of little-endian f32, `[N, D]` row-major. They are read when they are needed
/// and not kept: what a build holds in memory does not depend on N × D.
pub struct RowFile {
    file: File,
    path: PathBuf,
    /// Where the first row begins.
    start: u64,
    n: usize,
    dim: usize,
}

impl RowFile {
    /// # Errors
    /// When the file cannot be opened, or its size is not that of rows of `dim` numbers.
    pub fn open(path: &Path, dim: usize) -> Result<Self> {
        let io = |source| Error::Io { path: path.into(), source };
        let file = File::open(path).map_err(io)?;
        let bytes = file.metadata().map_err(io)?.len();
        check_dim(dim)?;
        let row_bytes = dim as u64 * 4;
        if !bytes.is_multiple_of(row_bytes) {
            return Err(Error::FileLength { path: path.into(), row_bytes, found: bytes });
        }
        Ok(Self { file, path: path.into(), start: 0, n: (bytes / row_bytes) as usize, dim })
    }

    /// Whether a file begins as a `.npy` file does.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn is_npy(path: &Path) -> Result<bool> {
        let io = |source| Error::Io { path: path.into(), source };
        let mut start = vec![];
        File::open(path).map_err(io)?.take(6).read_to_end(&mut start).map_err(io)?;
        Ok(start == NPY_MAGIC)
    }

    /// Opens a `.npy` file (NumPy format, versions 1 to 3) of little-endian f32, C order, two dimensions.
    ///
    /// # Errors
    /// When the file cannot be opened, is of another format, type, order or shape, or is cut short.
    pub fn open_npy(path: &Path) -> Result<Self> {
        let io = |source| Error::Io { path: path.into(), source };
        let wrong = |found: String| Error::Npy { path: path.into(), found };
        let mut file = File::open(path).map_err(io)?;
        let mut start = [0u8; 8];
        file.read_exact(&mut start).map_err(io)?;
        let (magic, version) = (&start[..6], start[6]);
        if magic != NPY_MAGIC || !(1..=3).contains(&version) {
            return Err(wrong(format!("a file that begins with {start:?}")));
        }
        // The header's length: two bytes in version 1, four since.
        let mut length = [0u8; 4];
        let n_length = if version == 1 { 2 } else { 4 };
        file.read_exact(&mut length[..n_length]).map_err(io)?;
        let header_bytes = u64::from(u32::from_le_bytes(length));
        let mut header = String::new();
        file.by_ref().take(header_bytes).read_to_string(&mut header).map_err(io)?;
        let Some((n, dim)) = npy_shape(&header) else { return Err(wrong(header.trim().to_owned())) };
        check_dim(dim)?;
        let start = 8 + n_length as u64 + header_bytes;
        let (bytes, expected) =
            (file.metadata().map_err(io)?.len(), start as u128 + n as u128 * dim as u128 * 4);
        if u128::from(bytes) != expected {
            return Err(wrong(format!("{bytes} bytes where {n} rows of {dim} end at {expected}")));
        }
        Ok(Self { file, path: path.into(), start, n, dim })
    }

    fn read_run(&self, first: u32, to: &mut [f32]) -> Result<()> {
        let at = self.start + u64::from(first) * self.dim as u64 * 4;
        let io = |source| Error::Io { path: self.path.clone(), source };
        self.file.read_exact_at(bytemuck::cast_slice_mut(to), at).map_err(io)?;
        if cfg!(target_endian = "big") {
            to.iter_mut().for_each(|value| *value = f32::from_bits(value.to_bits().swap_bytes()));
        }
        Ok(())
    }
}

impl Rows for RowFile {
    fn len(&self) -> usize {
        self.n
    }

    fn dim(&self) -> usize {
        self.dim
    }

    fn in_memory(&self) -> Option<&[f32]> {
        None
    }

    fn read(&self, indices: &[u32], to: &mut [f32]) -> Result<()> {
        let mut done = 0;
        for run in indices.chunk_by(|&a, &b| a.checked_add(1) == Some(b)) {
            self.read_run(run[0], &mut to[done * self.dim..][..run.len() * self.dim])?;
            done += run.len();
        }
        Ok(())
    }
}

fn check_dim(dim: usize) -> Result<()> {
    match dim {
        1..=nearest::MAX_DIM => Ok(()),
        found => Err(Error::Dimension { found, max: nearest::MAX_DIM }),
    }
}

/// The shape in the header of a `.npy` file: none if it is not of rows of little-endian f32.
fn npy_shape(header: &str) -> Option<(usize, usize)> {
    let value = |key: &str| Some(header.split_once(&format!("'{key}':"))?.1.trim_start());
    let is_plain = value("descr")?.starts_with("'<f4'") && value("fortran_order")?.starts_with("False");
    let (shape, _) = value("shape")?.strip_prefix('(')?.split_once(')')?;
    let mut sizes = shape.split(',').map(|size| size.trim().parse().ok());
    let shape = (sizes.next()??, sizes.next()??);
    (is_plain && sizes.next().is_none()).then_some(shape)
}

/// Some of the points, in memory: by position, not by index.
pub(crate) enum Chunk<'a> {
    Whole { matrix: Matrix<'a>, members: &'a [u32] },
    Copied(Matrix<'a>),
}

impl<'a> Chunk<'a> {
    /// The points `members` of `rows`, copied to `buffer` if they are not in memory.
    pub(crate) fn of(rows: &'a dyn Rows, members: &'a [u32], buffer: &'a mut Vec<f32>) -> Result<Self> {
        let dim = rows.dim();
        if let Some(values) = rows.in_memory() {
            return Ok(Self::Whole { matrix: Matrix { values, dim }, members });
        }
        buffer.resize(members.len() * dim, 0.0);
        rows.read(members, buffer)?;
        Ok(Self::Copied(Matrix { values: buffer, dim }))
    }

    pub(crate) fn row(&self, position: usize) -> &'a [f32] {
        match self {
            Self::Whole { matrix, members } => matrix.row(members[position]),
            Self::Copied(matrix) => matrix.row(position as u32),
        }
    }
}

/// Number of points N. Fails on none, and on more than indices can name.
pub(crate) fn count(rows: &dyn Rows) -> Result<usize> {
    let n = rows.len();
    if n == 0 || n >= u32::MAX as usize {
        return Err(Error::PointCount { found: n, max: u32::MAX - 1 });
    }
    Ok(n)
}

/// The squared norm of point `index`. Fails on a value that is not finite or too large, and on a point of zeros, which
/// has no direction.
pub(crate) fn check_row(index: usize, row: &[f32]) -> Result<f32> {
    let squared_norm: f32 = row.chunks(64).map(|x| x.iter().map(|x| x * x).sum::<f32>()).sum();
    if !(squared_norm > 0.0 && squared_norm <= nearest::MAX_SQUARED_NORM) {
        return Err(Error::Point { row: index, squared_norm });
    }
    Ok(squared_norm)
}

/// The largest |value| of all points. Fails as [`count`] and [`check_row`]; of several points at fault it names the
/// first. Fails too on norms so far apart that the least would be lost in sums.
pub(crate) fn check(rows: &dyn Rows) -> Result<f32> {
    let n = count(rows)?;
    let of_chunk = |first: usize| -> Result<(f32, f32)> {
        let members: Vec<u32> = (first as u32..n.min(first + CHUNK_ROWS) as u32).collect();
        let mut buffer = vec![];
        let chunk = Chunk::of(rows, &members, &mut buffer)?;
        let (mut largest, mut least_norm) = (0f32, f32::INFINITY);
        for position in 0..members.len() {
            let row = chunk.row(position);
            least_norm = least_norm.min(check_row(first + position, row)?.sqrt());
            largest = row.iter().fold(largest, |largest, x| largest.max(x.abs()));
        }
        Ok((largest, least_norm))
    };
    let firsts: Vec<usize> = (0..n).step_by(CHUNK_ROWS).collect();
    let found: Vec<Result<(f32, f32)>> = firsts.into_par_iter().map(of_chunk).collect();
    let (mut largest, mut least_norm) = (0f32, f32::INFINITY);
    for found in found {
        let found = found?;
        (largest, least_norm) = (largest.max(found.0), least_norm.min(found.1));
    }
    let step = Grid::new(n, largest).step();
    if step * (rows.dim() as f64).sqrt() > LOST * f64::from(least_norm) {
        return Err(Error::Spread { largest, least_norm });
    }
    Ok(largest)
}
