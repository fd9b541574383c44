//! Loops that candle has no fast form of on the CPU.
//!
//! Matrix products are candle's. Between them stand activations and softmax: candle 0.11 takes 70 ms for the
//! GELU of a product that takes 55. Here they run in place, in loops that the compiler vectorises.

mod attention;
mod inplace;
mod linear;
mod norm;

pub use attention::{Rope, Visible, attend, split_heads};
pub use inplace::{add, gelu_mul, mish, silu, silu_mul};
pub use linear::{Activation, Linear};
pub use norm::LayerNorm;

/// e to the power of `x`, with a relative error below 3e-7; NaN stays NaN.
///
/// Inputs are cut to [−87, 88]: below, the result is 1.6e-38 and not a denormal.
/// Source: Cephes `single/expf.c`.
#[inline(always)]
fn exp(x: f32) -> f32 {
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

#[cfg(test)]
mod tests {
    use super::exp;

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
}
