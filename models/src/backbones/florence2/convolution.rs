//! Convolutions over feature maps that lie channel by channel at each place (`[h·w, C]`).
//!
//! candle convolves channels first, and a depthwise convolution one channel at a time.

use candle_core::{CpuStorage, Layout, Result, Shape, Tensor, bail};

use crate::ModelError;
use crate::checkpoint::TensorStore;
use crate::kernels::Linear;
use crate::kernels::pool::pool;

/// Height and width of a feature map.
pub(super) type Grid = (usize, usize);

/// A strided convolution, as a product of gathered patches.
pub(super) struct PatchConvolution {
    weight: Linear,
    size: usize,
    stride: usize,
    padding: usize,
}

impl PatchConvolution {
    pub fn load(
        store: &TensorStore,
        name: &str,
        (inputs, outputs): (usize, usize),
        (size, stride, padding): (usize, usize, usize),
    ) -> std::result::Result<Self, ModelError> {
        let weight = Linear::load_shaped(store, name, &[outputs, inputs, size, size], true)?;
        Ok(Self { weight, size, stride, padding })
    }

    /// `x` (`[h·w, C]`) convolved, and the grid of the result.
    pub fn forward(&self, x: &Tensor, grid: Grid) -> Result<(Tensor, Grid)> {
        let out = self.grid(grid)?;
        let gather = Gather { convolution: self, grid, out };
        Ok((self.weight.forward(&x.apply_op1_no_bwd(&gather)?)?, out))
    }

    /// Grid of the result on a map of `grid`.
    pub fn grid(&self, grid: Grid) -> Result<Grid> {
        Ok((self.side(grid.0)?, self.side(grid.1)?))
    }

    fn side(&self, side: usize) -> Result<usize> {
        match (side + 2 * self.padding).checked_sub(self.size) {
            Some(room) => Ok(room / self.stride + 1),
            None => bail!("{side} rows or columns are too few for a patch of {}", self.size),
        }
    }
}

/// Patches in the order of the convolution's weights: `[out rows·columns, C·size²]`.
struct Gather<'a> {
    convolution: &'a PatchConvolution,
    grid: Grid,
    out: Grid,
}

impl candle_core::CustomOp1 for Gather<'_> {
    fn name(&self) -> &'static str {
        "gather patches"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = contiguous(storage, layout)?;
        let (height, width) = self.grid;
        let (rows, columns) = self.out;
        let PatchConvolution { size, stride, padding, .. } = *self.convolution;
        let channels = x.len() / (height * width).max(1);
        let mut out = vec![0f32; rows * columns * channels * size * size];
        let patch = channels * size * size;
        pool().chunks(&mut out, (columns * patch).max(1), |row, line| {
            for (column, patch) in line.chunks_exact_mut(patch).enumerate() {
                for dy in 0..size {
                    let Some(y) = (row * stride + dy).checked_sub(padding).filter(|y| *y < height)
                    else {
                        continue;
                    };
                    for dx in 0..size {
                        let Some(x_at) =
                            (column * stride + dx).checked_sub(padding).filter(|x| *x < width)
                        else {
                            continue;
                        };
                        let place = &x[(y * width + x_at) * channels..][..channels];
                        let taps = patch[dy * size + dx..].iter_mut().step_by(size * size);
                        taps.zip(place).for_each(|(tap, value)| *tap = *value);
                    }
                }
            }
        });
        Ok((CpuStorage::F32(out), Shape::from((rows * columns, patch))))
    }
}

fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => bail!("a convolution needs contiguous f32 values"),
    }
}

/// Side of the depthwise convolutions.
const TAPS: usize = 3;

/// A depthwise 3 × 3 convolution that is added to its input.
pub(super) struct Depthwise {
    /// Tap by tap, `[9, C]`.
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Depthwise {
    pub fn load(
        store: &TensorStore,
        name: &str,
        channels: usize,
    ) -> std::result::Result<Self, ModelError> {
        let stored = store.tensor(&format!("{name}.weight"), &[channels, 1, TAPS, TAPS])?;
        let weight = stored.reshape((channels, TAPS * TAPS))?.t()?.contiguous()?;
        let bias = store.vector(&format!("{name}.bias"), channels)?;
        Ok(Self { weight: weight.flatten_all()?.to_vec1()?, bias })
    }

    /// `x + convolution(x)` of `x` (`[h·w, C]`), zero outside.
    pub fn add_to(&self, x: &Tensor, grid: Grid) -> Result<Tensor> {
        x.apply_op1_no_bwd(&AddDepthwise { convolution: self, grid })
    }
}

struct AddDepthwise<'a> {
    convolution: &'a Depthwise,
    grid: Grid,
}

impl candle_core::CustomOp1 for AddDepthwise<'_> {
    fn name(&self) -> &'static str {
        "depthwise convolution"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = contiguous(storage, layout)?;
        let (height, width) = self.grid;
        let Depthwise { weight, bias } = self.convolution;
        let channels = bias.len();
        if x.len() != height * width * channels {
            bail!("{} values are no map of {height} x {width} x {channels}", x.len());
        }
        let mut out = x.to_vec();
        pool().chunks(&mut out, width * channels, |row, line| {
            for (column, place) in line.chunks_exact_mut(channels).enumerate() {
                place.iter_mut().zip(bias).for_each(|(o, b)| *o += b);
                for (tap, weight) in weight.chunks_exact(channels).enumerate() {
                    let y = (row + tap / TAPS).checked_sub(1).filter(|y| *y < height);
                    let x_at = (column + tap % TAPS).checked_sub(1).filter(|x| *x < width);
                    let (Some(y), Some(x_at)) = (y, x_at) else { continue };
                    let seen = &x[(y * width + x_at) * channels..][..channels];
                    let taps = weight.iter().zip(seen);
                    place.iter_mut().zip(taps).for_each(|(o, (w, v))| *o += w * v);
                }
            }
        });
        Ok((CpuStorage::F32(out), Shape::from((height * width, channels))))
    }
}

/// An image `[3, h, w]` as a feature map `[h·w, 3]`.
pub(super) fn to_map(pixels: &Tensor) -> Result<(Tensor, Grid)> {
    let (channels, height, width) = pixels.dims3()?;
    let map = pixels.reshape((channels, height * width))?.t()?.contiguous()?;
    Ok((map, (height, width)))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn numbers(shape: &[usize]) -> Tensor {
        let count: usize = shape.iter().product();
        let values = (0..count).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0);
        Tensor::from_iter(values, &Device::Cpu).and_then(|t| t.reshape(shape)).expect("it fits")
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().and_then(|t| t.to_vec1()).expect("f32")
    }

    fn close(ours: &Tensor, candle: &Tensor) {
        let (a, b) = (values(ours), values(candle));
        assert_eq!(a.len(), b.len());
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5), "{a:?}\n{b:?}");
    }

    /// candle's result `[1, C, h, w]` as `[h·w, C]`.
    fn as_map(x: &Tensor) -> Tensor {
        let (_, c, h, w) = x.dims4().expect("four dimensions");
        let map = x.reshape((c, h * w)).and_then(|x| x.t()).and_then(|x| x.contiguous());
        map.expect("it is on the CPU")
    }

    #[test]
    fn strided_convolutions_are_candles() {
        for (size, stride, padding) in [(7, 4, 3), (3, 2, 1), (2, 2, 0)] {
            let (pixels, weight) = (numbers(&[3, 9, 11]), numbers(&[5, 3, size, size]));
            let bias = numbers(&[5]);
            let linear =
                Linear::from_values(values(&weight), Some(values(&bias)), (3 * size * size, 5));
            let convolution =
                PatchConvolution { weight: linear.expect("it fits"), size, stride, padding };
            let (map, grid) = to_map(&pixels).expect("an image");
            let (ours, out) = convolution.forward(&map, grid).expect("it fits");
            let candle = pixels.unsqueeze(0).expect("one image");
            let candle = candle.conv2d(&weight, padding, stride, 1, 1).expect("it fits");
            assert_eq!(candle.dims(), [1, 5, out.0, out.1]);
            let candle = as_map(&candle).broadcast_add(&bias).expect("one bias per channel");
            close(&ours, &candle);
        }
    }

    #[test]
    fn depthwise_convolutions_are_candles() {
        let (pixels, weight, bias) = (numbers(&[4, 5, 6]), numbers(&[4, 1, 3, 3]), numbers(&[4]));
        let taps = weight.reshape((4, 9)).and_then(|w| w.t()).and_then(|w| w.contiguous());
        let convolution =
            Depthwise { weight: values(&taps.expect("nine taps")), bias: values(&bias) };
        let map = pixels.reshape((4, 30)).and_then(|x| x.t()).and_then(|x| x.contiguous());
        let map = map.expect("an image");
        let ours = convolution.add_to(&map, (5, 6)).expect("it fits");
        let candle = pixels.unsqueeze(0).expect("one image");
        let candle = candle.conv2d(&weight, 1, 1, 1, 4).expect("it fits");
        let candle = as_map(&candle).broadcast_add(&bias).and_then(|y| y + map);
        close(&ours, &candle.expect("same shapes"));
    }

    #[test]
    fn maps_smaller_than_a_patch_are_refused() {
        let linear = Linear::from_values(vec![0.0; 49], None, (49, 1)).expect("it fits");
        let convolution = PatchConvolution { weight: linear, size: 7, stride: 4, padding: 0 };
        assert!(convolution.forward(&numbers(&[4, 1]), (2, 2)).is_err());
    }
}
