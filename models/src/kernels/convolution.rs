//! Convolutions over images and sequences whose channels lie side by side.

use candle_core::{Device, Result, Tensor, bail};

use super::epilogue::Epilogue;
use super::functions::Activation;
use super::gemm::multiply;
use super::isa::Isa;
use super::packed::{Compute, Packed};
use super::pool::pool;
use super::simd::Loop;
use super::tensors;
use super::window::{Seen, Window};

/// Features of an image or a sequence.
#[derive(Debug, Clone)]
pub struct Map {
    /// `[height·width, C]`, row by row.
    pub values: Tensor,
    /// Height and width (places); a sequence is one place high.
    pub size: (usize, usize),
}

impl Map {
    /// An image `[C, height, width]`.
    ///
    /// # Errors
    /// When it has another number of dimensions.
    pub fn of_image(pixels: &Tensor) -> Result<Self> {
        let (channels, height, width) = pixels.dims3()?;
        let values = pixels.reshape((channels, height * width))?.t()?.contiguous()?;
        Ok(Self { values, size: (height, width) })
    }

    /// A sequence `[L, C]`.
    ///
    /// # Errors
    /// When it has another number of dimensions.
    pub fn of_sequence(values: Tensor) -> Result<Self> {
        let length = values.dims2()?.0;
        Ok(Self { values, size: (1, length) })
    }

    /// As `[C, height, width]`.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn to_image(&self) -> Result<Tensor> {
        let (height, width) = self.size;
        self.values.t()?.contiguous()?.reshape(((), height, width))
    }
}

/// A convolution.
#[derive(Debug)]
pub struct Convolution {
    /// `[out, kernel·C]`
    weight: Packed,
    bias: Option<Vec<f32>>,
    window: Window,
    channels: usize,
}

impl Convolution {
    /// The convolution of `weight` (`[out, C, height, width]` as PyTorch has it, row by row) over `channels` channels.
    ///
    /// # Errors
    /// When the number of values does not fit.
    pub fn new(
        weight: &[f32],
        bias: Option<Vec<f32>>,
        channels: usize,
        window: Window,
        compute: Compute,
    ) -> Result<Self> {
        let places = window.kernel.0 * window.kernel.1;
        let inputs = channels * places;
        if inputs == 0 || !weight.len().is_multiple_of(inputs) || window.stride == 0 {
            bail!("{} weights are no convolution over {channels} channels", weight.len());
        }
        // Channels side by side, as the features have them.
        let turned: Vec<f32> = weight
            .chunks_exact(inputs)
            .flat_map(|w| {
                (0..places).flat_map(move |p| (0..channels).map(move |c| w[c * places + p]))
            })
            .collect();
        let weight = Packed::from_values(&turned, inputs, compute);
        Ok(Self { weight, bias, window, channels })
    }

    /// Channels of the result.
    pub fn outputs(&self) -> usize {
        self.weight.outputs()
    }

    /// `x` convolved, followed by `activation`.
    ///
    /// # Errors
    /// When the number of channels does not fit.
    pub fn forward(&self, x: &Map, activation: Activation) -> Result<Map> {
        if x.values.dims2()? != (x.size.0 * x.size.1, self.channels) {
            let dims = x.values.dims();
            bail!("a convolution over {} channels met {dims:?}", self.channels);
        }
        let values = tensors::read(&x.values)?;
        let seen = Seen {
            values: values.get(),
            size: x.size,
            channels: self.channels,
            window: self.window,
        };
        let size = self.window.result(x.size.0, x.size.1);
        let (rows, outputs) = (size.0 * size.1, self.outputs());
        let mut out = vec![0.0; rows * outputs];
        let bias = self.bias.as_deref();
        let epilogue = Epilogue { bias, activation, ..Epilogue::default() };
        multiply(&seen, &self.weight, &epilogue, &mut out);
        Ok(Map { values: tensors::matrix(out, rows, outputs)?, size })
    }
}

/// A transposed convolution over sequences that doubles their length: kernel 4, stride 2, padding 1.
///
/// Places `2i` and `2i + 1` of the result see places `i − 1` to `i + 1`, so it is an ordinary convolution with twice the
/// outputs, whose rows are two places of the result.
#[derive(Debug)]
pub struct Doubling(Convolution);

impl Doubling {
    /// The convolution of `weight` (`[C, out, 4]` as PyTorch has it, row by row) over `channels` channels.
    ///
    /// # Errors
    /// When the number of values does not fit.
    pub fn new(weight: &[f32], bias: &[f32], channels: usize, compute: Compute) -> Result<Self> {
        let outputs = bias.len();
        if weight.len() != channels * outputs * 4 {
            bail!("{} weights are no {channels} x {outputs} x 4", weight.len());
        }
        // Place 2i sees i − 1 through tap 3 and i through tap 1; place 2i + 1 sees i through tap 2, i + 1 through tap 0.
        let taps = [[Some(3), Some(1), None], [None, Some(2), Some(0)]];
        let mut turned = Vec::with_capacity(2 * outputs * channels * 3);
        for taps in taps {
            for o in 0..outputs {
                for c in 0..channels {
                    let value = |t: usize| weight[(c * outputs + o) * 4 + t];
                    turned.extend(taps.map(|tap| tap.map_or(0.0, value)));
                }
            }
        }
        let window = Window { kernel: (1, 3), stride: 1, padding: (0, 1) };
        let bias = [bias, bias].concat();
        Ok(Self(Convolution::new(&turned, Some(bias), channels, window, compute)?))
    }

    /// `x` at twice the length.
    ///
    /// # Errors
    /// When the number of channels does not fit.
    pub fn forward(&self, x: &Map) -> Result<Map> {
        let wide = self.0.forward(x, Activation::None)?;
        let length = 2 * x.size.1;
        let values = wide.values.reshape((length, self.0.outputs() / 2))?;
        Ok(Map { values, size: (1, length) })
    }
}

/// Largest value of each 3 × 3 square, at every second place; the border counts for nothing.
///
/// # Errors
/// When the features do not fit their size.
pub fn max_pool(x: &Map) -> Result<Map> {
    let (channels, (height, width)) = (x.values.dims2()?.1, x.size);
    let window = Window { kernel: (3, 3), stride: 2, padding: (1, 1) };
    let size = window.result(height, width);
    let values = tensors::read(&x.values)?;
    let values = values.get();
    let mut out = vec![f32::NEG_INFINITY; size.0 * size.1 * channels];
    let isa = Isa::current();
    pool().chunks(&mut out, (size.1 * channels).max(1), |top, line| {
        for (left, place) in line.chunks_exact_mut(channels).enumerate() {
            for y in (2 * top).saturating_sub(1)..(2 * top + 2).min(height) {
                for x in (2 * left).saturating_sub(1)..(2 * left + 2).min(width) {
                    let seen = &values[(y * width + x) * channels..][..channels];
                    isa.run(Larger { place, seen });
                }
            }
        }
    });
    Ok(Map { values: Tensor::from_vec(out, (size.0 * size.1, channels), &Device::Cpu)?, size })
}

struct Larger<'a> {
    place: &'a mut [f32],
    seen: &'a [f32],
}

impl Loop for Larger<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (p, s) in self.place.iter_mut().zip(self.seen) {
            // NaN stays.
            *p = if *s > *p || s.is_nan() { *s } else { *p };
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

    /// `x` (`[places, C]`) normalised.
    ///
    /// # Errors
    /// When the number of channels does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (places, channels) = x.dims2()?;
        if channels != self.gain.len() {
            bail!("a group norm of {} channels met {:?}", self.gain.len(), x.dims());
        }
        let values = tensors::read(x)?;
        let values = values.get();
        // Per channel, what it is multiplied with and what is added.
        let width = channels / self.groups;
        let mut terms = vec![[0f32; 2]; channels];
        pool().chunks(&mut terms, width, |group, terms| {
            let columns = group * width..(group + 1) * width;
            let rows = || values.chunks_exact(channels).map(|row| &row[columns.clone()]);
            let count = (places * width).max(1) as f64;
            let mean = rows().flatten().map(|v| f64::from(*v)).sum::<f64>() / count;
            let square = |v: &f32| (f64::from(*v) - mean) * (f64::from(*v) - mean);
            let variance = rows().flatten().map(square).sum::<f64>() / count;
            let by = 1.0 / (variance as f32 + self.eps).sqrt();
            for (term, channel) in terms.iter_mut().zip(columns.clone()) {
                let gain = by * self.gain[channel];
                *term = [gain, self.bias[channel] - mean as f32 * gain];
            }
        });
        let mut out = vec![0.0; values.len()];
        let rows_each = (1usize << 14).div_ceil(channels.max(1));
        pool().chunks(&mut out, rows_each * channels, |index, out| {
            let from = &values[index * rows_each * channels..];
            for (out, x) in out.chunks_exact_mut(channels).zip(from.chunks_exact(channels)) {
                for ((o, x), [by, plus]) in out.iter_mut().zip(x).zip(&terms) {
                    *o = x * by + plus;
                }
            }
        });
        Tensor::from_vec(out, (places, channels), &Device::Cpu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0).collect()
    }

    fn worst(a: &Tensor, b: &Tensor) -> Result<f32> {
        (a - b)?.abs()?.max_all()?.to_scalar()
    }

    #[test]
    fn convolutions_equal_those_of_candle() -> Result<()> {
        let cpu = &Device::Cpu;
        for (channels, outputs, height, width, kernel, stride) in
            [(3, 5, 17, 23, 7, 2), (6, 4, 8, 8, 3, 1), (6, 9, 9, 7, 3, 2), (5, 8, 6, 6, 1, 2)]
        {
            let x = Tensor::from_vec(
                numbers(channels * height * width, 1),
                (channels, height, width),
                cpu,
            )?;
            let w = numbers(outputs * channels * kernel * kernel, 2);
            let window =
                Window { kernel: (kernel, kernel), stride, padding: (kernel / 2, kernel / 2) };
            let ours = Convolution::new(&w, None, channels, window, Compute::Exact)?
                .forward(&Map::of_image(&x)?, Activation::None)?
                .to_image()?;
            let w = Tensor::from_vec(w, (outputs, channels, kernel, kernel), cpu)?;
            let theirs = x.unsqueeze(0)?.conv2d(&w, kernel / 2, stride, 1, 1)?.squeeze(0)?;
            assert!(worst(&ours, &theirs)? < 1e-5, "{kernel} {stride}");
        }
        Ok(())
    }

    #[test]
    fn sequences_are_halved_and_doubled_as_candle_does() -> Result<()> {
        let (cpu, channels, length) = (&Device::Cpu, 5, 8);
        let x = Tensor::from_vec(numbers(length * channels, 3), (length, channels), cpu)?;
        let theirs_x = x.t()?.contiguous()?.unsqueeze(0)?;
        let w = numbers(channels * channels * 4, 4);
        let bias = numbers(channels, 5);
        let ours = Doubling::new(&w, &bias, channels, Compute::Exact)?
            .forward(&Map::of_sequence(x.clone())?)?;
        let w = Tensor::from_vec(w, (channels, channels, 4), cpu)?;
        let theirs = theirs_x.conv_transpose1d(&w, 1, 0, 2, 1, 1)?;
        let column = Tensor::from_vec(bias, (1, channels, 1), cpu)?;
        let theirs = theirs.broadcast_add(&column)?.squeeze(0)?.t()?;
        assert!(worst(&ours.values, &theirs)? < 1e-5);
        let w = numbers(7 * channels * 3, 6);
        let window = Window { kernel: (1, 3), stride: 2, padding: (0, 1) };
        let ours = Convolution::new(&w, None, channels, window, Compute::Exact)?
            .forward(&Map::of_sequence(x)?, Activation::None)?;
        let w = Tensor::from_vec(w, (7, channels, 3), cpu)?;
        let theirs = theirs_x.conv1d(&w, 1, 2, 1, 1)?.squeeze(0)?.t()?;
        assert!(worst(&ours.values, &theirs)? < 1e-5);
        Ok(())
    }

    #[test]
    fn pools_and_norms_equal_those_of_candle() -> Result<()> {
        use candle_nn::Module;
        let (cpu, channels, height, width) = (&Device::Cpu, 6, 9, 8);
        let values = numbers(channels * height * width, 7);
        let x = Tensor::from_vec(values, (channels, height, width), cpu)?;
        let map = Map::of_image(&x)?;
        // Candle pads with zeros, so the values are lifted above them.
        let lifted = Map { values: (&map.values + 5.0)?, ..map.clone() };
        let padded = (&x + 5.0)?.unsqueeze(0)?.pad_with_zeros(2, 1, 1)?.pad_with_zeros(3, 1, 1)?;
        let theirs = padded.max_pool2d_with_stride(3, 2)?.squeeze(0)?;
        assert_eq!(worst(&max_pool(&lifted)?.to_image()?, &theirs)?, 0.0);
        let (gain, bias) = (numbers(channels, 8), numbers(channels, 9));
        let ours = GroupNorm::new(gain.clone(), bias.clone(), 3, 1e-5)?.forward(&map.values)?;
        let (gain, bias) =
            (Tensor::from_vec(gain, channels, cpu)?, Tensor::from_vec(bias, channels, cpu)?);
        let theirs = candle_nn::GroupNorm::new(gain, bias, channels, 3, 1e-5)?
            .forward(&x.unsqueeze(0)?)?
            .squeeze(0)?;
        let ours = Map { values: ours, ..map }.to_image()?;
        assert!(worst(&ours, &theirs)? < 1e-5);
        Ok(())
    }
}
