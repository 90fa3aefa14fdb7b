//! Products of codes: rows of 8-bit integers with the 16 candidates of a panel.

/// Candidates side by side in a panel: one 32-bit sum each in a vector register of AVX-512.
pub(crate) const LANES: usize = 16;

/// Rows whose products with a panel are made together.
pub(crate) const ROWS: usize = 8;

/// Four dimensions of a panel: the codes of 16 candidates, plus 128, four dimensions of a candidate together.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct Quad(pub(crate) [[u8; 4]; LANES]);

/// Σ row · (panel) of R rows with all candidates of a panel; rows are `[4 · panel.len()]`.
pub(crate) fn products<const R: usize>(rows: [&[i8]; R], panel: &[Quad]) -> [[i32; LANES]; R] {
    let rows = rows.map(|row| row.as_chunks::<4>().0);
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has these instructions.
        return unsafe { vnni(rows, panel) };
    }
    portable(rows, panel)
}

/// The same for processors without instructions of their own for it.
fn portable<const R: usize>(rows: [&[[i8; 4]]; R], panel: &[Quad]) -> [[i32; LANES]; R] {
    let mut sums = [[0i32; LANES]; R];
    for (sums, row) in sums.iter_mut().zip(rows) {
        for (x, quad) in row.iter().zip(panel) {
            for (sum, codes) in sums.iter_mut().zip(&quad.0) {
                for (&x, &code) in x.iter().zip(codes) {
                    *sum += i32::from(x) * i32::from(code);
                }
            }
        }
    }
    sums
}

/// Two sums a row, for even and odd quads: enough at work at once to hide how long one takes.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn vnni<const R: usize>(rows: [&[[i8; 4]]; R], panel: &[Quad]) -> [[i32; LANES]; R] {
    use std::arch::x86_64::{
        __m512i, _mm512_add_epi32, _mm512_dpbusd_epi32, _mm512_set1_epi32, _mm512_setzero_si512,
    };
    let n_quads = rows.iter().map(|row| row.len()).fold(panel.len(), usize::min);
    let rows = rows.map(|row| &row[..n_quads]);
    let mut sums = [[_mm512_setzero_si512(); 2]; R];
    let step = |sum: __m512i, x: [i8; 4], quad: &Quad| {
        // SAFETY: both are 64 bytes without padding, and every bit pattern is a value of both.
        let codes: __m512i = unsafe { std::mem::transmute::<Quad, __m512i>(*quad) };
        let x = i32::from_le_bytes(x.map(|x| x as u8));
        _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(x))
    };
    let (pairs, last) = panel[..n_quads].as_chunks::<2>();
    for (i, [even, odd]) in pairs.iter().enumerate() {
        for r in 0..R {
            sums[r][0] = step(sums[r][0], rows[r][2 * i], even);
            sums[r][1] = step(sums[r][1], rows[r][2 * i + 1], odd);
        }
    }
    for quad in last {
        for r in 0..R {
            sums[r][0] = step(sums[r][0], rows[r][n_quads - 1], quad);
        }
    }
    sums.map(|[even, odd]| {
        // SAFETY: both are 64 bytes without padding, and every bit pattern is a value of both.
        unsafe { std::mem::transmute::<__m512i, [i32; LANES]>(_mm512_add_epi32(even, odd)) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    #[test]
    fn all_kernels_give_the_products_of_plain_integers() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        for n_quads in [1, 2, 3, 4, 7, 96] {
            let rows: Vec<Vec<i8>> =
                (0..ROWS).map(|_| (0..4 * n_quads).map(|_| rng.random_range(-127..=127)).collect()).collect();
            let panel: Vec<Quad> = (0..n_quads)
                .map(|_| Quad(std::array::from_fn(|_| std::array::from_fn(|_| rng.random_range(0..=255)))))
                .collect();
            let row: [&[i8]; ROWS] = std::array::from_fn(|r| &rows[r][..]);
            let found = products(row, &panel);
            assert_eq!(found, portable(row.map(|row| row.as_chunks::<4>().0), &panel));
            for (r, row) in rows.iter().enumerate() {
                for (lane, &found) in found[r].iter().enumerate() {
                    let code = |d: usize| i64::from(panel[d / 4].0[lane][d % 4]);
                    let sum: i64 = row.iter().enumerate().map(|(d, &x)| i64::from(x) * code(d)).sum();
                    assert_eq!(i64::from(found), sum, "{n_quads} quads, row {r}, lane {lane}");
                }
            }
            assert_eq!(products([row[3]], &panel)[0], found[3]);
        }
    }
}
