//! The network, stage by stage.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Result;

use super::config::ActConfig;
use super::transformer::{Decoder, Encoder};
use crate::ModelError;
use crate::backbones::resnet::{Naming, Norm, ResNet};
use crate::checkpoint::Checkpoint;
use crate::kernels::{Linear, Map, Matrix, Planes};

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
            positions: store.matrix("encoder_1d_feature_pos_embed.weight", &[single, width])?,
            tables: Mutex::default(),
            encoder: Encoder::load(store, config)?,
            decoder: Decoder::load(store, config)?,
            head: Linear::load(store, "action_head", width, features.action_dim(path)?, true)?,
            width,
        })
    }

    /// One image (three planes, normalised) as a feature map.
    ///
    /// # Errors
    /// When the network has no camera.
    pub fn encode_image(&self, pixels: &Planes) -> Result<Map> {
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
        let mut tokens = vec![Matrix::of_row(&self.latent)];
        for (values, projection, name) in
            [(state, &self.state, "state"), (environment, &self.environment, "environment state")]
        {
            match (values, projection) {
                (Some(values), Some(linear)) => {
                    tokens.push(linear.forward(&Matrix::of_row(values))?);
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
            tokens.push(projection.forward(&map.values)?);
            positions.push(self.table(map.size));
        }
        let inputs = Matrix::stacked(tokens.iter(), self.width)?;
        let positions = positions.iter().map(|table| &**table);
        let positions =
            Matrix::stacked(std::iter::once(&self.positions).chain(positions), self.width)?;
        let tokens = self.encoder.forward(&inputs, &positions)?;
        Ok(Encoded { inputs, positions, tokens })
    }

    /// Positions of a feature map of this height and width.
    fn table(&self, size: (usize, usize)) -> Arc<Matrix> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let table = || Arc::new(sine_positions(size.0, size.1, self.width));
        tables.entry(size).or_insert_with(table).clone()
    }

    /// The decoder's output, `[H, D]`.
    ///
    /// # Errors
    /// Never for what [`Self::encode`] gave.
    pub fn decode(&self, encoded: &Encoded) -> Result<Matrix> {
        self.decoder.forward(&encoded.tokens, &encoded.positions)
    }

    /// Normalised actions of the decoder's output.
    ///
    /// # Errors
    /// Never for what [`Self::decode`] gave.
    pub fn actions(&self, decoded: &Matrix) -> Result<Matrix> {
        self.head.forward(decoded)
    }
}

/// Sine positions of a feature map, row by row: `[rows·columns, width]`; `width` is a multiple of 4.
///
/// The first half of the width holds rows, the second columns; both run to 2π, each pair of values a sine and a
/// cosine. Computed in single precision, as in training.
pub fn sine_positions(rows: usize, columns: usize, width: usize) -> Matrix {
    let half = width / 2;
    let frequencies: Vec<f32> =
        (0..half).map(|k| 10_000f32.powf((2 * (k / 2)) as f32 / half as f32)).collect();
    let place = |index: usize, length: usize| {
        (index + 1) as f32 / (length as f32 + 1e-6) * std::f32::consts::TAU
    };
    let axis = |angle: f32, out: &mut [f32]| {
        for (k, (value, frequency)) in out.iter_mut().zip(&frequencies).enumerate() {
            let angle = angle / frequency;
            *value = if k % 2 == 0 { angle.sin() } else { angle.cos() };
        }
    };
    let mut table = Matrix::unwritten(rows * columns, width);
    for (index, values) in table.values_mut().chunks_exact_mut(width.max(1)).enumerate() {
        let (of_row, of_column) = values.split_at_mut(half);
        axis(place(index / columns, rows), of_row);
        axis(place(index % columns, columns), of_column);
    }
    table
}
