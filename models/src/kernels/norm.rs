//! Normalisation of rows.

use candle_core::{Device, Result, Tensor, bail};

use super::isa::Isa;
use super::matrix::Matrix;
use super::pool::pool;
use super::simd::Loop;
use super::tensors;
use crate::ModelError;
use crate::checkpoint::TensorStore;

/// Values that a thread normalises at a time.
const SLICE: usize = 1 << 14;

/// Layer norm over the last dimension, with gain and bias.
pub struct LayerNorm {
    gain: Vec<f32>,
    bias: Vec<f32>,
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
        let gain = store.vector(&format!("{name}.weight"), width)?;
        let bias = store.vector(&format!("{name}.bias"), width)?;
        Ok(Self { gain, bias, eps: eps as f32 })
    }

    /// `x` (`[…, width]`, contiguous) normalised.
    ///
    /// # Errors
    /// When the width of `x` is another one.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        by_row(x, &self.gain, Some(&self.bias), self.eps)
    }

    /// The rows of `x` normalised.
    ///
    /// # Errors
    /// When the width of `x` is another one.
    pub fn through(&self, x: &Matrix) -> Result<Matrix> {
        if x.width() != self.gain.len() {
            bail!("a norm of width {} met rows of {}", self.gain.len(), x.width());
        }
        let mut out = Matrix::unwritten(x.rows(), x.width());
        normalise(x.values(), &self.gain, Some(&self.bias), self.eps, out.values_mut());
        Ok(out)
    }
}

/// Root-mean-square norm over the last dimension, with a gain.
pub struct RmsNorm {
    gain: Vec<f32>,
    eps: f32,
}

impl RmsNorm {
    /// The norm whose tensor is `name.weight`; `eps` is added to the mean square.
    ///
    /// # Errors
    /// [`ModelError`] when the tensor is missing or has another shape.
    pub fn load(
        store: &TensorStore,
        name: &str,
        width: usize,
        eps: f64,
    ) -> std::result::Result<Self, ModelError> {
        Ok(Self::new(store.vector(&format!("{name}.weight"), width)?, eps))
    }

    /// The norm with the gain at hand.
    pub fn new(gain: Vec<f32>, eps: f64) -> Self {
        Self { gain, eps: eps as f32 }
    }

    /// `x` (`[…, width]`, contiguous) normalised.
    ///
    /// # Errors
    /// When the width of `x` is another one.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        by_row(x, &self.gain, None, self.eps)
    }
}

/// With a bias the mean is taken off before; without, the root mean square counts.
fn by_row(x: &Tensor, gain: &[f32], bias: Option<&[f32]>, eps: f32) -> Result<Tensor> {
    let width = gain.len();
    if x.dims().last() != Some(&width) {
        bail!("a norm of width {width} met shape {:?}", x.dims());
    }
    let values = tensors::read(x)?;
    let mut out = vec![0.0; values.get().len()];
    normalise(values.get(), gain, bias, eps, &mut out);
    Tensor::from_vec(out, x.shape(), &Device::Cpu)
}

fn normalise(x: &[f32], gain: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    let (isa, step) = (Isa::current(), (SLICE / gain.len()).max(1) * gain.len());
    pool().chunks(out, step, |index, out| {
        let x = &x[index * step..index * step + out.len()];
        isa.run(Normalise { x, gain, bias, eps, out });
    });
}

struct Normalise<'a> {
    x: &'a [f32],
    gain: &'a [f32],
    bias: Option<&'a [f32]>,
    eps: f32,
    out: &'a mut [f32],
}

/// A sum in sixteen lanes, so that it runs in vectors.
#[inline(always)]
fn sum(x: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|v| term(*v)).sum();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(l, v)| *l += term(*v));
    }
    lanes.iter().sum::<f32>() + rest
}

impl Loop for Normalise<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let width = self.gain.len();
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            match self.bias {
                Some(bias) => {
                    let mean = sum(x, |v| v) / width as f32;
                    let variance = sum(x, |v| (v - mean) * (v - mean)) / width as f32;
                    let by = 1.0 / (variance + self.eps).sqrt();
                    let terms = x.iter().zip(self.gain.iter().zip(bias));
                    out.iter_mut()
                        .zip(terms)
                        .for_each(|(o, (x, (g, b)))| *o = (x - mean) * by * g + b);
                }
                None => {
                    let by = 1.0 / (sum(x, |v| v * v) / width as f32 + self.eps).sqrt();
                    let terms = x.iter().zip(self.gain);
                    out.iter_mut().zip(terms).for_each(|(o, (x, g))| *o = x * by * g);
                }
            }
        }
    }
}
