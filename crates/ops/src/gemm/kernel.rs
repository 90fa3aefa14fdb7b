//! The innermost loop of the matrix product: a tile of up to 8 × 32 elements over packed lanes.
//!
//! A lane is 32 bits: one f32, or two bf16 of consecutive inner positions (the first in the low half). Both
//! kinds therefore share one loop; only what multiplying two lanes means differs.

use std::sync::OnceLock;

use crate::Precision;

/// Rows of a tile.
pub(crate) const ROWS: usize = 8;

/// Columns of a tile, and of a panel of the right operand.
pub(crate) const COLUMNS: usize = 32;

/// One tile: `c [rows, 32]` = from + a `[rows, k]` · b `[k, 32]`.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    /// Inner lanes.
    pub(crate) k: usize,
    /// Lane (i, k) of the left operand is at `a + i·a_row + k·a_lane`.
    pub(crate) a: *const u32,
    pub(crate) a_row: usize,
    pub(crate) a_lane: usize,
    /// Lane (k, j) of the right operand is at `b + k·32 + j`.
    pub(crate) b: *const u32,
    /// Element (i, j) of the result is at `c + i·c_row + j`.
    pub(crate) c: *mut f32,
    pub(crate) c_row: usize,
    /// What is added to the product, element (i, j) at `from + i·from_row + j`; null is nothing.
    pub(crate) from: *const f32,
    pub(crate) from_row: usize,
}

/// Computes a tile of that many rows, 1 to 8.
///
/// # Safety
/// All addresses of the tile are valid, and the processor has the instructions of the kernel.
pub(crate) type Kernel = unsafe fn(&Tile, usize);

/// Instructions a kernel is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Instructions {
    /// Whatever the compiler makes of plain loops.
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// With `avx512_bf16` where the lanes are pairs of bf16.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Instructions {
    /// All that this processor runs, the fastest last.
    pub(super) fn available(precision: Precision) -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
        let mut all = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                all.push(Self::Avx2);
            }
            let has_pairs = is_x86_feature_detected!("avx512bf16") || precision == Precision::F32;
            if is_x86_feature_detected!("avx512f") && has_pairs {
                all.push(Self::Avx512);
            }
        }
        let _ = precision;
        all
    }

    /// The fastest kernel of this processor.
    pub(super) fn best(precision: Precision) -> Kernel {
        static BEST: [OnceLock<Kernel>; 2] = [OnceLock::new(), OnceLock::new()];
        let find = || Self::available(precision).last().unwrap_or(&Self::Portable).kernel(precision);
        *BEST[precision as usize].get_or_init(find)
    }

    pub(super) fn kernel(self, precision: Precision) -> Kernel {
        match (self, precision) {
            (Self::Portable, Precision::F32) => rows::<[f32; 8], F32, 2>,
            (Self::Portable, Precision::Bf16) => rows::<[f32; 8], PAIRS, 2>,
            #[cfg(target_arch = "x86_64")]
            (Self::Avx2, Precision::F32) => x86::avx2_f32,
            #[cfg(target_arch = "x86_64")]
            (Self::Avx2, Precision::Bf16) => x86::avx2_pairs,
            #[cfg(target_arch = "x86_64")]
            (Self::Avx512, Precision::F32) => x86::avx512_f32,
            #[cfg(target_arch = "x86_64")]
            (Self::Avx512, Precision::Bf16) => x86::avx512_pairs,
        }
    }
}

/// What a lane holds: one f32.
const F32: bool = false;

/// What a lane holds: two bf16.
const PAIRS: bool = true;

/// A vector register of sums.
pub(super) trait Register: Copy {
    /// Sums in a register.
    const WIDTH: usize;
    /// As many lanes.
    type Lanes: Copy;

    /// # Safety
    /// As all of these: the processor has the instructions, and addresses hold a whole register.
    unsafe fn zero() -> Self;
    /// # Safety
    /// As `zero`.
    unsafe fn load(from: *const u32) -> Self::Lanes;
    /// Lanes of f32, from bf16.
    /// # Safety
    /// As `zero`, of as many bf16.
    unsafe fn load_bf16(from: *const u16) -> Self::Lanes;
    /// Lanes of f32, from integers.
    /// # Safety
    /// As `zero`, of as many integers.
    unsafe fn load_int8(from: *const i8) -> Self::Lanes;
    /// One lane everywhere.
    /// # Safety
    /// As `zero`, of one lane.
    unsafe fn splat(from: *const u32) -> Self::Lanes;
    /// self + a · b of f32.
    /// # Safety
    /// As `zero`.
    unsafe fn add_product(self, a: Self::Lanes, b: Self::Lanes) -> Self;
    /// self + a₀ · b₀ + a₁ · b₁ of pairs of bf16.
    /// # Safety
    /// As `zero`.
    unsafe fn add_products_of_pairs(self, a: Self::Lanes, b: Self::Lanes) -> Self;
    /// # Safety
    /// As `zero`.
    unsafe fn add(self, from: *const f32) -> Self;
    /// # Safety
    /// As `zero`.
    unsafe fn store(self, to: *mut f32);
}

/// Registers of a row of a part.
pub(super) const N: usize = 2;

/// The tile in parts of `R` rows and two registers: as many sums as the processor has registers for.
///
/// # Safety
/// As [`Kernel`].
#[inline(always)]
unsafe fn rows<V: Register, const KIND: bool, const R: usize>(tile: &Tile, n_rows: usize) {
    let mut row = 0;
    while row < n_rows {
        for column in (0..COLUMNS).step_by(N * V::WIDTH) {
            // SAFETY: the caller's promise; rows and columns stay inside the tile.
            unsafe {
                match n_rows - row {
                    1 => part::<V, KIND, 1>(tile, row, column),
                    2 if R > 2 => part::<V, KIND, 2>(tile, row, column),
                    3 if R > 3 => part::<V, KIND, 3>(tile, row, column),
                    4 if R > 4 => part::<V, KIND, 4>(tile, row, column),
                    5 if R > 5 => part::<V, KIND, 5>(tile, row, column),
                    6 if R > 6 => part::<V, KIND, 6>(tile, row, column),
                    7 if R > 7 => part::<V, KIND, 7>(tile, row, column),
                    _ => part::<V, KIND, R>(tile, row, column),
                }
            }
        }
        row += R;
    }
}

/// Asks for the cache line of an address, which need not be valid.
#[inline(always)]
fn prefetch(address: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    let _ = address;
}

/// # Safety
/// As [`Kernel`].
#[inline(always)]
unsafe fn part<V: Register, const KIND: bool, const R: usize>(tile: &Tile, row: usize, column: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[V::zero(); N]; R];
        // What is needed after the sums.
        for i in 0..R {
            for column in [column, column + V::WIDTH] {
                prefetch(tile.c.add((row + i) * tile.c_row + column));
                if !tile.from.is_null() {
                    prefetch(tile.from.add((row + i) * tile.from_row + column));
                }
            }
        }
        let (mut a, mut b) = (tile.a.add(row * tile.a_row), tile.b.add(column));
        for _ in 0..tile.k {
            let right = [V::load(b), V::load(b.add(V::WIDTH))];
            for (i, sums) in sums.iter_mut().enumerate() {
                let left = V::splat(a.add(i * tile.a_row));
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = match KIND {
                        PAIRS => sum.add_products_of_pairs(left, right),
                        _ => sum.add_product(left, right),
                    };
                }
            }
            a = a.add(tile.a_lane);
            b = b.add(COLUMNS);
        }
        for (i, sums) in sums.into_iter().enumerate() {
            for (j, sum) in sums.into_iter().enumerate() {
                let column = column + j * V::WIDTH;
                let sum = match tile.from.is_null() {
                    true => sum,
                    false => sum.add(tile.from.add((row + i) * tile.from_row + column)),
                };
                sum.store(tile.c.add((row + i) * tile.c_row + column));
            }
        }
    }
}

// The bodies below are single instructions, whose addresses are the caller's promise; they are inlined into
// functions that enable the instructions.

#[allow(unsafe_op_in_unsafe_fn)]
impl Register for [f32; 8] {
    const WIDTH: usize = 8;
    type Lanes = [u32; 8];

    #[inline(always)]
    unsafe fn zero() -> Self {
        [0.0; 8]
    }
    #[inline(always)]
    unsafe fn load(from: *const u32) -> Self::Lanes {
        from.cast::<[u32; 8]>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self::Lanes {
        from.cast::<[u16; 8]>().read_unaligned().map(|bits| u32::from(bits) << 16)
    }
    #[inline(always)]
    unsafe fn load_int8(from: *const i8) -> Self::Lanes {
        from.cast::<[i8; 8]>().read_unaligned().map(|integer| f32::from(integer).to_bits())
    }
    #[inline(always)]
    unsafe fn splat(from: *const u32) -> Self::Lanes {
        [*from; 8]
    }
    #[inline(always)]
    unsafe fn add_product(mut self, a: Self::Lanes, b: Self::Lanes) -> Self {
        for i in 0..8 {
            self[i] += f32::from_bits(a[i]) * f32::from_bits(b[i]);
        }
        self
    }
    #[inline(always)]
    unsafe fn add_products_of_pairs(mut self, a: Self::Lanes, b: Self::Lanes) -> Self {
        let first = |lane: u32| f32::from_bits(lane << 16);
        let second = |lane: u32| f32::from_bits(lane & 0xffff_0000);
        for i in 0..8 {
            self[i] += first(a[i]) * first(b[i]) + second(a[i]) * second(b[i]);
        }
        self
    }
    #[inline(always)]
    unsafe fn add(mut self, from: *const f32) -> Self {
        let from = from.cast::<[f32; 8]>().read_unaligned();
        for i in 0..8 {
            self[i] += from[i];
        }
        self
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        to.cast::<[f32; 8]>().write_unaligned(self)
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_op_in_unsafe_fn)]
mod x86 {
    use std::arch::x86_64::*;

    use super::{F32, PAIRS, Register, Tile, rows};

    /// # Safety
    /// As [`super::Kernel`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2_f32(tile: &Tile, n_rows: usize) {
        rows::<__m256, F32, 4>(tile, n_rows)
    }

    /// # Safety
    /// As [`super::Kernel`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2_pairs(tile: &Tile, n_rows: usize) {
        rows::<__m256, PAIRS, 4>(tile, n_rows)
    }

    /// # Safety
    /// As [`super::Kernel`].
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512_f32(tile: &Tile, n_rows: usize) {
        rows::<__m512, F32, 8>(tile, n_rows)
    }

    /// # Safety
    /// As [`super::Kernel`].
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn avx512_pairs(tile: &Tile, n_rows: usize) {
        rows::<__m512, PAIRS, 8>(tile, n_rows)
    }

    impl Register for __m256 {
        const WIDTH: usize = 8;
        type Lanes = __m256i;

        #[inline(always)]
        unsafe fn zero() -> Self {
            _mm256_setzero_ps()
        }
        #[inline(always)]
        unsafe fn load(from: *const u32) -> Self::Lanes {
            _mm256_loadu_si256(from.cast())
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> Self::Lanes {
            _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())))
        }
        #[inline(always)]
        unsafe fn load_int8(from: *const i8) -> Self::Lanes {
            let integers = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()));
            _mm256_castps_si256(_mm256_cvtepi32_ps(integers))
        }
        #[inline(always)]
        unsafe fn splat(from: *const u32) -> Self::Lanes {
            _mm256_set1_epi32(*from.cast())
        }
        #[inline(always)]
        unsafe fn add_product(self, a: Self::Lanes, b: Self::Lanes) -> Self {
            _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), self)
        }
        #[inline(always)]
        unsafe fn add_products_of_pairs(self, a: Self::Lanes, b: Self::Lanes) -> Self {
            let high = _mm256_set1_epi32(0xffff_0000u32 as i32);
            let first = |x| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x));
            let second = |x| _mm256_castsi256_ps(_mm256_and_si256(x, high));
            _mm256_fmadd_ps(second(a), second(b), _mm256_fmadd_ps(first(a), first(b), self))
        }
        #[inline(always)]
        unsafe fn add(self, from: *const f32) -> Self {
            _mm256_add_ps(self, _mm256_loadu_ps(from))
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            _mm256_storeu_ps(to, self)
        }
    }

    impl Register for __m512 {
        const WIDTH: usize = 16;
        type Lanes = __m512i;

        #[inline(always)]
        unsafe fn zero() -> Self {
            _mm512_setzero_ps()
        }
        #[inline(always)]
        unsafe fn load(from: *const u32) -> Self::Lanes {
            _mm512_loadu_si512(from.cast())
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> Self::Lanes {
            _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())))
        }
        #[inline(always)]
        unsafe fn load_int8(from: *const i8) -> Self::Lanes {
            let integers = _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()));
            _mm512_castps_si512(_mm512_cvtepi32_ps(integers))
        }
        #[inline(always)]
        unsafe fn splat(from: *const u32) -> Self::Lanes {
            _mm512_set1_epi32(*from.cast())
        }
        #[inline(always)]
        unsafe fn add_product(self, a: Self::Lanes, b: Self::Lanes) -> Self {
            _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), self)
        }
        #[inline(always)]
        unsafe fn add_products_of_pairs(self, a: Self::Lanes, b: Self::Lanes) -> Self {
            let a = std::mem::transmute::<__m512i, __m512bh>(a);
            _mm512_dpbf16_ps(self, a, std::mem::transmute::<__m512i, __m512bh>(b))
        }
        #[inline(always)]
        unsafe fn add(self, from: *const f32) -> Self {
            _mm512_add_ps(self, _mm512_loadu_ps(from))
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            _mm512_storeu_ps(to, self)
        }
    }
}
