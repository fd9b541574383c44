//! Element-wise loops on tensors that nobody else holds.

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use super::exp;

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

/// Adds a bias to every row, then optionally applies GELU.
pub(super) struct Bias<'a> {
    pub bias: &'a [f32],
    pub gelu: bool,
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
                if self.gelu {
                    row.iter_mut().zip(self.bias).for_each(|(x, b)| *x = gelu_tanh(*x + b));
                } else {
                    row.iter_mut().zip(self.bias).for_each(|(x, b)| *x += b);
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

#[derive(Clone, Copy)]
enum Pair {
    SiluMul,
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

/// `silu(gate)·up`, in the memory of `gate`.
///
/// # Errors
/// When the sizes differ, or one is not contiguous f32.
pub fn silu_mul(gate: Tensor, up: &Tensor) -> Result<Tensor> {
    gate.inplace_op2(up, &Pair::SiluMul)?;
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
