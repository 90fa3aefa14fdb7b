//! Every kernel that this processor runs against a product in f64, over odd sizes, offsets and strides.

use super::*;

fn values(n: usize, seed: usize) -> Vec<f32> {
    (0..n)
        .map(|i| (((i + 1) * (2 * seed + 1)) as f64 * 0.618_033_988_75).fract() as f32 * 2.0 - 1.0)
        .collect()
}

fn rounded(precision: Precision, x: f32) -> f64 {
    match precision {
        Precision::F32 => f64::from(x),
        Precision::Bf16 => f64::from(f32::from_bits(pack::bf16(x) << 16)),
    }
}

fn at(view: View, i: usize, j: usize) -> f32 {
    view.data[if view.transposed { j * view.stride + i } else { i * view.stride + j }]
}

#[derive(Clone, Copy)]
struct Case {
    size: Size,
    transposed: [bool; 2],
}

/// Operands with a few elements between the rows, and what the product must be.
fn operands(case: Case, precision: Precision) -> ([Vec<f32>; 2], [usize; 2], Vec<f64>) {
    let Size { m, n, k } = case.size;
    let stride =
        |(rows, columns): (usize, usize), transposed: bool| 3 + if transposed { rows } else { columns };
    let strides = [stride((m, k), case.transposed[0]), stride((k, n), case.transposed[1])];
    let data = [values((m + k) * strides[0], 1), values((k + n) * strides[1], 2)];
    let a = View { data: &data[0], stride: strides[0], transposed: case.transposed[0] };
    let b = View { data: &data[1], stride: strides[1], transposed: case.transposed[1] };
    let element = |i: usize| -> f64 {
        let (row, column) = (i / n, i % n);
        (0..k).map(|l| rounded(precision, at(a, row, l)) * rounded(precision, at(b, l, column))).sum()
    };
    let expected = (0..m * n).map(element).collect();
    (data, strides, expected)
}

fn sizes() -> impl Iterator<Item = Size> {
    let sizes = [(1, 1, 1), (7, 31, 5), (8, 32, 16), (9, 33, 17), (20, 70, 513), (130, 40, 1100), (67, 8, 2)];
    sizes.into_iter().map(|(m, n, k)| Size { m, n, k })
}

fn cases() -> impl Iterator<Item = Case> {
    sizes().flat_map(|size| {
        [[false, false], [false, true], [true, false], [true, true]]
            .into_iter()
            .map(move |transposed| Case { size, transposed })
    })
}

fn check(found: &[f32], expected: &[f64], k: usize, what: &str) {
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(
            error < 4e-7 * (k as f64).sqrt() * 4.0 + 1e-6,
            "{what}: element {i}: {found} against {expected}"
        );
    }
}

#[test]
fn every_kernel_agrees_with_f64() {
    for precision in [Precision::F32, Precision::Bf16] {
        for instructions in Instructions::available(precision) {
            for case in cases() {
                let Size { m, n, k } = case.size;
                let (data, strides, expected) = operands(case, precision);
                let a = View { data: &data[0], stride: strides[0], transposed: case.transposed[0] };
                let b = View { data: &data[1], stride: strides[1], transposed: case.transposed[1] };
                let right = Right::pack(precision, b, (k, n), Threads::One);
                let base = values(m * n, 5);
                let mut base_copy = base.clone();
                let what = format!("{precision:?} {instructions:?} {:?} {:?}", case.size, case.transposed);
                for from in 0..3 {
                    let mut c = vec![0.5f32; m * n];
                    let other = Addend::Other { values: Shared::new(&mut base_copy), offset: 0, row: n };
                    let (from, added) = match from {
                        0 => (Addend::Zero, vec![0.0; m * n]),
                        1 => (Addend::Itself, c.clone()),
                        _ => (other, base.clone()),
                    };
                    let output = Output { to: Shared::new(&mut c), offset: 0, row: n, from };
                    let kernel = instructions.kernel(precision);
                    // SAFETY: the kernel is one of those available, and c and the base are whole matrices.
                    unsafe { multiply_with(kernel, (m, a), &right.all(), output, &mut Buffers::default()) };
                    let expected: Vec<f64> =
                        expected.iter().zip(added).map(|(x, added)| x + f64::from(added)).collect();
                    check(&c, &expected, k, &what);
                }
            }
        }
    }
}

#[test]
fn threads_and_few_rows_change_nothing_but_rounding() {
    for case in cases() {
        let Size { m, n, k } = case.size;
        let (data, strides, expected) = operands(case, Precision::F32);
        let a = View { data: &data[0], stride: strides[0], transposed: case.transposed[0] };
        let b = View { data: &data[1], stride: strides[1], transposed: case.transposed[1] };
        let product = |threads: Threads| {
            let mut c = vec![1f32; m * n];
            gemm(Precision::F32, case.size, (&mut c, n), (a, b), (Write::Add, threads));
            c
        };
        let (one, all) = (product(Threads::One), product(Threads::All));
        assert_eq!(one, all, "the same to the bit on any number of threads");
        let expected: Vec<f64> = expected.iter().map(|x| x + 1.0).collect();
        check(&one, &expected, k, &format!("{:?} {:?}", case.size, case.transposed));
    }
}

#[test]
fn a_part_of_a_packed_operand() {
    for precision in [Precision::F32, Precision::Bf16] {
        let case = Case { size: Size { m: 9, n: 100, k: 40 }, transposed: [false, true] };
        let (data, strides, _) = operands(case, precision);
        let a = View::rows(&data[0], strides[0]);
        let b = View::transposed(&data[1], strides[1]);
        let right = Right::pack(precision, b, (40, 100), Threads::One);
        let (inner, columns) = (6..33, 32..90);
        let mut c = vec![0f32; 9 * columns.len()];
        let output = Output { to: Shared::new(&mut c), offset: 0, row: columns.len(), from: Addend::Zero };
        let left = View::rows(&data[0][inner.start..], strides[0]);
        // SAFETY: c holds the whole product.
        unsafe { multiply((9, left), right.part(inner.clone(), columns.clone()), output) };
        let element = |i: usize| -> f64 {
            let (row, column) = (i / columns.len(), columns.start + i % columns.len());
            inner
                .clone()
                .map(|l| rounded(precision, at(a, row, l)) * rounded(precision, at(b, l, column)))
                .sum()
        };
        let expected: Vec<f64> = (0..c.len()).map(element).collect();
        check(&c, &expected, 40, "part");
    }
}
