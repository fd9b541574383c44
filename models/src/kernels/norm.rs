//! Normalisation of rows, and of groups of channels.

use candle_core::{Result, bail};

use super::isa::Isa;
use super::matrix::Matrix;
use super::pool::pool;
use super::simd::Loop;
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

    /// The rows of `x` normalised.
    ///
    /// # Errors
    /// When the width of `x` is another one.
    pub fn forward(&self, x: &Matrix) -> Result<Matrix> {
        by_row(x, &self.gain, Some(&self.bias), self.eps)
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

    /// The rows of `x` normalised.
    ///
    /// # Errors
    /// When the width of `x` is another one.
    pub fn forward(&self, x: &Matrix) -> Result<Matrix> {
        by_row(x, &self.gain, None, self.eps)
    }
}

/// With a bias the mean is taken off before; without, the root mean square counts.
fn by_row(x: &Matrix, gain: &[f32], bias: Option<&[f32]>, eps: f32) -> Result<Matrix> {
    if x.width() != gain.len() {
        bail!("a norm of width {} met rows of {}", gain.len(), x.width());
    }
    let mut out = Matrix::unwritten(x.rows(), x.width());
    normalise(x.values(), gain, bias, eps, out.values_mut());
    Ok(out)
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
/// Group norm: the channels of each group are normalised over all places together.
#[derive(Debug)]
pub struct GroupNorm {
    gain: Vec<f32>,
    bias: Vec<f32>,
    groups: usize,
    eps: f32,
}

impl GroupNorm {
    /// The norm with one gain and bias a channel; `groups` divides their number, `eps` is added to the variance.
    ///
    /// # Errors
    /// When it does not.
    pub fn new(gain: Vec<f32>, bias: Vec<f32>, groups: usize, eps: f64) -> Result<Self> {
        if groups == 0 || !gain.len().is_multiple_of(groups) || bias.len() != gain.len() {
            bail!("{} channels make no {groups} groups", gain.len());
        }
        Ok(Self { gain, bias, groups, eps: eps as f32 })
    }

    /// `x` (`[places, C]`) normalised, in its place.
    ///
    /// # Errors
    /// When the number of channels does not fit.
    pub fn apply(&self, x: &mut Matrix) -> Result<()> {
        let channels = x.width();
        let values = x.values_mut();
        if channels != self.gain.len() {
            bail!("a group norm of {} channels met {channels}", self.gain.len());
        }
        // Per channel, what it is multiplied with and what is added.
        let width = channels / self.groups;
        let count = (values.len() / self.groups).max(1) as f64;
        let mut terms = Matrix::unwritten(channels, 2);
        let read = &*values;
        pool().chunks(terms.values_mut(), 2 * width.max(1), |group, terms| {
            let columns = group * width..(group + 1) * width;
            let rows = || read.chunks_exact(channels).map(|row| &row[columns.clone()]);
            let mean = rows().flatten().map(|v| f64::from(*v)).sum::<f64>() / count;
            let square = |v: &f32| (f64::from(*v) - mean) * (f64::from(*v) - mean);
            let variance = rows().flatten().map(square).sum::<f64>() / count;
            let by = 1.0 / (variance as f32 + self.eps).sqrt();
            for (term, channel) in terms.chunks_exact_mut(2).zip(columns.clone()) {
                let gain = by * self.gain[channel];
                term.copy_from_slice(&[gain, self.bias[channel] - mean as f32 * gain]);
            }
        });
        let rows_each = SLICE.div_ceil(channels.max(1));
        pool().chunks(values, (rows_each * channels).max(1), |_, rows| {
            for row in rows.chunks_exact_mut(channels) {
                let terms = terms.values().chunks_exact(2);
                row.iter_mut().zip(terms).for_each(|(x, t)| *x = *x * t[0] + t[1]);
            }
        });
        Ok(())
    }
}
