//! Convolutions over images and sequences whose channels lie side by side.

use candle_core::{Result, bail};

use super::epilogue::Epilogue;
use super::functions::Activation;
use super::gemm::multiply;
use super::isa::Isa;
use super::map::{Largest, Map, POOL, max_pool};
use super::matrix::Matrix;
use super::packed::{Compute, Packed};
use super::pool::pool;
use super::simd::BLOCK;
use super::window::{Seen, Window};
use super::winograd::Winograd;

/// Pooled lines that a convolution before the pool makes at a time.
const BAND: usize = 8;

/// How a convolution is computed.
#[derive(Debug)]
enum Kernel {
    /// As a product with `[out, kernel·C]`, parts filled up to whole blocks where it is rounded.
    Plain(Packed),
    Winograd(Winograd),
}

/// A convolution.
#[derive(Debug)]
pub struct Convolution {
    kernel: Kernel,
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
        let kernel = |kernel| Ok(Self { kernel, bias, window, channels });
        if compute == Compute::Exact && Winograd::suits(window, channels, weight.len() / inputs) {
            return kernel(Kernel::Winograd(Winograd::new(weight, channels)));
        }
        // Channels side by side, as the features have them.
        let part = window.part(channels);
        let whole = part.next_multiple_of(BLOCK);
        // Where blocks are filled up by half, rounding gains nothing (the three channels of an image).
        let compute = if 3 * part < 2 * whole { Compute::Exact } else { compute };
        let filled = if compute == Compute::Int8 { whole } else { part };
        let width = inputs / part * filled;
        let mut turned = vec![0.0; weight.len() / inputs * width];
        for (row, w) in turned.chunks_exact_mut(width).zip(weight.chunks_exact(inputs)) {
            let to = row.chunks_exact_mut(filled).flat_map(|part_of| &mut part_of[..part]);
            for (at, to) in to.enumerate() {
                *to = w[at % channels * places + at / channels];
            }
        }
        kernel(Kernel::Plain(Packed::from_values(&turned, width, compute)))
    }

    /// Channels of the result.
    pub fn outputs(&self) -> usize {
        match &self.kernel {
            Kernel::Plain(weight) => weight.outputs(),
            Kernel::Winograd(winograd) => winograd.outputs(),
        }
    }

    /// `x` convolved, followed by `activation`.
    ///
    /// # Errors
    /// When the number of channels does not fit.
    pub fn forward(&self, x: &Map, activation: Activation) -> Result<Map> {
        let epilogue = Epilogue { activation, ..Epilogue::default() };
        self.map(x, epilogue)
    }

    /// `x` convolved; then `residual` is added, and what is below zero is zero.
    ///
    /// # Errors
    /// When a number of channels or a size does not fit.
    pub fn forward_add_relu(&self, x: &Map, residual: &Map) -> Result<Map> {
        let size = self.window.result(x.size.0, x.size.1);
        if (residual.size, residual.values.width()) != (size, self.outputs()) {
            bail!("{:?} x {} does not fit a result of {size:?}", residual.size, self.outputs());
        }
        let (residual, last) = (Some(residual.values.values()), Activation::Relu);
        self.map(x, Epilogue { residual, last, ..Epilogue::default() })
    }

    /// `x` convolved, followed by `activation` and [`max_pool`]: a few lines at a time, so that the larger map in between
    /// stays in the cache.
    ///
    /// # Errors
    /// When the number of channels does not fit.
    pub fn forward_pooled(&self, x: &Map, activation: Activation) -> Result<Map> {
        let Kernel::Plain(weight) = &self.kernel else {
            return Ok(max_pool(&self.forward(x, activation)?));
        };
        let (size, window, outputs) = (x.size, self.window, self.outputs());
        self.check(x.values.values(), size, x.values.width())?;
        let (lines, width) = window.result(size.0, size.1);
        let pooled = POOL.result(lines, width);
        let mut values = Matrix::unwritten(pooled.0 * pooled.1, outputs);
        let (line, pooled_line) = (width * outputs, pooled.1 * outputs);
        let epilogue = Epilogue { bias: self.bias.as_deref(), activation, ..Epilogue::default() };
        // The last line of the band before, and the lines of this one.
        let mut band = Matrix::unwritten((1 + 2 * BAND) * width, outputs);
        band.values_mut()[..line].fill(f32::NEG_INFINITY);
        let isa = Isa::current();
        let bands = values.values_mut().chunks_mut((BAND * pooled_line).max(1));
        for (index, out) in bands.enumerate() {
            let top = 2 * BAND * index;
            let lines = top..(top + 2 * BAND).min(lines);
            let band = band.values_mut();
            if index > 0 {
                band.copy_within(2 * BAND * line.., 0);
            }
            let end = 1 + lines.len();
            let seen =
                Seen { values: x.values.values(), size, channels: self.channels, window, lines };
            multiply(&seen, weight, &epilogue, &mut band[line..end * line]);
            let values = &*band;
            pool().chunks(out, pooled_line.max(1), |top, out| {
                let lines = 2 * top..(2 * top + 3).min(end);
                isa.run(Largest { values, width, channels: outputs, lines, out });
            });
        }
        Ok(Map { values, size: pooled })
    }

    /// The sequence `x` (`[L, C]`) convolved: `[L', out]`.
    ///
    /// # Errors
    /// When the number of channels does not fit.
    pub fn forward_sequence(&self, x: &Matrix) -> Result<Matrix> {
        let (lines, places) = self.window.result(1, x.rows());
        let mut out = Matrix::unwritten(lines * places, self.outputs());
        let size = (1, x.rows());
        self.apply(x.values(), size, x.width(), Epilogue::default(), out.values_mut())?;
        Ok(out)
    }

    fn map(&self, x: &Map, epilogue: Epilogue<'_>) -> Result<Map> {
        let size = self.window.result(x.size.0, x.size.1);
        let mut values = Matrix::unwritten(size.0 * size.1, self.outputs());
        self.apply(x.values.values(), x.size, x.values.width(), epilogue, values.values_mut())?;
        Ok(Map { values, size })
    }

    fn check(&self, values: &[f32], size: (usize, usize), channels: usize) -> Result<()> {
        if channels != self.channels || values.len() != size.0 * size.1 * channels {
            bail!("a convolution over {} channels met {channels} at {size:?}", self.channels);
        }
        Ok(())
    }

    fn apply(
        &self,
        values: &[f32],
        size: (usize, usize),
        channels: usize,
        epilogue: Epilogue<'_>,
        out: &mut [f32],
    ) -> Result<()> {
        self.check(values, size, channels)?;
        let epilogue = Epilogue { bias: self.bias.as_deref(), ..epilogue };
        match &self.kernel {
            Kernel::Winograd(winograd) => winograd.apply(values, size, &epilogue, out),
            Kernel::Plain(weight) => {
                let (window, lines) = (self.window, 0..self.window.result(size.0, size.1).0);
                let seen = Seen { values, size, channels, window, lines };
                multiply(&seen, weight, &epilogue, out);
            }
        }
        Ok(())
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

    /// `x` (`[L, C]`) at twice the length: `[2·L, out]`.
    ///
    /// # Errors
    /// When the number of channels does not fit.
    pub fn forward(&self, x: &Matrix) -> Result<Matrix> {
        self.0.forward_sequence(x)?.reshaped(2 * x.rows(), self.0.outputs() / 2)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::super::map::Planes;
    use super::super::norm::GroupNorm;
    use super::*;

    fn map_of(x: &Tensor) -> Result<Map> {
        Ok(Map::of_planes(&Planes::of_tensor(x)?))
    }

    fn image(map: &Map) -> Result<Tensor> {
        map.to_planes().values.to_tensor()?.reshape(((), map.size.0, map.size.1))
    }

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0).collect()
    }

    fn worst(a: &Tensor, b: &Tensor) -> Result<f32> {
        (a - b)?.abs()?.max_all()?.to_scalar()
    }

    #[test]
    fn convolutions_equal_those_of_candle() -> Result<()> {
        let cpu = &Device::Cpu;
        for (channels, outputs, height, width, kernel, stride) in [
            (3, 5, 17, 23, 7, 2),
            (6, 4, 8, 8, 3, 1),
            (6, 9, 9, 7, 3, 2),
            (5, 8, 6, 6, 1, 2),
            (3, 70, 12, 20, 4, 4),
            (32, 33, 9, 21, 3, 1),
            (64, 50, 10, 11, 3, 2),
            (64, 17, 7, 12, 1, 2),
            (96, 20, 4, 5, 5, 1),
        ] {
            let x = numbers(channels * height * width, 1);
            let x = Tensor::from_vec(x, (channels, height, width), cpu)?;
            let w = numbers(outputs * channels * kernel * kernel, 2);
            let padding = if kernel == 4 { 0 } else { kernel / 2 };
            let window = Window { kernel: (kernel, kernel), stride, padding: (padding, padding) };
            let ours = |compute| -> Result<(Tensor, Tensor)> {
                let (conv, map) = (
                    Convolution::new(&w, Some(numbers(outputs, 3)), channels, window, compute)?,
                    map_of(&x)?,
                );
                let bare = conv.forward(&map, Activation::None)?;
                let added = conv.forward_add_relu(&map, &bare)?;
                Ok((image(&bare)?, image(&added)?))
            };
            let bias = Tensor::from_vec(numbers(outputs, 3), (outputs, 1, 1), cpu)?;
            let kernels = Tensor::from_slice(&w, (outputs, channels, kernel, kernel), cpu)?;
            let theirs = x.unsqueeze(0)?.conv2d(&kernels, padding, stride, 1, 1)?.squeeze(0)?;
            let theirs = theirs.broadcast_add(&bias)?;
            let (bare, added) = ours(Compute::Exact)?;
            let close = 2e-6 * (channels * kernel * kernel) as f32;
            assert!(worst(&bare, &theirs)? < close, "{channels} {kernel} {stride}");
            assert!(worst(&added, &(&theirs * 2.0)?.relu()?)? < 2.0 * close);
            // Half a step of 127 for each factor, which mostly cancel.
            let (rounded, _) = ours(Compute::Int8)?;
            let largest: f32 = theirs.abs()?.max_all()?.to_scalar()?;
            let off = worst(&rounded, &theirs)? / largest;
            assert!(off < 0.02, "{channels} {kernel} {stride}: {off}");
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
        let rows = Matrix::of_tensor(&x)?;
        let ours = Doubling::new(&w, &bias, channels, Compute::Exact)?.forward(&rows)?;
        let ours = ours.to_tensor()?;
        let w = Tensor::from_vec(w, (channels, channels, 4), cpu)?;
        let theirs = theirs_x.conv_transpose1d(&w, 1, 0, 2, 1, 1)?;
        let column = Tensor::from_vec(bias, (1, channels, 1), cpu)?;
        let theirs = theirs.broadcast_add(&column)?.squeeze(0)?.t()?;
        assert!(worst(&ours, &theirs)? < 1e-5);
        let w = numbers(7 * channels * 3, 6);
        let window = Window { kernel: (1, 3), stride: 2, padding: (0, 1) };
        let ours = Convolution::new(&w, None, channels, window, Compute::Exact)?;
        let ours = ours.forward_sequence(&rows)?.to_tensor()?;
        let w = Tensor::from_vec(w, (7, channels, 3), cpu)?;
        let theirs = theirs_x.conv1d(&w, 1, 2, 1, 1)?.squeeze(0)?.t()?;
        assert!(worst(&ours, &theirs)? < 1e-5);
        Ok(())
    }

    #[test]
    fn pooled_by_bands_is_pooled_as_a_whole() -> Result<()> {
        for (channels, height, width) in [(3, 97, 41), (3, 64, 30), (3, 1, 9), (32, 40, 7)] {
            let x = numbers(channels * height * width, 1);
            let x = Map::of_planes(&Planes::new(&x, (height, width))?);
            let (w, bias) = (numbers(5 * channels * 49, 2), Some(numbers(5, 3)));
            let window = Window { kernel: (7, 7), stride: 2, padding: (3, 3) };
            let conv = Convolution::new(&w, bias, channels, window, Compute::Exact)?;
            let whole = max_pool(&conv.forward(&x, Activation::Relu)?);
            let bands = conv.forward_pooled(&x, Activation::Relu)?;
            assert_eq!((bands.size, bands.values.values()), (whole.size, whole.values.values()));
        }
        Ok(())
    }

    #[test]
    fn pools_and_norms_equal_those_of_candle() -> Result<()> {
        use candle_nn::Module;
        let (cpu, channels, height, width) = (&Device::Cpu, 6, 9, 8);
        let values = numbers(channels * height * width, 7);
        let x = Tensor::from_vec(values, (channels, height, width), cpu)?;
        let map = map_of(&x)?;
        // Candle pads with zeros, so the values are lifted above them.
        let lifted = map_of(&(&x + 5.0)?)?;
        let padded = (&x + 5.0)?.unsqueeze(0)?.pad_with_zeros(2, 1, 1)?.pad_with_zeros(3, 1, 1)?;
        let theirs = padded.max_pool2d_with_stride(3, 2)?.squeeze(0)?;
        assert_eq!(worst(&image(&max_pool(&lifted))?, &theirs)?, 0.0);
        let (gain, bias) = (numbers(channels, 8), numbers(channels, 9));
        let norm = GroupNorm::new(gain.clone(), bias.clone(), 3, 1e-5)?;
        let mut ours = map;
        norm.apply(&mut ours.values)?;
        let (gain, bias) =
            (Tensor::from_vec(gain, channels, cpu)?, Tensor::from_vec(bias, channels, cpu)?);
        let theirs = candle_nn::GroupNorm::new(gain, bias, channels, 3, 1e-5)?
            .forward(&x.unsqueeze(0)?)?
            .squeeze(0)?;
        assert!(worst(&image(&ours)?, &theirs)? < 1e-5);
        Ok(())
    }
}
