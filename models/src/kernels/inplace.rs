//! Element-wise loops on tensors that nobody else holds, and on matrices.

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout, Result, Tensor, bail};

use super::functions::{self, Activation, activate};
use super::isa::Isa;
use super::matrix::Matrix;
use super::pool::pool;
use super::simd::Loop;
use super::tensors::{values, values_mut};

/// Values that one thread takes at a time.
const SLICE: usize = 1 << 14;

/// A loop over one tensor.
#[derive(Clone, Copy)]
enum Single {
    Silu,
    Mish,
    Relu,
}

struct OnSlice<'a>(Single, &'a mut [f32]);

impl Loop for OnSlice<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        match self.0 {
            Single::Silu => activate(Activation::Silu, self.1),
            Single::Relu => activate(Activation::Relu, self.1),
            Single::Mish => self.1.iter_mut().for_each(|x| *x = functions::mish(*x)),
        }
    }
}

impl InplaceOp1 for Single {
    fn name(&self) -> &'static str {
        "element-wise loop"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        each(values_mut(storage, layout)?, *self);
        Ok(())
    }
}

/// Adds a tensor to another.
struct Add;

struct AddSlice<'a>(&'a mut [f32], &'a [f32]);

impl Loop for AddSlice<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.0.iter_mut().zip(self.1).for_each(|(t, s)| *t += s);
    }
}

impl InplaceOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
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
        add_slices(target, source);
        Ok(())
    }
}

/// Both are equally long.
fn add_slices(target: &mut [f32], source: &[f32]) {
    let isa = Isa::current();
    pool().chunks(target, SLICE, |index, target| {
        let source = &source[index * SLICE..index * SLICE + target.len()];
        isa.run(AddSlice(target, source));
    });
}

fn each(target: &mut [f32], what: Single) {
    let isa = Isa::current();
    pool().chunks(target, SLICE, |_, x| isa.run(OnSlice(what, x)));
}

/// `x·sigmoid(x)` in place; `x` must be the only holder of its values.
///
/// # Errors
/// When `x` is not contiguous f32.
pub fn silu(x: Tensor) -> Result<Tensor> {
    x.inplace_op1(&Single::Silu)?;
    Ok(x)
}

/// The larger of each value and 0, in place.
pub fn relu_all(x: &mut Matrix) {
    each(x.values_mut(), Single::Relu);
}

/// `x·tanh(ln(1 + exp(x)))` (Misra 2019, arXiv 1908.08681) in place; `x` must be the only holder of its values.
///
/// # Errors
/// When `x` is not contiguous f32.
pub fn mish(x: Tensor) -> Result<Tensor> {
    x.inplace_op1(&Single::Mish)?;
    Ok(x)
}

/// `x + y`, in the memory of `x`.
///
/// # Errors
/// When the sizes differ, or one is not contiguous f32.
pub fn add(x: Tensor, y: &Tensor) -> Result<Tensor> {
    x.inplace_op2(y, &Add)?;
    Ok(x)
}

/// Adds `y` to `x`.
///
/// # Errors
/// When the sizes differ.
pub fn add_all(x: &mut Matrix, y: &Matrix) -> Result<()> {
    if (x.rows(), x.width()) != (y.rows(), y.width()) {
        bail!("{} x {} values meet {} x {}", x.rows(), x.width(), y.rows(), y.width());
    }
    add_slices(x.values_mut(), y.values());
    Ok(())
}

/// `x + y`.
///
/// # Errors
/// When the sizes differ.
pub fn sum(x: &Matrix, y: &Matrix) -> Result<Matrix> {
    let mut out = x.clone();
    add_all(&mut out, y)?;
    Ok(out)
}
