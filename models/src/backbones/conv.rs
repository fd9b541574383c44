//! Convolutions and the norms around them, on single images and sequences.
//!
//! Products are candle's. Weights are widened once, when they are loaded: a convolution's matrix is small beside
//! the features it makes, and a batch norm is folded into it.

use candle_core::{Device, Result, Tensor};
use candle_nn::{GroupNorm, Module};

use crate::ModelError;
use crate::checkpoint::TensorStore;

/// Added to the variance in every batch and group norm here, as PyTorch does.
const EPS: f64 = 1e-5;

type Loaded<T> = std::result::Result<T, ModelError>;

/// A convolution over images `[C, h, w]`.
#[derive(Debug)]
pub struct Conv2d {
    /// `[out, in, k, k]`
    weight: Tensor,
    /// `[1, out, 1, 1]`
    bias: Option<Tensor>,
    stride: usize,
    padding: usize,
}

impl Conv2d {
    /// The square convolution `name.weight`, with `name.bias` where `bias` is set. Its output keeps the size
    /// of the input but for the stride.
    ///
    /// # Errors
    /// [`ModelError`] when a tensor is missing or has another shape.
    pub fn load(
        store: &TensorStore,
        name: &str,
        (inputs, outputs): (usize, usize),
        kernel: usize,
        stride: usize,
        bias: bool,
    ) -> Loaded<Self> {
        let weight = store.tensor(&format!("{name}.weight"), &[outputs, inputs, kernel, kernel])?;
        let bias = match bias {
            true => Some(store.vector(&format!("{name}.bias"), outputs)?),
            false => None,
        };
        let bias =
            bias.map(|b| Tensor::from_vec(b, (1, outputs, 1, 1), &Device::Cpu)).transpose()?;
        Ok(Self { weight, bias, stride, padding: kernel / 2 })
    }

    /// The same, followed by the batch norm `norm` in inference mode: one convolution with a bias.
    ///
    /// # Errors
    /// [`ModelError`] when a tensor of the norm is missing or has another shape.
    pub fn fold(self, store: &TensorStore, norm: &str) -> Loaded<Self> {
        let outputs = self.weight.dim(0)?;
        let read = |part: &str| store.vector(&format!("{norm}.{part}"), outputs);
        let (gain, bias) = (read("weight")?, read("bias")?);
        let (mean, variance) = (read("running_mean")?, read("running_var")?);
        let scale: Vec<f32> =
            gain.iter().zip(&variance).map(|(g, v)| g / (v + EPS as f32).sqrt()).collect();
        let shift: Vec<f32> =
            bias.iter().zip(mean.iter().zip(&scale)).map(|(b, (m, s))| b - m * s).collect();
        let column = |values| Tensor::from_vec(values, (1, outputs, 1, 1), &Device::Cpu);
        let (scale, shift) = (column(scale)?, column(shift)?);
        let weight = self.weight.broadcast_mul(&scale.reshape((outputs, 1, 1, 1))?)?;
        let bias = match self.bias {
            Some(bias) => ((bias * scale)? + shift)?,
            None => shift,
        };
        Ok(Self { weight, bias: Some(bias), ..self })
    }

    /// Channels of the result.
    pub fn outputs(&self) -> usize {
        self.weight.dims()[0]
    }

    /// `x` (`[1, in, h, w]`) convolved: `[1, out, h', w']`.
    ///
    /// # Errors
    /// When the number of channels does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.conv2d(&self.weight, self.padding, self.stride, 1, 1)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// The group norm `name` over `channels` channels.
///
/// # Errors
/// [`ModelError::Config`] naming `key` when `groups` does not divide `channels`; [`ModelError`] when a tensor is
/// missing.
pub fn group_norm(
    store: &TensorStore,
    name: &str,
    channels: usize,
    groups: usize,
    key: &str,
) -> Loaded<GroupNorm> {
    if groups == 0 || !channels.is_multiple_of(groups) {
        let reason = format!("makes {groups} groups of the {channels} channels of `{name}`");
        return Err(ModelError::config(store.path(), key, reason));
    }
    let gain = store.tensor(&format!("{name}.weight"), &[channels])?;
    let bias = store.tensor(&format!("{name}.bias"), &[channels])?;
    Ok(GroupNorm::new(gain, bias, channels, groups, EPS)?)
}

/// A convolution over sequences `[1, C, L]`.
#[derive(Debug)]
pub struct Conv1d {
    weight: Tensor,
    /// `[1, out, 1]`
    bias: Tensor,
    kind: Kind1d,
}

#[derive(Debug, Clone, Copy)]
enum Kind1d {
    Plain {
        padding: usize,
        stride: usize,
    },
    /// Kernel 4, stride 2, padding 1: twice the length.
    Transposed,
}

impl Conv1d {
    /// The convolution `name` with an odd `kernel`; its output keeps the length but for the stride.
    ///
    /// # Errors
    /// [`ModelError`] when a tensor is missing or has another shape.
    pub fn load(
        store: &TensorStore,
        name: &str,
        (inputs, outputs): (usize, usize),
        kernel: usize,
        stride: usize,
    ) -> Loaded<Self> {
        let kind = Kind1d::Plain { padding: kernel / 2, stride };
        Self::read(store, name, [outputs, inputs, kernel], outputs, kind)
    }

    /// The transposed convolution `name` that doubles the length.
    ///
    /// # Errors
    /// [`ModelError`] when a tensor is missing or has another shape.
    pub fn load_doubling(store: &TensorStore, name: &str, channels: usize) -> Loaded<Self> {
        Self::read(store, name, [channels, channels, 4], channels, Kind1d::Transposed)
    }

    fn read(
        store: &TensorStore,
        name: &str,
        shape: [usize; 3],
        outputs: usize,
        kind: Kind1d,
    ) -> Loaded<Self> {
        let weight = store.tensor(&format!("{name}.weight"), &shape)?;
        let bias = store.tensor(&format!("{name}.bias"), &[outputs])?.reshape((1, outputs, 1))?;
        Ok(Self { weight, bias, kind })
    }

    /// `x` (`[1, in, L]`) convolved: `[1, out, L']`.
    ///
    /// # Errors
    /// When the number of channels does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = match self.kind {
            Kind1d::Plain { padding, stride } => x.conv1d(&self.weight, padding, stride, 1, 1)?,
            Kind1d::Transposed => x.conv_transpose1d(&self.weight, 1, 0, 2, 1, 1)?,
        };
        y.broadcast_add(&self.bias)
    }
}

/// `x` through `norm`.
///
/// # Errors
/// When the number of channels does not fit.
pub fn normalize(norm: &GroupNorm, x: &Tensor) -> Result<Tensor> {
    norm.forward(x)
}
