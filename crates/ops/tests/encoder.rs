//! The layers of an encoder against references in f64 over odd sizes, and that rows do not depend on their
//! neighbours.

use ops::{Dense, LayerNorm, SelfAttention};

/// Values that repeat on every machine: a low-discrepancy sequence in (−scale, scale).
fn values(n: usize, seed: usize, scale: f64) -> Vec<f32> {
    let value = |i: usize| (((i + 1) * (2 * seed + 1)) as f64 * 0.618_033_988_75).fract() * 2.0 - 1.0;
    (0..n).map(|i| (value(i) * scale) as f32).collect()
}

fn assert_near(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (&found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(error < tolerance, "{what}: element {i} is {found}, expected {expected}");
    }
}

#[test]
fn dense_is_a_product_and_a_bias() {
    for (n, inputs, outputs) in [(1, 5, 3), (3, 33, 70), (8, 32, 32), (67, 200, 45), (130, 1, 1)] {
        let (x, w) = (values(n * inputs, 1, 1.0), values(outputs * inputs, 2, 0.5));
        let bias = values(outputs, 3, 2.0);
        let mut expected = vec![];
        for x in x.chunks_exact(inputs) {
            for (w, bias) in w.chunks_exact(inputs).zip(&bias) {
                let product: f64 = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                expected.push(product + f64::from(*bias));
            }
        }
        let mut y = vec![f32::NAN; n * outputs];
        Dense::new(&w, bias).forward(&x, &mut y);
        assert_near(&y, &expected, 2e-5, &format!("{n} x {inputs} to {outputs}"));
    }
}

#[test]
fn layer_norm_adds_the_residual_first() {
    for (n, d) in [(1, 1), (3, 5), (5, 64), (2, 131)] {
        let (x, residual) = (values(n * d, 1, 2.0), values(n * d, 2, 3.0));
        let (gain, bias) = (values(d, 3, 1.5), values(d, 4, 1.0));
        let eps = 0.01;
        let mut expected = vec![];
        for (x, residual) in x.chunks_exact(d).zip(residual.chunks_exact(d)) {
            let x: Vec<f64> = x.iter().zip(residual).map(|(&x, &r)| f64::from(x) + f64::from(r)).collect();
            let mean = x.iter().sum::<f64>() / d as f64;
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / d as f64;
            let norm = |x: f64| (x - mean) / (variance + f64::from(eps)).sqrt();
            expected.extend(
                x.iter().zip(&gain).zip(&bias).map(|((&x, &g), &b)| norm(x) * f64::from(g) + f64::from(b)),
            );
        }
        let mut y = x;
        LayerNorm::new(gain, bias, eps).forward(&mut y, &residual);
        assert_near(&y, &expected, 1e-5, &format!("{n} x {d}"));
    }
}

/// Attention of one sequence in f64, [length, heads · width].
fn reference(qkv: &[f32], (heads, width): (usize, usize)) -> Vec<f64> {
    let d = heads * width;
    let rows: Vec<&[f32]> = qkv.chunks_exact(3 * d).collect();
    let part = |row: usize, part: usize, head: usize| {
        rows[row][part * d + head * width..][..width].iter().map(|&x| f64::from(x))
    };
    let mut y = vec![0f64; rows.len() * d];
    for i in 0..rows.len() {
        for head in 0..heads {
            let score = |j| part(i, 0, head).zip(part(j, 1, head)).map(|(q, k)| q * k).sum::<f64>();
            let weights: Vec<f64> =
                (0..rows.len()).map(|j| (score(j) / (width as f64).sqrt()).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (j, weight) in weights.iter().enumerate() {
                let y = &mut y[i * d + head * width..][..width];
                y.iter_mut().zip(part(j, 2, head)).for_each(|(y, v)| *y += weight / total * v);
            }
        }
    }
    y
}

#[test]
fn attention_stays_within_sequences_whatever_lies_beside_them() {
    for (heads, width) in [(1, 1), (3, 12), (2, 32), (1, 40)] {
        let d = heads * width;
        // More than a tile of queries and a pass of inner positions, an odd rest, one row, and none.
        let lengths = [7, 1, 0, 64, 201, 33];
        let qkv = values(lengths.iter().sum::<usize>() * 3 * d, 5, 2.0);
        let mut attention = SelfAttention::new(heads, width);
        let mut y = vec![f32::NAN; qkv.len() / 3];
        attention.forward(&qkv, &lengths, &mut y);
        let mut first = 0;
        for length in lengths {
            let alone = &qkv[first * 3 * d..][..length * 3 * d];
            let found = &y[first * d..][..length * d];
            let what = format!("{heads} heads of {width}, length {length}");
            assert_near(found, &reference(alone, (heads, width)), 1e-5, &what);
            let mut y = vec![f32::NAN; length * d];
            SelfAttention::new(heads, width).forward(alone, &[length], &mut y);
            assert_eq!(y, found, "{what}: other bits alone");
            first += length;
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_batch() {
    let (n, inputs, outputs) = (70, 250, 37);
    let x = values(n * inputs, 1, 1.0);
    let dense = Dense::new(&values(outputs * inputs, 2, 1.0), values(outputs, 3, 1.0));
    let mut all = vec![0f32; n * outputs];
    dense.forward(&x, &mut all);
    for (first, last) in [(0, 1), (3, 70), (69, 70), (8, 13)] {
        let mut some = vec![0f32; (last - first) * outputs];
        dense.forward(&x[first * inputs..last * inputs], &mut some);
        assert_eq!(some, all[first * outputs..last * outputs], "rows {first} to {last}");
    }
}
