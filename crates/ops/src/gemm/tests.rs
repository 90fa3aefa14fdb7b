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

/// Numbers in the order of a held operand [k, n] whose element (k, j) is `number(k, j)`.
fn panels<T: Copy + Default + PartialEq + Send + Sync>(
    (k, n): (usize, usize),
    number: impl Fn(usize, usize) -> T,
) -> Vec<T> {
    let columns: Vec<T> = (0..k * n).map(|i| number(i / n, i % n)).collect();
    let rows: Vec<T> = (0..k * n).map(|i| number(i % k, i / k)).collect();
    let panels = panels_of_columns(&columns, (k, n));
    assert!(panels_of_rows(&rows, (k, n)) == panels, "{k} x {n} packed by rows and by columns");
    panels
}

/// Operands as they may be held, with the numbers that they then have.
fn held((k, n): (usize, usize)) -> Vec<(&'static str, Right, Vec<f32>)> {
    let exact = values(k * n, 3);
    let at = |k: usize, j: usize| exact[k * n + j];
    let integer = |k: usize, j: usize| (at(k, j) * 127.0) as i8;
    let of = |number: &dyn Fn(usize, usize) -> f32| (0..k * n).map(|i| number(i / n, i % n)).collect();
    let f32s = Right::pack(Precision::F32, View::rows(&exact, n), (k, n), Threads::One);
    let bf16s = Right::hold(Short::Bf16(panels((k, n), |k, j| bf16(at(k, j)) as u16)), (k, n));
    let int8s = Right::hold(Short::Int8(panels((k, n), integer)), (k, n));
    vec![
        ("f32", f32s, exact.clone()),
        ("bf16", bf16s, of(&|k, j| f32::from_bits(bf16(at(k, j)) << 16))),
        ("int8", int8s, of(&|k, j| f32::from(integer(k, j)))),
    ]
}

#[test]
fn few_rows_have_the_bits_of_many_however_the_right_operand_is_held() {
    for (k, n) in [(1, 1), (5, 31), (16, 200), (192, 64), (193, 130), (700, 129)] {
        for (name, right, numbers) in held((k, n)) {
            for stride in [k + 3, (k + 3).next_multiple_of(1024)] {
                let data = values(32 * stride, 4);
                let a = View::rows(&data, stride);
                for m in [1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 32] {
                    let base = values(m * n, 6);
                    for instructions in Instructions::available(Precision::F32) {
                        let (mut c, mut same) = (base.clone(), base.clone());
                        let to = |c: &mut [f32]| Output {
                            to: Shared::new(c),
                            offset: 0,
                            row: n,
                            from: Addend::Itself,
                        };
                        let (few, many) = (few::kernel(instructions), instructions.kernel(Precision::F32));
                        let buffers = &mut Buffers::default();
                        // SAFETY: the kernels are of those available, and both results are whole matrices.
                        unsafe {
                            few::multiply(few, (m, a), &right.all(), to(&mut c), buffers);
                            multiply_with(many, (m, a), &right.all(), to(&mut same), buffers);
                        }
                        let what = format!("{name} {instructions:?} {m} x {k} x {n}, rows {stride} apart");
                        assert_eq!(c, same, "{what}");
                        let element = |i: usize| -> f64 {
                            let product =
                                |l: usize| f64::from(at(a, i / n, l)) * f64::from(numbers[l * n + i % n]);
                            f64::from(base[i]) + (0..k).map(product).sum::<f64>()
                        };
                        let size = if name == "int8" { 127.0 } else { 1.0 };
                        let scaled: Vec<f32> = c.iter().map(|x| x / size).collect();
                        check(
                            &scaled,
                            &(0..m * n).map(|i| element(i) / f64::from(size)).collect::<Vec<_>>(),
                            k,
                            &what,
                        );
                    }
                }
            }
            let mut column = vec![0.0; k];
            right.column(n - 1, &mut column);
            assert_eq!(column, (0..k).map(|l| numbers[l * n + n - 1]).collect::<Vec<_>>(), "{name}");
        }
    }
}
