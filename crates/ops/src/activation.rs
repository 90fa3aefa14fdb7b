//! What is applied to the inner layer of an FFN, or to the half of it that gates the other.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use crate::math::{exp, sigmoid};

/// What is applied to the inner layer of an FFN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// x·sigmoid(x)
    #[default]
    Silu,
    /// x·Φ(x), Φ being the normal distribution function.
    Gelu,
    /// Its older approximation by tanh.
    GeluTanh,
    /// max(x, 0)
    Relu,
}

impl Activation {
    /// Replaces each element by its activation, to about 1e-6.
    pub fn forward(self, x: &mut [f32]) {
        match self {
            Self::Silu => x.iter_mut().for_each(|x| *x = silu(*x)),
            Self::Gelu => x.iter_mut().for_each(|x| *x = gelu(*x)),
            Self::GeluTanh => x.iter_mut().for_each(|x| *x = gelu_tanh(*x)),
            Self::Relu => x.iter_mut().for_each(|x| *x = relu(*x)),
        }
    }

    /// hidden = f(a) ⊙ b for the products (a, b) of a row.
    pub(crate) fn gate(self, products: (&[f32], &[f32]), hidden: &mut [f32]) {
        match self {
            Self::Silu => gate(products, hidden, silu),
            Self::Gelu => gate(products, hidden, gelu),
            Self::GeluTanh => gate(products, hidden, gelu_tanh),
            Self::Relu => gate(products, hidden, relu),
        }
    }

    /// [`Activation::gate`] of products of integers, whose scales and those of the matrix that follows are
    /// `[of a, of b, of it]`.
    pub(crate) fn gate_scaled(self, products: (&[f32], &[f32]), scales: [&[f32]; 3], hidden: &mut [f32]) {
        match self {
            Self::Silu => gate_scaled(products, scales, hidden, silu),
            Self::Gelu => gate_scaled(products, scales, hidden, gelu),
            Self::GeluTanh => gate_scaled(products, scales, hidden, gelu_tanh),
            Self::Relu => gate_scaled(products, scales, hidden, relu),
        }
    }

    /// Replaces a row `[a, b]` of products by its gradient, and writes f(a) ⊙ b to `hidden`.
    pub(crate) fn gate_backward(self, products: &mut [f32], dhidden: &[f32], hidden: &mut [f32]) {
        match self {
            Self::Silu => gate_backward(products, dhidden, hidden, |x| {
                let s = sigmoid(x);
                let silu = x * s;
                (silu, s + silu * (1.0 - s))
            }),
            Self::Gelu => gate_backward(products, dhidden, hidden, |x| {
                use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};
                let bell = exp(-0.5 * x * x);
                let tail = 0.5 * normal_ratio(x.abs()) * bell;
                let below = if x > 0.0 { 1.0 - tail } else { tail };
                (gelu(x), below + x * (0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2) * bell)
            }),
            Self::GeluTanh => gate_backward(products, dhidden, hidden, |x| {
                let s = sigmoid(TANH_FACTOR * (x + CUBE * x * x * x));
                (x * s, s + x * s * (1.0 - s) * TANH_FACTOR * (1.0 + 3.0 * CUBE * x * x))
            }),
            Self::Relu => {
                gate_backward(products, dhidden, hidden, |x| (relu(x), if x > 0.0 { 1.0 } else { 0.0 }));
            }
        }
    }

    /// Of candle's differentiable operations.
    pub(crate) fn composed(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Silu => x.silu(),
            Self::Gelu => x.gelu_erf(),
            Self::GeluTanh => {
                let cubic = (x + (x.sqr()? * x)?.affine(0.044_715, 0.0)?)?;
                let u = (cubic * (2.0 / std::f64::consts::PI).sqrt())?;
                (x * 0.5)? * (u.tanh()? + 1.0)?
            }
            Self::Relu => x.relu(),
        }
    }
}

fn gate((a, b): (&[f32], &[f32]), hidden: &mut [f32], f: impl Fn(f32) -> f32) {
    for ((hidden, a), b) in hidden.iter_mut().zip(a).zip(b) {
        *hidden = f(*a) * b;
    }
}

fn gate_scaled(
    (a, b): (&[f32], &[f32]),
    [of_a, of_b, of_out]: [&[f32]; 3],
    hidden: &mut [f32],
    f: impl Fn(f32) -> f32,
) {
    for (i, hidden) in hidden.iter_mut().enumerate() {
        *hidden = f(a[i] * of_a[i]) * (b[i] * of_b[i]) * of_out[i];
    }
}

/// `f` gives the activation and its derivative.
fn gate_backward(products: &mut [f32], dhidden: &[f32], hidden: &mut [f32], f: impl Fn(f32) -> (f32, f32)) {
    let (a, b) = products.split_at_mut(hidden.len());
    for (((hidden, dhidden), a), b) in hidden.iter_mut().zip(dhidden).zip(a).zip(b) {
        let (value, derivative) = f(*a);
        *hidden = value * *b;
        *a = dhidden * *b * derivative;
        *b = dhidden * value;
    }
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

#[inline(always)]
fn relu(x: f32) -> f32 {
    if x > 0.0 { x } else { 0.0 }
}

/// x·Φ(x) = max(x, 0) − |x|·Φ(−|x|), where no digits cancel.
#[inline(always)]
fn gelu(x: f32) -> f32 {
    let size = x.abs();
    relu(x) - 0.5 * size * normal_ratio(size) * exp(-0.5 * x * x)
}

/// The part of 2·Φ(−x), x ≥ 0, beside e^(−x²/2): erfc(x/√2) by Abramowitz & Stegun 7.1.26, a polynomial in
/// 1 / (1 + p·x/√2), to 1e-7.
#[inline(always)]
fn normal_ratio(x: f32) -> f32 {
    const P: f32 = 0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + P * x);
    let p = 1.061_405_4_f32;
    let p = p * t - 1.453_152_1;
    let p = p * t + 1.421_413_8;
    let p = p * t - 0.284_496_72;
    let p = p * t + 0.254_829_6;
    p * t
}

/// 2·√(2/π), and the factor of the cube, of the approximation of GELU by tanh.
const TANH_FACTOR: f32 = std::f32::consts::SQRT_2 * std::f32::consts::FRAC_2_SQRT_PI;
const CUBE: f32 = 0.044_715;

/// ½·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))), and ½·(1 + tanh(u)) is the sigmoid of 2u.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    x * sigmoid(TANH_FACTOR * (x + CUBE * x * x * x))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The integral of the normal density by Simpson's rule, which needs no erf of another library.
    fn normal_distribution(x: f64) -> f64 {
        let n = 2000;
        let h = x / f64::from(n);
        let density = |u: f64| (-0.5 * u * u).exp() / std::f64::consts::TAU.sqrt();
        let weight = |i: i32| if i == 0 || i == n { 1.0 } else { 2.0 + 2.0 * f64::from(i % 2) };
        0.5 + (0..=n).map(|i| weight(i) * density(h * f64::from(i))).sum::<f64>() * h / 3.0
    }

    #[test]
    fn activations_are_close_to_their_definitions() {
        for i in -1200..=1200 {
            let x = f64::from(i) * 0.01;
            let tanh = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            for (activation, expected) in [
                (Activation::Gelu, x * normal_distribution(x)),
                (Activation::GeluTanh, 0.5 * x * (1.0 + tanh.tanh())),
                (Activation::Relu, x.max(0.0)),
                (Activation::Silu, x / (1.0 + (-x).exp())),
            ] {
                let mut found = [x as f32];
                activation.forward(&mut found);
                // An f32 is within 6e-8 of its size.
                let error = (f64::from(found[0]) - expected).abs();
                assert!(error < 3e-7 * x.abs().max(1.0), "{activation:?}({x}): error {error}");
            }
        }
    }
}
