//! Linear layers `y = x·Wᵀ + b`, whatever the weight's type.

use candle_core::Result;

use super::epilogue::Epilogue;
use super::functions::Activation;
use super::gemm::{Dense, multiply};
use super::matrix::Matrix;
use super::packed::{Compute, Packed};
use crate::ModelError;
use crate::checkpoint::{StoredTensor, TensorStore};

/// A linear layer.
///
/// The weight is packed once, as it is stored: half precision stays half, blocks stay blocks. With
/// [`Compute::Exact`] they are widened on the way to each product, a panel at a time.
#[derive(Debug)]
pub struct Linear {
    weight: Packed,
    bias: Option<Vec<f32>>,
}

/// What a layer's result is made of, besides the product and the bias.
#[derive(Debug, Clone, Copy, Default)]
pub struct After<'a> {
    /// What follows the bias.
    pub activation: Activation,
    /// `[L, out]`, multiplied in.
    pub gate: Option<&'a Matrix>,
    /// `[L, out]`, added last.
    pub residual: Option<&'a Matrix>,
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
        let bias = if bias { Some(store.vector(&format!("{name}.bias"), outputs)?) } else { None };
        Ok(Self {
            weight: Packed::new(std::slice::from_ref(stored), inputs, store.compute(name)),
            bias,
        })
    }

    /// Several layers over the same input as one, their outputs side by side: each is a name and its outputs.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_joined(
        store: &TensorStore,
        parts: &[(String, usize)],
        inputs: usize,
        bias: bool,
    ) -> std::result::Result<Self, ModelError> {
        let mut weights = Vec::with_capacity(parts.len());
        let mut biases = Vec::new();
        for (name, outputs) in parts {
            weights.push(store.get(&format!("{name}.weight"), &[*outputs, inputs])?.clone());
            if bias {
                biases.extend(store.vector(&format!("{name}.bias"), *outputs)?);
            }
        }
        // One layer that is kept exact keeps all.
        let exact = parts.iter().any(|(name, _)| store.compute(name) == Compute::Exact);
        let compute = if exact { Compute::Exact } else { Compute::Int8 };
        Ok(Self { weight: Packed::new(&weights, inputs, compute), bias: bias.then_some(biases) })
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
        if weight.len() != inputs * outputs {
            candle_core::bail!("{} weights are no {outputs} x {inputs}", weight.len());
        }
        Ok(Self { weight: Packed::from_values(&weight, inputs, Compute::Exact), bias })
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
        let part: StoredTensor =
            stored.part(start, outputs).ok_or_else(|| ModelError::TensorShape {
                path: store.path().to_owned(),
                tensor: stored.name.clone(),
                found: stored.shape.clone(),
                expected: vec![start + outputs, inputs],
            })?;
        let bias = names.1.map(|name| store.vector(name, rows)).transpose()?;
        let bias = bias.map(|all| all[start..start + outputs].to_vec());
        Ok(Self { weight: Packed::new(&[part], inputs, store.compute(names.0)), bias })
    }

    /// How it computes; an attention over its results does as it does.
    pub fn compute(&self) -> Compute {
        self.weight.compute()
    }

    /// Width of the result.
    pub fn outputs(&self) -> usize {
        self.weight.outputs()
    }

    /// `x` (`[L, in]`) through the layer: `[L, out]`.
    ///
    /// # Errors
    /// When the width of `x` does not fit.
    pub fn forward(&self, x: &Matrix) -> Result<Matrix> {
        self.forward_then(x, After::default())
    }

    /// As [`Self::forward`], followed by `activation`.
    ///
    /// # Errors
    /// When the width of `x` does not fit.
    pub fn forward_with(&self, x: &Matrix, activation: Activation) -> Result<Matrix> {
        self.forward_then(x, After { activation, ..After::default() })
    }

    /// As [`Self::forward`], with `residual` (`[L, out]`) added.
    ///
    /// # Errors
    /// When a size does not fit.
    pub fn forward_add(&self, x: &Matrix, residual: &Matrix) -> Result<Matrix> {
        self.forward_then(x, After { residual: Some(residual), ..After::default() })
    }

    /// As [`Self::forward`], followed by what `after` says.
    ///
    /// # Errors
    /// When a size does not fit.
    pub fn forward_then(&self, x: &Matrix, after: After<'_>) -> Result<Matrix> {
        let size = (x.rows(), self.outputs());
        if x.width() != self.weight.inputs() {
            let inputs = self.weight.inputs();
            candle_core::bail!("a layer of {inputs} inputs met rows of {}", x.width());
        }
        for other in [after.gate, after.residual].into_iter().flatten() {
            if other.dims() != size {
                candle_core::bail!("{:?} does not fit a result of {size:?}", other.dims());
            }
        }
        let epilogue = Epilogue {
            bias: self.bias.as_deref(),
            activation: after.activation,
            gate: after.gate.map(Matrix::values),
            residual: after.residual.map(Matrix::values),
            ..Epilogue::default()
        };
        let mut out = Matrix::unwritten(size.0, size.1);
        let rows = Dense { values: x.values(), width: x.width() };
        multiply(&rows, &self.weight, &epilogue, out.values_mut());
        Ok(out)
    }
}
