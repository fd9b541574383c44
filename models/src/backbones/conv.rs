//! Convolutions and the norms around them, from a checkpoint, on single images and sequences.
//!
//! Weights are widened once, when they are loaded: a convolution's matrix is small beside the features it makes, and a
//! batch norm is folded into it.

use candle_core::Result;

use crate::ModelError;
use crate::checkpoint::TensorStore;
use crate::kernels::{Convolution, Doubling, GroupNorm, Matrix, Window};

/// Added to the variance in every batch and group norm here, as PyTorch does.
const EPS: f64 = 1e-5;

type Loaded<T> = std::result::Result<T, ModelError>;

/// The square convolution `name.weight` over images, with `name.bias` where `bias` is set, followed by the batch norm
/// `norm` in inference mode where there is one. Its output keeps the size of the input but for the stride.
///
/// # Errors
/// [`ModelError`] when a tensor is missing or has another shape.
pub fn conv2d(
    store: &TensorStore,
    name: &str,
    (inputs, outputs): (usize, usize),
    kernel: usize,
    stride: usize,
    norm: Option<&str>,
) -> Loaded<Convolution> {
    let shape = [outputs, inputs, kernel, kernel];
    let mut weight = store.get(&format!("{name}.weight"), &shape)?.to_f32();
    let mut bias = None;
    if let Some(norm) = norm {
        let read = |part: &str| store.vector(&format!("{norm}.{part}"), outputs);
        let (gain, shift) = (read("weight")?, read("bias")?);
        let (mean, variance) = (read("running_mean")?, read("running_var")?);
        let scale: Vec<f32> =
            gain.iter().zip(&variance).map(|(g, v)| g / (v + EPS as f32).sqrt()).collect();
        let terms = shift.iter().zip(mean.iter().zip(&scale));
        bias = Some(terms.map(|(b, (m, s))| b - m * s).collect());
        for (row, scale) in weight.chunks_exact_mut(inputs * kernel * kernel).zip(&scale) {
            row.iter_mut().for_each(|w| *w *= scale);
        }
    }
    let padding = (kernel / 2, kernel / 2);
    let window = Window { kernel: (kernel, kernel), stride, padding };
    Ok(Convolution::new(&weight, bias, inputs, window, store.compute(name))?)
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
    let gain = store.vector(&format!("{name}.weight"), channels)?;
    let bias = store.vector(&format!("{name}.bias"), channels)?;
    Ok(GroupNorm::new(gain, bias, groups, EPS)?)
}

/// A convolution over sequences `[L, C]`.
#[derive(Debug)]
pub enum Conv1d {
    /// Keeps the length but for the stride.
    Plain(Convolution),
    /// Twice the length.
    Doubling(Doubling),
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
        let weight = store.get(&format!("{name}.weight"), &[outputs, inputs, kernel])?.to_f32();
        let bias = store.vector(&format!("{name}.bias"), outputs)?;
        let window = Window { kernel: (1, kernel), stride, padding: (0, kernel / 2) };
        let compute = store.compute(name);
        Ok(Self::Plain(Convolution::new(&weight, Some(bias), inputs, window, compute)?))
    }

    /// The transposed convolution `name` that doubles the length: kernel 4, stride 2, padding 1.
    ///
    /// # Errors
    /// [`ModelError`] when a tensor is missing or has another shape.
    pub fn load_doubling(store: &TensorStore, name: &str, channels: usize) -> Loaded<Self> {
        let weight = store.get(&format!("{name}.weight"), &[channels, channels, 4])?.to_f32();
        let bias = store.vector(&format!("{name}.bias"), channels)?;
        Ok(Self::Doubling(Doubling::new(&weight, &bias, channels, store.compute(name))?))
    }

    /// `x` (`[L, in]`) convolved: `[L', out]`.
    ///
    /// # Errors
    /// When the number of channels does not fit.
    pub fn forward(&self, x: &Matrix) -> Result<Matrix> {
        match self {
            Self::Plain(plain) => plain.forward_sequence(x),
            Self::Doubling(doubling) => doubling.forward(x),
        }
    }
}
