//! The vision tower (SigLIP kind) and the connector to the text model.

use candle_core::Result;

use super::VlmConfig;
use crate::ModelError;
use crate::backbones::siglip::Siglip;
use crate::caches::KeptTower;
use crate::checkpoint::TensorStore;
use crate::kernels::{Linear, Matrix, Planes};

/// What one image became.
#[derive(Debug, Clone)]
pub struct VisionFeatures {
    /// The tower's output after its last norm, `[patches, Dv]`.
    pub last_hidden: Matrix,
    /// Tokens for the text model, `[tokens, D]`, not scaled.
    pub tokens: Matrix,
}

/// Vision tower and connector.
pub(super) struct Vision {
    tower: Siglip,
    scale: usize,
    connector: Linear,
}

impl Vision {
    /// Tower and connector; `film`: layers that the instruction scales and shifts.
    pub fn load(
        store: &TensorStore,
        config: &VlmConfig,
        film: bool,
    ) -> std::result::Result<Self, ModelError> {
        let words = config.text_config.hidden_size;
        let merged = config.vision_config.hidden_size * config.scale_factor * config.scale_factor;
        Ok(Self {
            tower: Siglip::load(store, &config.vision_config, film.then_some(words))?,
            scale: config.scale_factor,
            connector: Linear::load(store, "connector", merged, words, false)?,
        })
    }

    /// Pixels that a side must be a multiple of.
    pub fn granularity(&self) -> usize {
        self.tower.patch() * self.scale
    }

    /// `pixels` (in [−1, 1]) through tower and connector; `words` (`[1, D]`) is the
    /// instruction's mean embedding for layers that it scales and shifts.
    pub fn forward(&self, pixels: &Planes, words: Option<&Matrix>) -> Result<VisionFeatures> {
        let grid = self.grid(pixels)?;
        self.connect(self.tower.forward(pixels, words)?, grid)
    }

    /// As [`Self::forward`], with what `kept` says computed of the tower.
    pub fn forward_kept(&self, pixels: &Planes, kept: &mut KeptTower) -> Result<VisionFeatures> {
        let grid = self.grid(pixels)?;
        self.connect(kept.forward(&self.tower, pixels, grid)?, grid)
    }

    /// Rows and columns of patches.
    fn grid(&self, pixels: &Planes) -> Result<(usize, usize)> {
        let (height, width) = pixels.size;
        if !height.is_multiple_of(self.granularity()) || !width.is_multiple_of(self.granularity()) {
            candle_core::bail!(
                "an image of {width} x {height} pixels cannot be cut into squares of {}",
                self.granularity()
            );
        }
        Ok((height / self.tower.patch(), width / self.tower.patch()))
    }

    fn connect(
        &self,
        last_hidden: Matrix,
        (rows, columns): (usize, usize),
    ) -> Result<VisionFeatures> {
        let tokens = self.connector.forward(&self.merge(&last_hidden, rows, columns))?;
        Ok(VisionFeatures { last_hidden, tokens })
    }

    /// Squares of `scale × scale` patches side by side: `[tokens, scale²·Dv]`.
    fn merge(&self, h: &Matrix, rows: usize, columns: usize) -> Matrix {
        let (scale, width) = (self.scale, h.width());
        let mut merged = Matrix::unwritten(rows * columns / scale / scale, scale * scale * width);
        // A line of a square at a time: its patches lie side by side already.
        let lines = merged.values_mut().chunks_exact_mut(scale * width);
        for (index, to) in lines.enumerate() {
            let (token, line) = (index / scale, index % scale);
            let (row, column) = (token / (columns / scale), token % (columns / scale));
            let from = ((row * scale + line) * columns + column * scale) * width;
            to.copy_from_slice(&h.values()[from..from + scale * width]);
        }
        merged
    }
}
