//! The matrix product of the `gemm` crate over checked views.

use gemm::Parallelism;

/// A read-only view of an f32 matrix: element (i, j) is `data[i·row + j·col]`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) row: usize,
    pub(crate) col: usize,
}

impl<'a> View<'a> {
    /// A row-major matrix with `row` elements between rows.
    pub(crate) fn rows(data: &'a [f32], row: usize) -> Self {
        Self { data, row, col: 1 }
    }

    /// The transpose of a row-major matrix with `row` elements between its rows.
    pub(crate) fn transposed(data: &'a [f32], row: usize) -> Self {
        Self { data, row: 1, col: row }
    }

    fn check(&self, m: usize, n: usize) {
        assert!((m - 1) * self.row + (n - 1) * self.col < self.data.len(), "matrix view out of bounds");
    }
}

/// What a product does with the destination.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// dst = a·b
    Overwrite,
    /// dst += a·b
    Add,
}

/// Whether a product uses the thread pool or only the calling thread (inside a parallel loop).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    One,
    All,
}

/// The sizes of a product: a [m, k] times b [k, n].
#[derive(Clone, Copy)]
pub(crate) struct Size {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
}

/// `dst [m, n]`, row-major with `dst_row` elements between rows, = or += a·b.
pub(crate) fn gemm(
    size: Size,
    (dst, dst_row): (&mut [f32], usize),
    a: View,
    b: View,
    into: Into,
    threads: Threads,
) {
    let Size { m, n, .. } = size;
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * dst_row + n <= dst.len(), "matrix product writes out of bounds");
    // SAFETY: the destination is checked above and uniquely borrowed.
    unsafe { gemm_raw(size, (dst.as_mut_ptr(), dst_row), a, b, into, threads) }
}

/// [`gemm`] into a destination that other tasks write elsewhere.
///
/// # Safety
/// Every element (i, j) of the destination is valid for writes, and for reads with [`Into::Add`], and no
/// other thread touches it meanwhile.
pub(crate) unsafe fn gemm_raw(
    Size { m, n, k }: Size,
    (dst, dst_row): (*mut f32, usize),
    a: View,
    b: View,
    into: Into,
    threads: Threads,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(k > 0, "matrix product over an empty inner dimension");
    a.check(m, k);
    b.check(k, n);
    let threads = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(rayon::current_num_threads()),
    };
    let (col, conjugate) = (1, false);
    // SAFETY: both operands are in bounds (checked above), the destination by the caller's promise.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst,
            col,
            dst_row as isize,
            into == Into::Add,
            a.data.as_ptr(),
            a.col as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.col as isize,
            b.row as isize,
            1.0f32,
            1.0f32,
            conjugate,
            conjugate,
            conjugate,
            threads,
        )
    }
}
