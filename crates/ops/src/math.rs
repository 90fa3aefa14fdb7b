//! Scalar functions written so that loops over them vectorise, and reductions in a fixed order.

/// eˣ to about 1e-7 relative: split into 2ⁿ (built in the exponent bits) and a degree-6 polynomial on
/// [−ln2/2, ln2/2] (Cody–Waite reduction). Arguments are clamped to [−87, 88].
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5·2²³ rounds to the nearest integer and leaves it in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let p = 0.001_394_f32;
    let p = p * r + 0.008_334_52;
    let p = p * r + 0.041_665_796;
    let p = p * r + 0.166_666_65;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    f32::from_bits((rounded.to_bits() << 23).wrapping_add(0x3f80_0000)) * p
}

/// 1 / (1 + e⁻ˣ)
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// tanh to about 1e-7 relative: an odd polynomial fitted to it below 0.6, and 1 − 2 / (1 + e^(2|x|)) beyond.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let t = x * x;
    let p = -0.005_905_843_f32;
    let p = p * t + 0.020_805_36;
    let p = p * t - 0.053_786_677;
    let p = p * t + 0.133_319_58;
    let p = p * t - 0.333_333;
    let near = x + x * (p * t);
    let far = (1.0 - 2.0 / (1.0 + exp(2.0 * x.abs()))).copysign(x);
    if t < 0.36 { near } else { far }
}

const LANES: usize = 32;

/// Σ a·b over 32 running sums, so that the order of additions never depends on the machine.
#[inline]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a_chunks, a_tail) = a.as_chunks::<LANES>();
    let (b_chunks, b_tail) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    lanes.iter().sum::<f32>() + a_tail.iter().zip(b_tail).map(|(a, b)| a * b).sum::<f32>()
}

/// The largest value; −∞ of nothing.
#[inline]
pub(crate) fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    lanes.iter().chain(tail).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Replaces each x by e^(x − shift) and returns their sum.
#[inline]
pub(crate) fn exp_sub_sum(x: &mut [f32], shift: f32) -> f32 {
    exp_of_differences(x, shift, 1.0)
}

/// Replaces each x by e^((x − shift)·factor) and returns their sum.
#[inline]
pub(crate) fn exp_of_differences(x: &mut [f32], shift: f32, factor: f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks, tail) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            chunk[i] = exp((chunk[i] - shift) * factor);
            lanes[i] += chunk[i];
        }
    }
    let mut sum = lanes.iter().sum::<f32>();
    for x in tail {
        *x = exp((*x - shift) * factor);
        sum += *x;
    }
    sum
}

/// Σ x over 32 running sums, as [`dot`].
#[inline]
pub(crate) fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += chunk[i];
        }
    }
    lanes.iter().sum::<f32>() + tail.iter().sum::<f32>()
}

/// Multiplies each element by `factor`.
#[inline]
pub(crate) fn scale(x: &mut [f32], factor: f32) {
    for x in x {
        *x *= factor;
    }
}

/// Replaces each x by cap·tanh(x·factor / cap): soft limits of scores and logits.
#[inline]
pub fn soft_cap(x: &mut [f32], factor: f32, cap: f32) {
    for x in x {
        *x = cap * tanh(*x * factor / cap);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_libm_one_over_its_range() {
        for i in -8_700_000..8_800_000i32 {
            if i % 13 != 0 {
                continue;
            }
            let x = i as f32 * 1e-5;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) - expected).abs() / expected;
            assert!(error < 3e-7, "exp({x}): relative error {error}");
        }
    }

    #[test]
    fn tanh_is_close_to_the_libm_one() {
        for i in -3_000_000..=3_000_000i32 {
            let x = i as f32 * 1e-5;
            let expected = f64::from(x).tanh();
            let error = (f64::from(tanh(x)) - expected).abs();
            assert!(error <= 2.5e-7 * expected.abs(), "tanh({x}): error {error}");
        }
    }

    #[test]
    fn reductions_handle_tails() {
        for n in [0, 1, 31, 32, 33, 100] {
            let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
            let expected: f64 = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
            assert!((f64::from(dot(&x, &x)) - expected).abs() < 1e-4);
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let mut y = x.clone();
            let expected: f64 = x.iter().map(|&v| (f64::from(v) - 0.5).exp()).sum();
            assert!((f64::from(exp_sub_sum(&mut y, 0.5)) - expected).abs() < 1e-4);
            let mut y = x.clone();
            let expected: f64 = x.iter().map(|&v| ((f64::from(v) - 0.5) * 3.0).exp()).sum();
            assert!((f64::from(exp_of_differences(&mut y, 0.5, 3.0)) - expected).abs() < 1e-4);
            let expected: f64 = x.iter().map(|&v| f64::from(v)).sum();
            assert!((f64::from(sum(&x)) - expected).abs() < 1e-5);
        }
    }
}
