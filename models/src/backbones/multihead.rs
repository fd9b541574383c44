//! PyTorch's `nn.MultiheadAttention`.

use candle_core::{Result, Tensor};

use crate::ModelError;
use crate::checkpoint::TensorStore;
use crate::kernels::{Activation, Linear, Matrix, Visible, attend_rows};

/// Attention whose three input matrices lie in one tensor, `in_proj_weight`.
#[derive(Debug)]
pub struct MultiheadAttention {
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    heads: usize,
}

impl MultiheadAttention {
    /// The layer whose tensors lie under `name`; `heads` divides `width`.
    ///
    /// # Errors
    /// [`ModelError`] when a tensor is missing or has another shape.
    pub fn load(
        store: &TensorStore,
        name: &str,
        width: usize,
        heads: usize,
    ) -> std::result::Result<Self, ModelError> {
        let (weight, bias) = (format!("{name}.in_proj_weight"), format!("{name}.in_proj_bias"));
        let part = |index: usize| {
            let names = (weight.as_str(), Some(bias.as_str()));
            Linear::load_rows(store, names, (3 * width, width), index * width, width)
        };
        let out = Linear::load(store, &format!("{name}.out_proj"), width, width, true)?;
        Ok(Self { q: part(0)?, k: part(1)?, v: part(2)?, out, heads })
    }

    /// Rows of `query` (`[L, D]`) attend to those of `key` and `value` (`[C, D]`): `[L, D]`, to which `residual` is added.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn through(
        &self,
        (query, key, value): (&Matrix, &Matrix, &Matrix),
        visible: Visible,
        residual: Option<&Matrix>,
    ) -> Result<Matrix> {
        let side = |linear: &Linear, x: &Matrix| linear.through(x, Activation::None, None);
        let (q, k, v) = (side(&self.q, query)?, side(&self.k, key)?, side(&self.v, value)?);
        let [q, k, v] = [&q, &k, &v].map(|side| side.columns(0..side.width()));
        let seen = attend_rows(&q, &k, &v, (self.heads, self.heads), visible, self.q.compute())?;
        self.out.through(&seen, Activation::None, residual)
    }

    /// As [`Self::through`], on tensors.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn forward(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        visible: Visible,
    ) -> Result<Tensor> {
        let (query, key) = (Matrix::of_tensor(query)?, Matrix::of_tensor(key)?);
        let value = Matrix::of_tensor(value)?;
        self.through((&query, &key, &value), visible, None)?.to_tensor()
    }
}
