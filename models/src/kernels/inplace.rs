//! Element-wise loops on tensors that nobody else holds.

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use super::{Activation, exp};

/// Values that one thread takes at a time.
const SLICE: usize = 1 << 14;

/// The contiguous values of `storage` that `layout` names.
pub(super) fn values_mut<'a>(
    storage: &'a mut CpuStorage,
    layout: &Layout,
) -> Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&mut values[start..end]),
        _ => bail!("an in-place loop needs contiguous f32 values"),
    }
}

fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => bail!("an in-place loop needs contiguous f32 values"),
    }
}

#[inline(always)]
fn sigmoid_mul(x: f32, gate: f32) -> f32 {
    x / (1.0 + exp(-gate))
}

/// GELU, tanh form: `x·(1 + tanh u)/2 = x·sigmoid(2u)` with `u = √(2/π)·(x + 0.044715·x³)`.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    sigmoid_mul(x, 1.595_769 * (x + 0.044_715 * x * x * x))
}

/// GELU, `x·(1 + erf(x/√2))/2`, with an absolute error below 1.5e-7·|x|.
///
/// Source: Abramowitz and Stegun 7.1.26.
#[inline(always)]
fn gelu_erf(x: f32) -> f32 {
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

/// Adds a bias to every row, then applies the activation.
pub(super) struct Bias<'a> {
    pub bias: &'a [f32],
    pub activation: Activation,
}

impl InplaceOp1 for Bias<'_> {
    fn name(&self) -> &'static str {
        "bias"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let width = self.bias.len();
        let rows = (SLICE / width).max(1);
        values_mut(storage, layout)?.par_chunks_mut(rows * width).for_each(|rows| {
            for row in rows.chunks_exact_mut(width) {
                let pairs = row.iter_mut().zip(self.bias);
                match self.activation {
                    Activation::None => pairs.for_each(|(x, b)| *x += b),
                    Activation::Gelu => pairs.for_each(|(x, b)| *x = gelu_tanh(*x + b)),
                    Activation::GeluErf => pairs.for_each(|(x, b)| *x = gelu_erf(*x + b)),
                }
            }
        });
        Ok(())
    }
}

struct Silu;

impl InplaceOp1 for Silu {
    fn name(&self) -> &'static str {
        "silu"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        values_mut(storage, layout)?
            .par_chunks_mut(SLICE)
            .for_each(|x| x.iter_mut().for_each(|x| *x = sigmoid_mul(*x, *x)));
        Ok(())
    }
}

struct Mish;

impl InplaceOp1 for Mish {
    fn name(&self) -> &'static str {
        "mish"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        // With e = exp(x): tanh(ln(1 + e)) = (e² + 2e) / (e² + 2e + 2). Above 20 that is 1.
        values_mut(storage, layout)?.par_chunks_mut(SLICE).for_each(|x| {
            x.iter_mut().for_each(|x| {
                let e = exp(if *x > 20.0 { 20.0 } else { *x });
                let n = e * (e + 2.0);
                *x *= n / (n + 2.0);
            });
        });
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum Pair {
    SiluMul,
    GeluMul,
    Add,
}

impl InplaceOp2 for Pair {
    fn name(&self) -> &'static str {
        "pair"
    }

    fn cpu_fwd(
        &self,
        target: &mut CpuStorage,
        target_layout: &Layout,
        source: &CpuStorage,
        source_layout: &Layout,
    ) -> Result<()> {
        let (target, source) = (values_mut(target, target_layout)?, values(source, source_layout)?);
        if target.len() != source.len() {
            bail!("{} values meet {}", target.len(), source.len());
        }
        target.par_chunks_mut(SLICE).zip(source.par_chunks(SLICE)).for_each(|(t, s)| match self {
            Self::SiluMul => t.iter_mut().zip(s).for_each(|(t, s)| *t = sigmoid_mul(*t, *t) * s),
            Self::GeluMul => t.iter_mut().zip(s).for_each(|(t, s)| *t = gelu_tanh(*t) * s),
            Self::Add => t.iter_mut().zip(s).for_each(|(t, s)| *t += s),
        });
        Ok(())
    }
}

/// `x·sigmoid(x)` in place; `x` must be the only holder of its values.
///
/// # Errors
/// When `x` is not contiguous f32.
pub fn silu(x: Tensor) -> Result<Tensor> {
    x.inplace_op1(&Silu)?;
    Ok(x)
}

/// `x·tanh(ln(1 + exp(x)))` (Misra 2019, arXiv 1908.08681) in place; `x` must be the only holder of its values.
///
/// # Errors
/// When `x` is not contiguous f32.
pub fn mish(x: Tensor) -> Result<Tensor> {
    x.inplace_op1(&Mish)?;
    Ok(x)
}

/// `silu(gate)·up`, in the memory of `gate`.
///
/// # Errors
/// When the sizes differ, or one is not contiguous f32.
pub fn silu_mul(gate: Tensor, up: &Tensor) -> Result<Tensor> {
    gate.inplace_op2(up, &Pair::SiluMul)?;
    Ok(gate)
}

/// `gelu(gate)·up` (tanh form), in the memory of `gate`.
///
/// # Errors
/// When the sizes differ, or one is not contiguous f32.
pub fn gelu_mul(gate: Tensor, up: &Tensor) -> Result<Tensor> {
    gate.inplace_op2(up, &Pair::GeluMul)?;
    Ok(gate)
}

/// `x + y`, in the memory of `x`.
///
/// # Errors
/// When the sizes differ, or one is not contiguous f32.
pub fn add(x: Tensor, y: &Tensor) -> Result<Tensor> {
    x.inplace_op2(y, &Pair::Add)?;
    Ok(x)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::gelu_erf;

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
        let values: Vec<f32> = (-4000..4000).map(|i| i as f32 * 1e-2).collect();
        let x = Tensor::from_slice(&values, values.len(), &Device::Cpu).expect("a vector");
        let y = super::mish(x).and_then(|y| y.to_vec1::<f32>()).expect("contiguous f32");
        for (x, y) in values.iter().zip(y) {
            let wide = f64::from(*x);
            let expected = wide * wide.exp().ln_1p().tanh();
            assert!((f64::from(y) - expected).abs() < 1e-6 * wide.abs().max(1.0), "{x}: {y}");
        }
        let nan = Tensor::new(&[f32::NAN], &Device::Cpu).and_then(super::mish).expect("f32");
        assert!(nan.to_vec1::<f32>().expect("f32")[0].is_nan());
    }
}
