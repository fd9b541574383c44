//! Linear layers `y = x·Wᵀ + b`, whatever the weight's type.

use std::cell::RefCell;

use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Result, Tensor};

use super::inplace::{Bias, values_mut};
use crate::ModelError;
use crate::checkpoint::{StoredTensor, StoredType, TensorStore};
use crate::gguf::blocks;

/// What follows the bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    None,
    /// GELU, tanh form.
    Gelu,
    /// GELU, by the error function.
    GeluErf,
}

#[derive(Debug)]
enum Weight {
    /// 32-bit floats, `[out, in]`.
    Dense(Tensor),
    /// As in the mapped file, widened at each use.
    Stored(StoredTensor),
}

impl Weight {
    fn of(
        stored: StoredTensor,
        (outputs, inputs): (usize, usize),
        stay_quantized: bool,
    ) -> Result<Self> {
        if stay_quantized && stored.dtype != StoredType::F32 {
            return Ok(Self::Stored(stored));
        }
        let values = stored.to_f32();
        stored.release();
        Ok(Self::Dense(Tensor::from_vec(values, (outputs, inputs), &Device::Cpu)?))
    }
}

/// A linear layer.
///
/// Stored weights are widened into one scratch matrix per thread and multiplied from there, which leaves
/// the mapped file as their only copy. Against candle's block kernels (50 rows, one thread, AVX-512
/// VNNI, ms; f32 takes 4):
///
/// | weight | widened | candle |
/// | --- | --- | --- |
/// | Q8_0, 768 to 3072 | 5.0 to 7.6 | 1.1 to 2.0 |
/// | Q8_0, 960 to 2560 | 5.0 | 14.1 |
/// | Q4_0, 768 to 3072 | 4.8 | 14.8 |
///
/// candle repacks Q8_0 where 256 divides the input width, into a second copy, and rounds the activations
/// to 8 bits (relative error 0.0087 for 0.0051). Widening is never far from f32 and needs no copy; for
/// those widths on such a processor candle's kernel would be the faster choice.
#[derive(Debug)]
pub struct Linear {
    weight: Weight,
    bias: Option<Vec<f32>>,
    inputs: usize,
    outputs: usize,
}

/// Weights that are widened at a time (values): 64 MiB. A larger layer is computed in parts of its outputs.
const SCRATCH_VALUES: usize = 1 << 24;

thread_local! {
    /// The widened weight of the layer being computed; grows to the largest layer's size.
    static SCRATCH: RefCell<Option<Tensor>> = const { RefCell::new(None) };
}

/// Widens the rows of a stored matrix that begin at a byte.
struct Widen<'a> {
    stored: &'a StoredTensor,
    start: usize,
}

impl InplaceOp1 for Widen<'_> {
    fn name(&self) -> &'static str {
        "widen"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let out = values_mut(storage, layout)?;
        blocks::decode_parallel(self.stored.dtype, &self.stored.bytes()[self.start..], out);
        Ok(())
    }
}

impl Linear {
    /// The layer whose tensors are `name.weight` and, with `bias`, `name.bias`.
    ///
    /// # Errors
    /// [`ModelError`] when a tensor is missing or has another shape.
    pub fn load(
        store: &TensorStore,
        name: &str,
        inputs: usize,
        outputs: usize,
        bias: bool,
    ) -> std::result::Result<Self, ModelError> {
        Self::load_shaped(store, name, &[outputs, inputs], bias)
    }

    /// As [`Self::load`], with the weight in another shape of the same values (a convolution).
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_shaped(
        store: &TensorStore,
        name: &str,
        shape: &[usize],
        bias: bool,
    ) -> std::result::Result<Self, ModelError> {
        let (outputs, inputs) = (shape[0], shape[1..].iter().product());
        let stored = store.get(&format!("{name}.weight"), shape)?;
        let weight = Weight::of(stored.clone(), (outputs, inputs), store.stay_quantized)?;
        let bias = if bias { Some(store.vector(&format!("{name}.bias"), outputs)?) } else { None };
        Ok(Self { weight, bias, inputs, outputs })
    }

    /// A layer of values at hand: `weight` `[out, in]` row by row, one bias per output or none.
    ///
    /// # Errors
    /// When `weight` has another number of values.
    pub fn from_values(
        weight: Vec<f32>,
        bias: Option<Vec<f32>>,
        (inputs, outputs): (usize, usize),
    ) -> Result<Self> {
        let weight = Weight::Dense(Tensor::from_vec(weight, (outputs, inputs), &Device::Cpu)?);
        Ok(Self { weight, bias, inputs, outputs })
    }

    /// The layer of `outputs` rows from `start` on of a matrix that holds several (`names`: weight, bias;
    /// `shape`: all rows, inputs).
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_rows(
        store: &TensorStore,
        names: (&str, Option<&str>),
        shape: (usize, usize),
        start: usize,
        outputs: usize,
    ) -> std::result::Result<Self, ModelError> {
        let (rows, inputs) = shape;
        let stored = store.get(names.0, &[rows, inputs])?;
        let part = stored.part(start, outputs).ok_or_else(|| ModelError::TensorShape {
            path: store.path().to_owned(),
            tensor: stored.name.clone(),
            found: stored.shape.clone(),
            expected: vec![start + outputs, inputs],
        })?;
        let weight = Weight::of(part, (outputs, inputs), store.stay_quantized)?;
        let bias = names.1.map(|name| store.vector(name, rows)).transpose()?;
        let bias = bias.map(|all| all[start..start + outputs].to_vec());
        Ok(Self { weight, bias, inputs, outputs })
    }

    /// Width of the result.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// `x` (`[L, in]`) through the layer: `[L, out]`.
    ///
    /// # Errors
    /// When the shape of `x` does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_with(x, Activation::None)
    }

    /// As [`Self::forward`], followed by `activation`.
    ///
    /// # Errors
    /// When the shape of `x` does not fit.
    pub fn forward_with(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let y = match &self.weight {
            Weight::Dense(weight) => x.matmul(&weight.t()?)?,
            Weight::Stored(stored) => self.widened(stored, x)?,
        };
        match &self.bias {
            Some(bias) => y.inplace_op1(&Bias { bias, activation })?,
            None if activation == Activation::None => {}
            None => y.inplace_op1(&Bias { bias: &vec![0.0; self.outputs], activation })?,
        }
        Ok(y)
    }

    /// `x` times the stored weight, widened part by part.
    fn widened(&self, stored: &StoredTensor, x: &Tensor) -> Result<Tensor> {
        let most = (SCRATCH_VALUES / self.inputs.max(1)).clamp(1, self.outputs.max(1));
        let row_bytes = stored.bytes().len() / self.outputs.max(1);
        SCRATCH.with_borrow_mut(|scratch| {
            let needed = self.inputs * most;
            let room = match scratch.take().filter(|t| t.elem_count() >= needed) {
                Some(tensor) => tensor,
                None => Tensor::zeros(needed, candle_core::DType::F32, &Device::Cpu)?,
            };
            let mut parts = Vec::with_capacity(self.outputs.div_ceil(most));
            for row in (0..self.outputs).step_by(most) {
                let rows = most.min(self.outputs - row);
                let values = room.narrow(0, 0, rows * self.inputs)?;
                let weight = values.reshape((rows, self.inputs))?;
                weight.inplace_op1(&Widen { stored, start: row * row_bytes })?;
                parts.push(x.matmul(&weight.t()?)?);
            }
            *scratch = Some(room);
            if parts.len() == 1 { Ok(parts.remove(0)) } else { Tensor::cat(&parts, 1) }
        })
    }
}
