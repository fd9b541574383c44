//! Images to features: ResNet, keypoints by spatial softmax, one layer.
//!
//! Source: Levine et al. 2016 (arXiv 1504.00702) for the spatial softmax; LeRobot's `DiffusionRgbEncoder`.

use candle_core::{Device, Result, Tensor};

use crate::ModelError;
use crate::backbones::resnet::{Naming, Norm, ResNet};
use crate::checkpoint::TensorStore;
use crate::kernels::{Activation, Linear, Map};

/// What one image became.
#[derive(Debug, Clone)]
pub struct RgbFeatures {
    /// The ResNet's last feature map.
    pub map: Map,
    /// Where each keypoint is, `[K, 2]`: x and y from −1 to 1.
    pub keypoints: Tensor,
    /// Features, `[1, 2·K]`.
    pub features: Tensor,
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

    /// One image (`[3, height, width]`, normalised, resized and cropped) through the encoder.
    ///
    /// # Errors
    /// When `pixels` has no three channels.
    pub fn forward(&self, pixels: &Tensor) -> Result<RgbFeatures> {
        let map = self.backbone.forward(pixels)?;
        let (rows, columns) = map.size;
        let heat = self.heat.through(&map.values, Activation::None, None)?;
        let heat = heat.to_tensor()?.t()?.contiguous()?;
        let weights = candle_nn::ops::softmax_last_dim(&heat)?;
        let keypoints = weights.matmul(&grid(rows, columns)?)?;
        let flat = keypoints.reshape((1, keypoints.elem_count()))?;
        let features = self.out.forward(&flat)?.relu()?;
        Ok(RgbFeatures { map, keypoints, features })
    }
}

/// Places of a map row by row, `[rows·columns, 2]`: x and y, from −1 to 1 inclusive.
fn grid(rows: usize, columns: usize) -> Result<Tensor> {
    // A single row or column lies at −1, as NumPy's `linspace` has it.
    let place =
        |index: usize, count: usize| (-1.0 + 2.0 * index as f64 / (count.max(2) - 1) as f64) as f32;
    let values: Vec<f32> = (0..rows)
        .flat_map(|r| (0..columns).flat_map(move |c| [place(c, columns), place(r, rows)]))
        .collect();
    Tensor::from_vec(values, (rows * columns, 2), &Device::Cpu)
}
