//! The networks of a Diffusion Policy, stage by stage.

use std::sync::Arc;

use candle_core::{Result, bail};

use super::ENVIRONMENT;
use super::config::{Denoiser, DiffusionConfig};
use super::encoder::{RgbEncoder, RgbFeatures};
use super::transformer::Transformer;
use super::unet::Unet;
use crate::ModelError;
use crate::backbones::resnet::Norm;
use crate::caches::{Block, Branches};
use crate::checkpoint::Checkpoint;
use crate::kernels::{Matrix, Planes};
use crate::processors::crop::{center_crop, resize_smooth};

/// What the denoiser is told of the observations: one row for each, oldest first, `[n_obs_steps, width]`.
#[derive(Debug, Clone)]
pub struct Condition {
    rows: Matrix,
    /// The same as one row.
    flat: Matrix,
}

impl Condition {
    /// The condition of `rows` (`[n_obs_steps, width]`).
    pub fn new(rows: Matrix) -> Self {
        let flat = Matrix::of_row(rows.values());
        Self { rows, flat }
    }

    /// One row for each observation, `[n_obs_steps, width]`.
    pub fn rows(&self) -> &Matrix {
        &self.rows
    }

    /// All of it, `[1, n_obs_steps·width]`.
    pub fn flat(&self) -> &Matrix {
        &self.flat
    }
}

/// No sample has more values.
const SAMPLE_LIMIT: usize = 1 << 22;

enum Network {
    Unet(Box<Unet>),
    Transformer(Box<Transformer>),
}

/// The networks of a Diffusion Policy.
pub struct DiffusionModel {
    /// One for all cameras, or one for each.
    encoders: Vec<RgbEncoder>,
    network: Network,
    /// Width and height.
    resize: Option<(usize, usize)>,
    /// Width and height.
    crop: Option<(usize, usize)>,
    shape: (usize, usize),
    environment: Option<usize>,
}

impl DiffusionModel {
    /// Builds the networks from `checkpoint`.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor or key that does not fit.
    pub fn load(checkpoint: &Checkpoint) -> std::result::Result<Self, ModelError> {
        let config = &DiffusionConfig::of(checkpoint)?;
        let (store, features) = (&checkpoint.store, &checkpoint.features);
        let path = &checkpoint.config_path();
        let (state, action) = (features.state_dim(path)?, features.action_dim(path)?);
        if config.horizon * action > SAMPLE_LIMIT {
            let reason = format!("is {}, with {action} values an action", config.horizon);
            return Err(ModelError::config(path, "horizon", reason));
        }
        let environment = features.input_dim(path, ENVIRONMENT)?;
        let cameras = features.cameras().count();
        let keypoints = config.spatial_softmax_num_keypoints;
        let norm = if config.use_group_norm { Norm::Group } else { Norm::Batch };
        let load = |prefix: &str| RgbEncoder::load(store, prefix, keypoints, norm);
        let encoders = match (cameras, config.use_separate_rgb_encoder_per_camera) {
            (0, _) => Vec::new(),
            (_, false) => vec![load("rgb_encoder")?],
            (_, true) => (0..cameras)
                .map(|i| load(&format!("rgb_encoder.{i}")))
                .collect::<std::result::Result<_, ModelError>>()?,
        };
        let width = state + 2 * keypoints * cameras + environment.unwrap_or(0);
        let network = match config.denoiser {
            Denoiser::Unet => {
                let seen = width * config.n_obs_steps;
                Network::Unet(Box::new(Unet::load(store, config, action, seen)?))
            }
            Denoiser::Transformer => {
                Network::Transformer(Box::new(Transformer::load(store, config, action, width)?))
            }
        };
        let flip = |shape: Option<(usize, usize)>| shape.map(|(height, width)| (width, height));
        Ok(Self {
            encoders,
            network,
            resize: flip(config.resize_shape),
            crop: flip(config.crop_shape),
            shape: (config.horizon, action),
            environment,
        })
    }

    /// Shape of the sample that is denoised, `(H, A)`.
    pub fn sample_shape(&self) -> (usize, usize) {
        self.shape
    }

    /// A normalised image as the encoder takes it: resized, the middle cut out.
    ///
    /// # Errors
    /// When the image is smaller than what is to be cut out of it.
    pub fn prepare(&self, planes: Planes) -> Result<Planes> {
        let planes = match self.resize {
            Some(to) => resize_smooth(planes, to),
            None => planes,
        };
        let Some(to) = self.crop else { return Ok(planes) };
        let (height, width) = planes.size;
        match center_crop(&planes, to) {
            Some(middle) => Ok(middle),
            None => bail!(
                "an image of {width} x {height} pixels is smaller than the {} x {} that the policy cuts out of it",
                to.0,
                to.1
            ),
        }
    }

    /// One prepared image of camera `camera` through its encoder.
    ///
    /// # Errors
    /// When there is no such camera.
    pub fn encode_image(&self, camera: usize, pixels: &Planes) -> Result<RgbFeatures> {
        match self.encoders.get(camera).or(self.encoders.first()) {
            Some(encoder) => encoder.forward(pixels),
            None => bail!("this network takes no images"),
        }
    }

    /// One observation as the denoiser is told of it, `[1, width]`: normalised state, the cameras' features in order,
    /// normalised environment state.
    ///
    /// # Errors
    /// When the environment state is missing or superfluous.
    pub fn observation(
        &self,
        state: &[f32],
        features: &[Arc<Matrix>],
        environment: Option<&[f32]>,
    ) -> Result<Matrix> {
        if environment.map(<[f32]>::len) != self.environment {
            bail!("the environment state is missing, or the network takes another");
        }
        let (state, environment) = (Matrix::of_row(state), environment.map(Matrix::of_row));
        let features = features.iter().map(|features| &**features);
        let parts: Vec<_> = std::iter::once(&state).chain(features).chain(&environment).collect();
        Matrix::beside(&parts)
    }

    /// What the network says of the sample `x` (`[H, A]`) at training step `t`.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn predict(&self, x: &Matrix, t: usize, condition: &Condition) -> Result<Matrix> {
        self.predict_with(x, &[t], condition, &mut Branches::off())
    }

    /// As [`Self::predict`], at one training step or, where the network was trained so, one for each action, with what
    /// `branches` computes of the denoiser's.
    ///
    /// # Errors
    /// As there.
    pub fn predict_with(
        &self,
        x: &Matrix,
        times: &[usize],
        condition: &Condition,
        branches: &mut Branches,
    ) -> Result<Matrix> {
        match &self.network {
            Network::Unet(unet) => unet.forward(x, times, condition.flat(), branches),
            Network::Transformer(network) => match times {
                [t] => network.forward(x, *t, condition.rows(), branches),
                _ => bail!("this network has one timestep for all actions"),
            },
        }
    }

    /// The denoiser's residual branches.
    pub fn blocks(&self) -> Vec<Block> {
        match &self.network {
            Network::Unet(unet) => unet.blocks(),
            Network::Transformer(transformer) => transformer.blocks(),
        }
    }
}
