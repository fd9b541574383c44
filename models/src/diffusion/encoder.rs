//! Images to features: ResNet, keypoints by spatial softmax, one layer.
//!
//! Source: Levine et al. 2016 (arXiv 1504.00702) for the spatial softmax; LeRobot's `DiffusionRgbEncoder`.

use candle_core::Result;

use crate::ModelError;
use crate::backbones::resnet::{Naming, Norm, ResNet};
use crate::checkpoint::TensorStore;
use crate::kernels::{Activation, Linear, Map, Matrix, Planes};

/// What one image became.
#[derive(Debug, Clone)]
pub struct RgbFeatures {
    /// The ResNet's last feature map.
    pub map: Map,
    /// Where each keypoint is, `[K, 2]`: x and y from −1 to 1.
    pub keypoints: Matrix,
    /// Features, `[1, 2·K]`.
    pub features: Matrix,
}

/// The encoder of one camera, or of all.
pub struct RgbEncoder {
    backbone: ResNet,
    /// A 1 × 1 convolution to one map for each keypoint.
    heat: Linear,
    out: Linear,
}

impl RgbEncoder {
    /// The encoder whose tensors lie under `prefix`.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor that is missing or does not fit.
    pub fn load(
        store: &TensorStore,
        prefix: &str,
        keypoints: usize,
        norm: Norm,
    ) -> std::result::Result<Self, ModelError> {
        let name = |part: &str| format!("{prefix}.{part}");
        let backbone = ResNet::load(store, &name("backbone"), Naming::Sequential, norm)?;
        let shape = [keypoints, backbone.outputs(), 1, 1];
        Ok(Self {
            heat: Linear::load_shaped(store, &name("pool.nets"), &shape, true)?,
            out: Linear::load(store, &name("out"), 2 * keypoints, 2 * keypoints, true)?,
            backbone,
        })
    }

    /// One image (three planes, normalised, resized and cropped) through the encoder.
    ///
    /// # Errors
    /// When `pixels` has no three planes.
    pub fn forward(&self, pixels: &Planes) -> Result<RgbFeatures> {
        let map = self.backbone.forward(pixels)?;
        let keypoints = middles(&self.heat.forward(&map.values)?.transposed(), map.size);
        let flat = Matrix::of_row(keypoints.values());
        let features = self.out.forward_with(&flat, Activation::Relu)?;
        Ok(RgbFeatures { map, keypoints, features })
    }
}

/// Where each map of `heat` (`[K, height·width]`) has its middle when its places weigh as much as its softmax says:
/// `[K, 2]`, x and y from −1 to 1 inclusive.
fn middles(heat: &Matrix, (height, width): (usize, usize)) -> Matrix {
    let mut middles = Matrix::unwritten(heat.rows(), 2);
    for (heat, middle) in heat.iter().zip(middles.values_mut().chunks_exact_mut(2)) {
        let largest = heat.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (mut whole, mut x, mut y) = (0.0, 0.0, 0.0);
        for (row, line) in heat.chunks_exact(width.max(1)).enumerate() {
            let mut of_line = 0.0;
            for (column, heat) in line.iter().enumerate() {
                let weight = (heat - largest).exp();
                of_line += weight;
                x += weight * place(column, width);
            }
            whole += of_line;
            y += of_line * place(row, height);
        }
        middle.copy_from_slice(&[x / whole, y / whole]);
    }
    middles
}

/// Place `index` of `count` from −1 to 1. A single one lies at −1, as NumPy's `linspace` has it.
fn place(index: usize, count: usize) -> f32 {
    (-1.0 + 2.0 * index as f64 / (count.max(2) - 1) as f64) as f32
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Device, Tensor};

    use super::*;

    #[test]
    fn middles_are_those_of_a_softmax_over_the_places() -> Result<()> {
        let (height, width, maps) = (3, 4, 5);
        let heat = (0..maps * height * width).map(|i| (i * 31 % 17) as f32 / 3.0 - 1.0);
        let heat = Tensor::from_iter(heat, &Device::Cpu)?.reshape((maps, height * width))?;
        let grid = (0..height).flat_map(|row| {
            (0..width).flat_map(move |column| [place(column, width), place(row, height)])
        });
        let grid = Tensor::from_iter(grid, &Device::Cpu)?.reshape((height * width, 2))?;
        let expected = candle_nn::ops::softmax(&heat, D::Minus1)?.matmul(&grid)?;
        let found = middles(&Matrix::of_tensor(&heat)?, (height, width)).to_tensor()?;
        assert!((found - expected)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-6);
        let one = middles(&Matrix::of_row(&[3.0]), (1, 1));
        assert_eq!(one.values(), [-1.0, -1.0]);
        let broken = middles(&Matrix::of_row(&[3.0, f32::NAN]), (1, 2));
        assert!(broken.values().iter().all(|v| v.is_nan()), "what is no number stays visible");
        Ok(())
    }
}
