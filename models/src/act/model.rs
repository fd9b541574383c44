//! The network, stage by stage.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Result, Tensor};

use super::config::ActConfig;
use super::transformer::{Decoder, Encoder};
use crate::ModelError;
use crate::backbones::resnet::{Naming, Norm, ResNet};
use crate::checkpoint::Checkpoint;
use crate::kernels::{Activation, Linear, Map, Matrix};

/// The latent is zero at inference, so its projection's bias is all that is used of it.
const LATENT: &str = "encoder_latent_input_proj.bias";

/// An ACT network.
pub struct Act {
    backbone: Option<(ResNet, Linear)>,
    /// `D` values.
    latent: Vec<f32>,
    state: Option<Linear>,
    environment: Option<Linear>,
    /// Positions of the tokens that stand for no image, `[n, D]`.
    positions: Matrix,
    /// Those of feature maps, by height and width: as many as there are sizes of images.
    tables: Mutex<BTreeMap<(usize, usize), Arc<Matrix>>>,
    encoder: Encoder,
    decoder: Decoder,
    head: Linear,
    width: usize,
}

/// What the decoder reads: the encoder's tokens, with the positions they had.
#[derive(Debug, Clone)]
pub struct Encoded {
    /// Tokens as they entered the encoder, `[L, D]`.
    pub inputs: Matrix,
    /// Their positions, `[L, D]`.
    pub positions: Matrix,
    /// Tokens as they left it, `[L, D]`.
    pub tokens: Matrix,
}

impl Act {
    /// Builds the network from `checkpoint`.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor or key that does not fit.
    pub fn load(checkpoint: &Checkpoint) -> std::result::Result<Self, ModelError> {
        let config = &ActConfig::of(checkpoint)?;
        let (store, features) = (&checkpoint.store, &checkpoint.features);
        let (path, width) = (&checkpoint.config_path(), config.dim_model);
        let state = features.input_dim(path, "observation.state")?;
        let environment = features.input_dim(path, "observation.environment_state")?;
        let project = |name: &str, inputs: Option<usize>| {
            inputs.map(|inputs| Linear::load(store, name, inputs, width, true)).transpose()
        };
        let backbone = match features.cameras().next() {
            Some(_) => {
                let net = ResNet::load(store, "backbone", Naming::Torchvision, Norm::Batch)?;
                let shape = [width, net.outputs(), 1, 1];
                let name = "encoder_img_feat_input_proj";
                Some((net, Linear::load_shaped(store, name, &shape, true)?))
            }
            None => None,
        };
        let single = 1 + usize::from(state.is_some()) + usize::from(environment.is_some());
        Ok(Self {
            backbone,
            latent: store.vector(LATENT, width)?,
            state: project("encoder_robot_state_input_proj", state)?,
            environment: project("encoder_env_state_input_proj", environment)?,
            positions: Matrix::of_tensor(
                &store.tensor("encoder_1d_feature_pos_embed.weight", &[single, width])?,
            )?,
            tables: Mutex::default(),
            encoder: Encoder::load(store, config)?,
            decoder: Decoder::load(store, config)?,
            head: Linear::load(store, "action_head", width, features.action_dim(path)?, true)?,
            width,
        })
    }

    /// One image (`[3, height, width]`, normalised) as a feature map.
    ///
    /// # Errors
    /// When the network has no camera.
    pub fn encode_image(&self, pixels: &Tensor) -> Result<Map> {
        match &self.backbone {
            Some((net, _)) => net.forward(pixels),
            None => candle_core::bail!("this network takes no images"),
        }
    }

    /// The encoder's tokens of a state, an environment state (both normalised) and the cameras' feature maps.
    ///
    /// # Errors
    /// When an input is missing, superfluous or of another width.
    pub fn encode(
        &self,
        state: Option<&[f32]>,
        environment: Option<&[f32]>,
        maps: &[Map],
    ) -> Result<Encoded> {
        let mut tokens = vec![Matrix::of_rows([self.latent.as_slice()].into_iter(), self.width)];
        for (values, projection, name) in
            [(state, &self.state, "state"), (environment, &self.environment, "environment state")]
        {
            match (values, projection) {
                (Some(values), Some(linear)) => {
                    let row = Matrix::of_rows([values].into_iter(), values.len());
                    tokens.push(linear.through(&row, Activation::None, None)?);
                }
                (None, None) => {}
                _ => candle_core::bail!("the {name} is missing, or the network takes none"),
            }
        }
        let mut positions = Vec::new();
        for map in maps {
            let Some((_, projection)) = &self.backbone else {
                candle_core::bail!("this network takes no images")
            };
            tokens.push(projection.through(&map.values, Activation::None, None)?);
            positions.push(self.table(map.size)?);
        }
        let inputs = Matrix::stacked(tokens.iter(), self.width)?;
        let positions = positions.iter().map(|table| &**table);
        let positions =
            Matrix::stacked(std::iter::once(&self.positions).chain(positions), self.width)?;
        let tokens = self.encoder.through(&inputs, &positions)?;
        Ok(Encoded { inputs, positions, tokens })
    }

    /// Positions of a feature map of this height and width.
    fn table(&self, size: (usize, usize)) -> Result<Arc<Matrix>> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = tables.get(&size) {
            return Ok(table.clone());
        }
        let table = Arc::new(Matrix::of_tensor(&sine_positions(size.0, size.1, self.width)?)?);
        tables.insert(size, table.clone());
        Ok(table)
    }

    /// The decoder's output, `[H, D]`.
    ///
    /// # Errors
    /// Never for what [`Self::encode`] gave.
    pub fn decode(&self, encoded: &Encoded) -> Result<Matrix> {
        self.decoder.through(&encoded.tokens, &encoded.positions)
    }

    /// Normalised actions of the decoder's output.
    ///
    /// # Errors
    /// Never for what [`Self::decode`] gave.
    pub fn actions(&self, decoded: &Matrix) -> Result<Matrix> {
        self.head.through(decoded, Activation::None, None)
    }
}

/// Sine positions of a feature map, row by row: `[rows·columns, width]`; `width` is a multiple of 4.
///
/// The first half of the width holds rows, the second columns; both run to 2π, each pair of values a sine and a
/// cosine. Computed in single precision, as in training.
///
/// # Errors
/// When the table cannot be allocated.
pub fn sine_positions(rows: usize, columns: usize, width: usize) -> Result<Tensor> {
    let half = width / 2;
    let frequencies: Vec<f32> =
        (0..half).map(|k| 10_000f32.powf((2 * (k / 2)) as f32 / half as f32)).collect();
    let place = |index: usize, length: usize| {
        (index + 1) as f32 / (length as f32 + 1e-6) * std::f32::consts::TAU
    };
    let axis = |angle: f32, out: &mut Vec<f32>| {
        out.extend(frequencies.iter().enumerate().map(|(k, frequency)| {
            let angle = angle / frequency;
            if k % 2 == 0 { angle.sin() } else { angle.cos() }
        }));
    };
    let mut table = Vec::with_capacity(rows * columns * width);
    for row in 0..rows {
        for column in 0..columns {
            axis(place(row, rows), &mut table);
            axis(place(column, columns), &mut table);
        }
    }
    Tensor::from_vec(table, (rows * columns, width), &Device::Cpu)
}
