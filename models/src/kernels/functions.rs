//! Functions of one value, in forms that the compiler turns into vectors.

/// What follows a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activation {
    /// Nothing.
    #[default]
    None,
    /// GELU, tanh form.
    Gelu,
    /// GELU, by the error function.
    GeluErf,
    /// `x·sigmoid(x)`.
    Silu,
    /// The larger of `x` and 0.
    Relu,
    /// `x·tanh(ln(1 + exp(x)))` (Misra 2019, arXiv 1908.08681).
    Mish,
}

/// e to the power of `x`, with a relative error below 3e-7; NaN stays NaN.
///
/// Inputs are cut to [−87, 88]: below, the result is 1.6e-38 and not a denormal.
/// Source: Cephes `single/expf.c`.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // 1.5 · 2^23: adding it rounds to the nearest integer and leaves that in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    (p * r * r + r + 1.0) * power
}

#[inline(always)]
pub(super) fn sigmoid_mul(x: f32, gate: f32) -> f32 {
    x / (1.0 + exp(-gate))
}

/// GELU, tanh form: `x·(1 + tanh u)/2 = x·sigmoid(2u)` with `u = √(2/π)·(x + 0.044715·x³)`.
#[inline(always)]
pub(super) fn gelu_tanh(x: f32) -> f32 {
    sigmoid_mul(x, 1.595_769 * (x + 0.044_715 * x * x * x))
}

/// GELU, `x·(1 + erf(x/√2))/2`, with an absolute error below 1.5e-7·|x|.
///
/// Source: Abramowitz and Stegun 7.1.26.
#[inline(always)]
pub(super) fn gelu_erf(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let mut p = 1.061_405_4;
    for c in [-1.453_152, 1.421_413_8, -0.284_496_74, 0.254_829_6] {
        p = p * t + c;
    }
    // Half of erfc(z); the tail of the other side is its mirror image.
    let tail = 0.5 * p * t * exp(-z * z);
    x * if x < 0.0 { tail } else { 1.0 - tail }
}

/// The larger of `x` and 0; NaN stays NaN.
#[inline(always)]
pub(super) fn relu(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

/// `x·tanh(ln(1 + e^x))`.
#[inline(always)]
pub(super) fn mish(x: f32) -> f32 {
    // With e = exp(x): tanh(ln(1 + e)) = (e² + 2e) / (e² + 2e + 2). Above 20 that is 1.
    let e = exp(if x > 20.0 { 20.0 } else { x });
    let n = e * (e + 2.0);
    x * (n / (n + 2.0))
}

/// Applies `activation` to all of `values`.
#[inline(always)]
pub(super) fn activate(activation: Activation, values: &mut [f32]) {
    match activation {
        Activation::None => {}
        Activation::Gelu => values.iter_mut().for_each(|x| *x = gelu_tanh(*x)),
        Activation::GeluErf => values.iter_mut().for_each(|x| *x = gelu_erf(*x)),
        Activation::Silu => values.iter_mut().for_each(|x| *x = sigmoid_mul(*x, *x)),
        Activation::Relu => values.iter_mut().for_each(|x| *x = relu(*x)),
        Activation::Mish => values.iter_mut().for_each(|x| *x = mish(*x)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        let mut worst = 0f64;
        for i in -86_000..88_000 {
            let x = i as f32 * 1e-3;
            let expected = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / expected - 1.0).abs());
        }
        assert!(worst < 3e-7, "{worst}");
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn gelu_by_the_error_function_is_close_everywhere() {
        // erf by its Taylor series, in double precision; past 5 it is 1 to ten digits.
        let erf = |x: f64| {
            let (mut term, mut sum) = (x, x);
            for n in 1..120 {
                term *= -x * x / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            sum * std::f64::consts::FRAC_2_SQRT_PI
        };
        for i in -5000..=5000 {
            let x = f64::from(i) * 1e-3;
            let expected = x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2)) / 2.0;
            let error = (f64::from(gelu_erf(x as f32)) - expected).abs();
            assert!(error < 3e-7 * x.abs().max(1.0), "{x}: {error:e}");
        }
        assert!(gelu_erf(f32::NAN).is_nan());
    }

    #[test]
    fn mish_is_close_everywhere() {
        for i in -4000..4000 {
            let x = i as f32 * 1e-2;
            let wide = f64::from(x);
            let expected = wide * wide.exp().ln_1p().tanh();
            assert!((f64::from(mish(x)) - expected).abs() < 1e-6 * wide.abs().max(1.0), "{x}");
        }
        assert!(mish(f32::NAN).is_nan());
    }

    #[test]
    fn activations_keep_what_is_no_number() {
        use Activation::{Gelu, GeluErf, Mish, None, Relu, Silu};
        for activation in [None, Gelu, GeluErf, Silu, Relu, Mish] {
            let mut values = [f32::NAN];
            activate(activation, &mut values);
            assert!(values[0].is_nan(), "{activation:?}");
        }
    }
}
