//! Layer normalisation.

use candle_core::{Result, Tensor};

use crate::ModelError;
use crate::checkpoint::TensorStore;

/// Layer norm over the last dimension, with gain and bias.
pub struct LayerNorm {
    gain: Tensor,
    bias: Tensor,
    eps: f32,
}

impl LayerNorm {
    /// The norm whose tensors are `name.weight` and `name.bias`; `eps` is added to the variance.
    ///
    /// # Errors
    /// [`ModelError`] when a tensor is missing or has another shape.
    pub fn load(
        store: &TensorStore,
        name: &str,
        width: usize,
        eps: f64,
    ) -> std::result::Result<Self, ModelError> {
        let gain = store.tensor(&format!("{name}.weight"), &[width])?;
        let bias = store.tensor(&format!("{name}.bias"), &[width])?;
        Ok(Self { gain, bias, eps: eps as f32 })
    }

    /// `x` (`[…, width]`, contiguous) normalised.
    ///
    /// # Errors
    /// When the width of `x` is another one.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        candle_nn::ops::layer_norm(x, &self.gain, &self.bias, self.eps)
    }
}
