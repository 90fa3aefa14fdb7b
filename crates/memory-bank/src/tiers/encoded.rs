use std::fmt;
use std::sync::Arc;

use half::bf16;
use multiversion::multiversion;
use serde::{Deserialize, Serialize};

use crate::{Block, BlockSpec, Error, Result};

/// How a cache holds the numbers of a block.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlockDtype {
    /// Single precision: 4 bytes a number, exact.
    #[default]
    F32,
    /// The upper half of single precision, rounded to nearest even: 2 bytes a number.
    Bf16,
    /// One byte a number and one f32 scale for each row of [`BlockSpec::row_len`] of them.
    Int8,
}

impl BlockDtype {
    /// Bytes of one encoded block of a level.
    ///
    /// # Panics
    /// If `level >= n_levels`, as a slice does.
    pub fn block_bytes(self, spec: &BlockSpec, level: usize) -> u64 {
        let len = spec.block_len(level) as u64;
        match self {
            Self::F32 => 4 * len,
            Self::Bf16 => 2 * len,
            Self::Int8 => len + 4 * (len / spec.row_len() as u64),
        }
    }
}

impl fmt::Display for BlockDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        })
    }
}

/// The numbers of one block as a cache holds them, in the order of [`Block::values`].
#[derive(Clone, PartialEq, Debug)]
pub enum Encoded {
    /// As they came.
    F32(Vec<f32>),
    /// Rounded to nearest even.
    Bf16(Vec<bf16>),
    /// A number is its row's scale times its integer.
    Int8 {
        /// Of each row of [`BlockSpec::row_len`] numbers: the largest magnitude over 127; 0 of a row of zeros.
        scales: Vec<f32>,
        /// From −127 to 127.
        values: Vec<i8>,
    },
}

/// The largest magnitude that does not round to infinity in bf16. It is far beyond any weight, so
/// int8 has no limit of its own.
const LIMIT: f32 = f32::from_bits(0x7f7f_7fff);

impl Encoded {
    /// Encodes a block whose rows have `row_len` numbers. f32 take any number; the others fail on one
    /// that is not finite or that rounds to infinity in bf16.
    pub fn encode(dtype: BlockDtype, row_len: usize, block: &Block) -> Result<Self> {
        let (id, from) = (block.id, block.values.as_slice());
        if dtype == BlockDtype::F32 {
            return Ok(Self::F32(from.to_vec()));
        }
        if largest(from) > LIMIT.to_bits() {
            let position = from.iter().position(|x| x.to_bits() & !SIGN > LIMIT.to_bits()).unwrap_or(0);
            return Err(Error::Encode { id, position, value: from[position], dtype, limit: LIMIT });
        }
        if dtype == BlockDtype::Bf16 {
            let mut values = vec![bf16::ZERO; from.len()];
            round(from, &mut values);
            return Ok(Self::Bf16(values));
        }
        let mut values = vec![0; from.len()];
        let quantised = from.chunks(row_len).zip(values.chunks_mut(row_len)).map(|(from, to)| {
            let scale = scale(f32::from_bits(largest(from)));
            if scale > 0.0 {
                quantise(from, scale, to);
            }
            scale
        });
        Ok(Self::Int8 { scales: quantised.collect(), values })
    }

    /// The numbers again. They are the same on every processor.
    pub fn decode(&self) -> Vec<f32> {
        let mut to = vec![0.0; self.len()];
        match self {
            Self::F32(values) => to.copy_from_slice(values),
            Self::Bf16(values) => widen(values, &mut to),
            Self::Int8 { scales, values } if !values.is_empty() => {
                let row_len = values.len() / scales.len();
                let rows = values.chunks(row_len).zip(to.chunks_mut(row_len));
                rows.zip(scales).for_each(|((from, to), &scale)| multiply(from, scale, to));
            }
            Self::Int8 { .. } => {}
        }
        to
    }

    /// As [`Encoded::decode`], without a copy where f32 are held by nobody else.
    pub fn into_values(shared: Arc<Self>) -> Vec<f32> {
        match Arc::try_unwrap(shared) {
            Ok(Self::F32(values)) => values,
            Ok(other) => other.decode(),
            Err(shared) => shared.decode(),
        }
    }

    /// How many numbers these are.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::Int8 { values, .. } => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that they take.
    pub fn bytes(&self) -> u64 {
        self.parts().iter().map(|part| part.len() as u64).sum()
    }

    /// A block to read bytes into.
    pub(crate) fn zeros(dtype: BlockDtype, row_len: usize, len: usize) -> Self {
        match dtype {
            BlockDtype::F32 => Self::F32(vec![0.0; len]),
            BlockDtype::Bf16 => Self::Bf16(vec![bf16::ZERO; len]),
            BlockDtype::Int8 => Self::Int8 { scales: vec![0.0; len / row_len], values: vec![0; len] },
        }
    }

    /// How the numbers are held.
    pub fn dtype(&self) -> BlockDtype {
        match self {
            Self::F32(_) => BlockDtype::F32,
            Self::Bf16(_) => BlockDtype::Bf16,
            Self::Int8 { .. } => BlockDtype::Int8,
        }
    }

    /// The same numbers held as `dtype`, in rows of `row_len`: shared where they are already.
    ///
    /// # Errors
    /// As [`Encoded::encode`].
    pub fn held_as(
        self: &Arc<Self>,
        dtype: BlockDtype,
        row_len: usize,
        id: cluster_tree::ClusterId,
    ) -> Result<Arc<Self>> {
        match self.dtype() == dtype {
            true => Ok(Arc::clone(self)),
            false => Ok(Arc::new(Self::encode(dtype, row_len, &Block { id, values: self.decode() })?)),
        }
    }

    /// Its bytes, in the order in which they are stored and sent: of int8 the scales, then the integers.
    pub fn parts(&self) -> [&[u8]; 2] {
        match self {
            Self::F32(values) => [bytemuck::cast_slice(values), &[]],
            Self::Bf16(values) => [bytemuck::cast_slice(values), &[]],
            Self::Int8 { scales, values } => [bytemuck::cast_slice(scales), bytemuck::cast_slice(values)],
        }
    }

    pub(crate) fn parts_mut(&mut self) -> [&mut [u8]; 2] {
        match self {
            Self::F32(values) => [bytemuck::cast_slice_mut(values), &mut []],
            Self::Bf16(values) => [bytemuck::cast_slice_mut(values), &mut []],
            Self::Int8 { scales, values } => {
                [bytemuck::cast_slice_mut(scales), bytemuck::cast_slice_mut(values)]
            }
        }
    }
}

/// What encoding has lost, summed over blocks.
#[derive(Copy, Clone, Default, Debug)]
pub(crate) struct ErrorSums {
    pub(crate) max_abs: f64,
    squared_errors: f64,
    squares: f64,
}

impl ErrorSums {
    /// What is lost of a block.
    pub(crate) fn of(exact: &[f32], encoded: &Encoded) -> Self {
        let mut lanes = [[0.0; LANES]; 3];
        add_errors(exact, &encoded.decode(), &mut lanes);
        let [max_abs, squared_errors, squares] = lanes;
        Self {
            max_abs: max_abs.into_iter().fold(0.0, f64::max),
            squared_errors: squared_errors.iter().sum(),
            squares: squares.iter().sum(),
        }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.max_abs = self.max_abs.max(other.max_abs);
        self.squared_errors += other.squared_errors;
        self.squares += other.squares;
    }

    /// The norm of all errors over the norm of what was encoded; 0 when that is 0.
    pub(crate) fn relative_rms(&self) -> f64 {
        if self.squares > 0.0 { (self.squared_errors / self.squares).sqrt() } else { 0.0 }
    }
}

const SIGN: u32 = 1 << 31;

/// The largest magnitude, as bits: those of infinity and NaN are above every number's, and integers
/// vectorise where a comparison that minds NaN does not.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2"))]
fn largest(values: &[f32]) -> u32 {
    values.iter().map(|value| value.to_bits() & !SIGN).fold(0, u32::max)
}

/// A scale below the normal numbers would itself be so coarse that a row did not fit 127 of it.
fn scale(largest: f32) -> f32 {
    if largest == 0.0 { 0.0 } else { (largest / 127.0).max(f32::MIN_POSITIVE) }
}

/// Adding 1.5·2²³ leaves no bits for a fraction, so the sum rounds to nearest even, and its low bits
/// are the integer.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2"))]
fn quantise(from: &[f32], scale: f32, to: &mut [i8]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = (from / scale + 12_582_912.0).to_bits() as i8);
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2"))]
fn multiply(from: &[i8], scale: f32, to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, &from)| *to = f32::from(from) * scale);
}

/// Of finite numbers: half of the last bit kept, less one when that bit is even, carries into it.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2"))]
fn round(from: &[f32], to: &mut [bf16]) {
    for (to, from) in to.iter_mut().zip(from) {
        let bits = from.to_bits();
        *to = bf16::from_bits(((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2"))]
fn widen(from: &[bf16], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = f32::from_bits(u32::from(from.to_bits()) << 16));
}

/// Partial sums, which the compiler keeps in vector registers.
const LANES: usize = 16;

/// Of `|error|` the largest, of its square and of the exact square the sums.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2"))]
fn add_errors(exact: &[f32], rounded: &[f32], sums: &mut [[f64; LANES]; 3]) {
    let [mut max_abs, mut squared_errors, mut squares] = *sums;
    for (exact, rounded) in exact.chunks(LANES).zip(rounded.chunks(LANES)) {
        for (lane, (&exact, &rounded)) in exact.iter().zip(rounded).enumerate() {
            let (exact, error) = (f64::from(exact), f64::from(exact) - f64::from(rounded));
            max_abs[lane] = if error.abs() > max_abs[lane] { error.abs() } else { max_abs[lane] };
            squared_errors[lane] += error * error;
            squares[lane] += exact * exact;
        }
    }
    *sums = [max_abs, squared_errors, squares];
}
