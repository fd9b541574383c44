//! Convolutions over feature maps that lie channel by channel at each place (`[h·w, C]`).
//!
//! candle convolves channels first, and a depthwise convolution one channel at a time.

use candle_core::{Result, bail};

use crate::ModelError;
use crate::checkpoint::TensorStore;
use crate::kernels::pool::pool;
use crate::kernels::{Linear, Matrix};

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
    pub fn forward(&self, x: &Matrix, grid: Grid) -> Result<(Matrix, Grid)> {
        let out = self.grid(grid)?;
        Ok((self.weight.forward(&self.gather(x, grid, out))?, out))
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

    /// Patches of `x` in the order of the convolution's weights: `[out rows·columns, C·size²]`.
    fn gather(&self, x: &Matrix, (height, width): Grid, (rows, columns): Grid) -> Matrix {
        let Self { size, stride, padding, .. } = *self;
        let channels = x.width();
        let patch = channels * size * size;
        let mut out = Matrix::unwritten(rows * columns, patch);
        pool().chunks(out.values_mut(), columns * patch, |row, line| {
            // What lies outside stays so.
            line.fill(0.0);
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
                        let place = x.row(y * width + x_at);
                        let taps = patch[dy * size + dx..].iter_mut().step_by(size * size);
                        taps.zip(place).for_each(|(tap, value)| *tap = *value);
                    }
                }
            }
        });
        out
    }
}

/// Side of the depthwise convolutions.
const TAPS: usize = 3;

/// A depthwise 3 × 3 convolution that is added to its input.
pub(super) struct Depthwise {
    /// Tap by tap, `[9, C]`.
    weight: Matrix,
    bias: Vec<f32>,
}

impl Depthwise {
    pub fn load(
        store: &TensorStore,
        name: &str,
        channels: usize,
    ) -> std::result::Result<Self, ModelError> {
        let stored = store.matrix(&format!("{name}.weight"), &[channels, 1, TAPS, TAPS])?;
        let weight = stored.reshaped(channels, TAPS * TAPS)?.transposed();
        Ok(Self { weight, bias: store.vector(&format!("{name}.bias"), channels)? })
    }

    /// `x + convolution(x)` of `x` (`[h·w, C]`), zero outside.
    pub fn add_to(&self, x: &Matrix, (height, width): Grid) -> Result<Matrix> {
        let channels = self.bias.len();
        if x.dims() != (height * width, channels) {
            bail!("{:?} values are no map of {height} x {width} x {channels}", x.dims());
        }
        let mut out = Matrix::unwritten(height * width, channels);
        pool().chunks(out.values_mut(), width * channels, |row, line| {
            line.copy_from_slice(&x.values()[row * width * channels..][..line.len()]);
            for (column, place) in line.chunks_exact_mut(channels).enumerate() {
                place.iter_mut().zip(&self.bias).for_each(|(o, b)| *o += b);
                for (tap, weight) in self.weight.iter().enumerate() {
                    let y = (row + tap / TAPS).checked_sub(1).filter(|y| *y < height);
                    let x_at = (column + tap % TAPS).checked_sub(1).filter(|x| *x < width);
                    let (Some(y), Some(x_at)) = (y, x_at) else { continue };
                    let taps = weight.iter().zip(x.row(y * width + x_at));
                    place.iter_mut().zip(taps).for_each(|(o, (w, v))| *o += w * v);
                }
            }
        });
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    fn numbers(shape: &[usize]) -> Tensor {
        let count: usize = shape.iter().product();
        let values = (0..count).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0);
        Tensor::from_iter(values, &Device::Cpu).and_then(|t| t.reshape(shape)).expect("it fits")
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().and_then(|t| t.to_vec1()).expect("f32")
    }

    fn close(ours: &Matrix, candle: &Tensor) {
        let (a, b) = (ours.values(), values(candle));
        assert_eq!(a.len(), b.len());
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5), "{a:?}\n{b:?}");
    }

    /// candle's map `[1, C, h, w]` as `[h·w, C]`.
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
            let pixels = pixels.unsqueeze(0).expect("one image");
            let map = Matrix::of_tensor(&as_map(&pixels)).expect("two dimensions");
            let (ours, out) = convolution.forward(&map, (9, 11)).expect("it fits");
            let candle = pixels.conv2d(&weight, padding, stride, 1, 1).expect("it fits");
            assert_eq!(candle.dims(), [1, 5, out.0, out.1]);
            let candle = as_map(&candle).broadcast_add(&bias).expect("one bias per channel");
            close(&ours, &candle);
        }
    }

    #[test]
    fn depthwise_convolutions_are_candles() {
        let (pixels, weight, bias) = (numbers(&[4, 5, 6]), numbers(&[4, 1, 3, 3]), numbers(&[4]));
        let taps = weight.reshape((4, 9)).and_then(|w| w.t()).and_then(|w| w.contiguous());
        let taps = taps.and_then(|w| Matrix::of_tensor(&w)).expect("nine taps");
        let convolution = Depthwise { weight: taps, bias: values(&bias) };
        let pixels = pixels.unsqueeze(0).expect("one image");
        let map = as_map(&pixels);
        let x = Matrix::of_tensor(&map).expect("two dimensions");
        let ours = convolution.add_to(&x, (5, 6)).expect("it fits");
        let candle = pixels.conv2d(&weight, 1, 1, 1, 4).expect("it fits");
        let candle = as_map(&candle).broadcast_add(&bias).and_then(|y| y + map);
        close(&ours, &candle.expect("same shapes"));
    }

    #[test]
    fn maps_smaller_than_a_patch_are_refused() {
        let linear = Linear::from_values(vec![0.0; 49], None, (49, 1)).expect("it fits");
        let convolution = PatchConvolution { weight: linear, size: 7, stride: 4, padding: 0 };
        assert!(convolution.forward(&Matrix::zeros(4, 1), (2, 2)).is_err());
    }
}
