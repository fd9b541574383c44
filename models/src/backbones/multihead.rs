//! PyTorch's `nn.MultiheadAttention`.

use candle_core::Result;

use crate::ModelError;
use crate::checkpoint::TensorStore;
use crate::kernels::{After, Linear, Matrix, Visible, attend};

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
    pub fn forward(
        &self,
        (query, key, value): (&Matrix, &Matrix, &Matrix),
        visible: Visible,
        residual: Option<&Matrix>,
    ) -> Result<Matrix> {
        let (q, k, v) = (self.q.forward(query)?, self.k.forward(key)?, self.v.forward(value)?);
        let (heads, compute) = ((self.heads, self.heads), self.q.compute());
        let seen = attend(&q.all(), &[k.all()], &[v.all()], heads, visible, compute)?;
        self.out.forward_then(&seen, After { residual, ..After::default() })
    }
}
