use crate::distance::{LANES, add_up};

/// Dimensions are padded with zeros to a multiple of this, so that kernels have no rest.
const PAD: usize = 16;

/// The largest code.
const MAX_CODE: f32 = 127.0;

/// Adding this rounds a number below 2²² to an integer, whose two's complement is then in the low bits.
const ROUND: f32 = 12_582_912.0;

/// Differences from the origin below this are not coded: their squares would leave the range of f32.
const FLOOR: f32 = 1e-15;

/// More than rounding in f32 can add to a sum of `dim` terms as this crate adds them, relative to the sum of their
/// absolute values: each of 32 lanes adds dim / 32 of them, and the lanes are added one by one.
pub(crate) fn slack(dim: usize) -> f32 {
    4e-6 + dim as f32 * 4e-9
}

/// What is known of a coded vector v, coded as `scale`·q.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Coded {
    pub(crate) scale: f32,
    /// At least |v − scale·q|.
    pub(crate) error: f32,
    /// |v|
    pub(crate) norm: f32,
    /// |scale·q|²
    pub(crate) square: f32,
    /// Σ q
    pub(crate) sum: i32,
}

/// N vectors in codes of 8 bits.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Codes {
    dim: usize,
    values: Vec<i8>,   // [N, D padded]
    coded: Vec<Coded>, // [N]
}

pub(crate) fn padded(dim: usize) -> usize {
    dim.next_multiple_of(PAD)
}

impl Codes {
    /// No vectors yet, of `dim` dimensions, with room for `n`.
    pub fn with_capacity(n: usize, dim: usize) -> Self {
        Self { dim, values: Vec::with_capacity(n * padded(dim)), coded: Vec::with_capacity(n) }
    }

    /// Number of vectors N.
    pub fn len(&self) -> usize {
        self.coded.len()
    }

    /// Dimensions D.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.coded.is_empty()
    }

    /// Forgets the vectors, and keeps their room.
    pub fn clear(&mut self) {
        self.values.clear();
        self.coded.clear();
    }

    /// Adds `row` as seen from `origin`, both `[D]` and finite.
    pub fn push(&mut self, row: &[f32], origin: &[f32]) {
        let start = self.values.len();
        self.values.resize(start + padded(self.dim), 0);
        let coded = encode(row, origin, &mut self.values[start..]);
        self.coded.push(coded);
    }

    /// Adds a row of other codes of the same origin.
    pub fn push_row(&mut self, from: &Self, index: usize) {
        self.values.extend_from_slice(from.row(index));
        self.coded.push(from.coded[index]);
    }

    pub(crate) fn row(&self, index: usize) -> &[i8] {
        let width = padded(self.dim);
        &self.values[index * width..][..width]
    }

    pub(crate) fn coded(&self, index: usize) -> Coded {
        self.coded[index]
    }
}

/// Codes row − origin into `codes`, `[D padded]`.
pub(crate) fn encode(row: &[f32], origin: &[f32], codes: &mut [i8]) -> Coded {
    let largest = largest_difference(row, origin);
    if largest < FLOOR {
        codes.fill(0);
        let most = largest * (row.len() as f32).sqrt();
        return Coded { error: most, norm: most, ..Coded::default() };
    }
    let (scale, inverse) = (largest / MAX_CODE, MAX_CODE / largest);
    let (mut norms, mut errors) = ([0f32; LANES], [0f32; LANES]);
    let mut code = |x: f32, o: f32, code: &mut i8, lane: usize| {
        let v = x - o;
        let rounded = v * inverse + ROUND;
        *code = rounded.to_bits() as i8;
        let left = v - (rounded - ROUND) * scale;
        norms[lane] += v * v;
        errors[lane] += left * left;
    };
    let (rows, row_rest) = row.as_chunks::<LANES>();
    let (origins, origin_rest) = origin.as_chunks::<LANES>();
    for ((x, o), codes) in rows.iter().zip(origins).zip(codes.as_chunks_mut::<LANES>().0) {
        for lane in 0..LANES {
            code(x[lane], o[lane], &mut codes[lane], lane);
        }
    }
    let rest = rows.len() * LANES;
    for (lane, ((&x, &o), to)) in row_rest.iter().zip(origin_rest).zip(&mut codes[rest..]).enumerate() {
        code(x, o, to, lane);
    }
    let (mut sum, mut squares) = (0i32, 0i32);
    for &code in &*codes {
        sum += i32::from(code);
        squares += i32::from(code) * i32::from(code);
    }
    let norm = add_up(norms).sqrt();
    let error = add_up(errors).sqrt() * (1.0 + slack(row.len())) + norm * 1e-7;
    Coded { scale, error, norm, square: scale * scale * squares as f32, sum }
}

fn largest_difference(row: &[f32], origin: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (rows, row_rest) = row.as_chunks::<LANES>();
    let (origins, origin_rest) = origin.as_chunks::<LANES>();
    for (x, o) in rows.iter().zip(origins) {
        for lane in 0..LANES {
            let difference = (x[lane] - o[lane]).abs();
            lanes[lane] = if difference > lanes[lane] { difference } else { lanes[lane] };
        }
    }
    let rest = row_rest.iter().zip(origin_rest).map(|(x, o)| (x - o).abs());
    lanes.into_iter().chain(rest).fold(0.0, f32::max)
}
