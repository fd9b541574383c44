//! The vision tower (DaViT) and the projector to the encoder's tokens.

use candle_core::{Result, bail};

use super::EPS;
use super::block::Block;
use super::config::VisionConfig;
use super::convolution::{Grid, PatchConvolution};
use super::names::OLD_PROJECTION;
use crate::ModelError;
use crate::checkpoint::TensorStore;
use crate::kernels::{LayerNorm, Linear, Map, Matrix, Planes, add_all, sum};

/// What one image became.
#[derive(Debug, Clone)]
pub struct VisionFeatures {
    /// The tower's last feature map, `[h·w, C]`.
    pub last_hidden: Matrix,
    /// Tokens, `[1 + h·w, D]`: the mean over all places, then every place.
    pub tokens: Matrix,
}

struct Stage {
    convolution: PatchConvolution,
    norm: LayerNorm,
    norm_first: bool,
    blocks: Vec<Block>,
}

impl Stage {
    fn load(
        store: &TensorStore,
        config: &VisionConfig,
        stage: usize,
    ) -> std::result::Result<Self, ModelError> {
        let outputs = config.embed_dim[stage];
        let inputs = match stage.checked_sub(1) {
            Some(before) => config.embed_dim[before],
            None => config.in_channels,
        };
        let norm_first = config.patch_prenorm[stage];
        let normed = if norm_first { inputs } else { outputs };
        let shape =
            (config.patch_size[stage], config.patch_stride[stage], config.patch_padding[stage]);
        let name = |part: &str| format!("davit.convs.{stage}.{part}");
        let block = |i| Block::load(store, &format!("davit.blocks.{stage}.{i}"), config, stage);
        Ok(Self {
            convolution: PatchConvolution::load(store, &name("conv"), (inputs, outputs), shape)?,
            norm: LayerNorm::load(store, &name("norm"), normed, EPS)?,
            norm_first,
            blocks: (0..config.depths[stage]).map(block).collect::<std::result::Result<_, _>>()?,
        })
    }

    fn forward(&self, x: &Matrix, grid: Grid) -> Result<(Matrix, Grid)> {
        let (x, grid) = if self.norm_first {
            self.convolution.forward(&self.norm.forward(x)?, grid)?
        } else {
            let (x, grid) = self.convolution.forward(x, grid)?;
            (self.norm.forward(&x)?, grid)
        };
        let x = self.blocks.iter().try_fold(x, |x, block| block.forward(x, grid))?;
        Ok((x, grid))
    }
}

/// Vision tower and projector.
pub struct VisionTower {
    stages: Vec<Stage>,
    /// `[rows, C − C/2]` and `[rows, C/2]`.
    columns: Matrix,
    rows: Matrix,
    /// `[1, C]`: the first row of the temporal table, for a single image.
    instant: Matrix,
    projection: Linear,
    norm: LayerNorm,
}

impl VisionTower {
    /// Builds tower and projector from tensors `davit.*` and `projector.*`.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor that does not fit.
    pub fn load(
        store: &TensorStore,
        config: &VisionConfig,
    ) -> std::result::Result<Self, ModelError> {
        let channels = config.embed_dim.last().copied().unwrap_or_default();
        let (across, table) = (channels - channels / 2, config.max_position_embeddings);
        let position = |part: &str, width| {
            let name = format!("projector.image_position_embed.{part}_embeddings.weight");
            store.matrix(&name, &[table, width])
        };
        let times = store.get(
            "projector.visual_temporal_embed.pos_idx_to_embed",
            &[config.max_temporal_embeddings, channels],
        )?;
        Ok(Self {
            stages: (0..config.stages())
                .map(|stage| Stage::load(store, config, stage))
                .collect::<std::result::Result<_, _>>()?,
            columns: position("column", across)?,
            rows: position("row", channels - across)?,
            instant: times.rows(&[0])?,
            projection: projection(store, channels, config.projection_dim)?,
            norm: LayerNorm::load(store, "projector.image_proj_norm", config.projection_dim, EPS)?,
        })
    }

    /// `pixels` (normalised) through tower and projector.
    ///
    /// # Errors
    /// When the image is too small for the patches or too large for the position tables.
    pub fn forward(&self, pixels: &Planes) -> Result<VisionFeatures> {
        // First of all: an image that is too large would take very long.
        let positions = self.positions(self.grid(pixels.size)?);
        let Map { values, size } = Map::of_planes(pixels);
        let (x, _) = self
            .stages
            .iter()
            .try_fold((values, size), |(x, grid), stage| stage.forward(&x, grid))?;
        let mut places = sum(&x, &positions)?;
        add_all(&mut places, &self.instant)?;
        let tokens = Matrix::stacked([&mean(&places), &places].into_iter(), places.width())?;
        let tokens = self.norm.forward(&self.projection.forward(&tokens)?)?;
        Ok(VisionFeatures { last_hidden: x, tokens })
    }

    /// Height and width of the last feature map of an image of `size` (height, width; pixels).
    ///
    /// # Errors
    /// When the image is too small for the patches or too large for the position tables.
    pub fn grid(&self, size: (usize, usize)) -> Result<(usize, usize)> {
        let last = self.stages.iter().try_fold(size, |grid, s| s.convolution.grid(grid))?;
        let ((height, width), most) = (last, self.rows.rows());
        if height > most || width > most {
            bail!("a feature map of {width} x {height} has more places than the {most} learned");
        }
        Ok(last)
    }

    /// Learned positions of a grid, `[h·w, C]`: the column's, then the row's.
    fn positions(&self, (height, width): Grid) -> Matrix {
        let across = self.columns.width();
        let mut positions = Matrix::unwritten(height * width, across + self.rows.width());
        for (y, down) in self.rows.iter().take(height).enumerate() {
            for (x, column) in self.columns.iter().take(width).enumerate() {
                let (left, right) = positions.row_mut(y * width + x).split_at_mut(across);
                left.copy_from_slice(column);
                right.copy_from_slice(down);
            }
        }
        positions
    }
}

/// The mean of the rows of `x`, as one row.
fn mean(x: &Matrix) -> Matrix {
    let mut mean = Matrix::zeros(1, x.width());
    for row in x.iter() {
        mean.values_mut().iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
    }
    mean.scaled((1.0 / x.rows() as f64) as f32)
}

/// The projection to the tokens' width. The older layout has it the other way round, under a name of its own.
fn projection(
    store: &TensorStore,
    channels: usize,
    width: usize,
) -> std::result::Result<Linear, ModelError> {
    if store.find(OLD_PROJECTION).is_err() {
        return Linear::load(store, "projector.image_projection", channels, width, false);
    }
    let turned = store.matrix(OLD_PROJECTION, &[channels, width])?.transposed();
    Ok(Linear::from_values(turned.values().to_vec(), None, (channels, width))?)
}
