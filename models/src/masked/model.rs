//! The network: SmolVLA's observer, action tokens, and logits over bins.

use std::sync::Arc;

use candle_core::Result;

use super::MaskedConfig;
use crate::ModelError;
use crate::checkpoint::Checkpoint;
use crate::heads::Bins;
use crate::kernels::{Linear, Matrix, Planes, add};
use crate::smolvla::{Observer, Parts, Prefix, SmolVlaConfig, VisionFeatures, VlmConfig};

/// A network that gives logits for the action tokens.
pub struct MaskedVla {
    observer: Observer,
    state_proj: Linear,
    state_width: usize,
    /// Embeddings of the bins and, last, of the mask: `[N + 1, D]`.
    table: Matrix,
    /// Embeddings of the tokens' places, `[L, D]`.
    places: Matrix,
    out: Linear,
    bins: Bins,
    shape: (usize, usize),
}

/// The most action tokens of a chunk.
const LENGTH_LIMIT: usize = 1 << 14;

impl MaskedVla {
    /// Builds the network from `checkpoint`.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor or key that does not fit.
    pub fn load(checkpoint: &Checkpoint) -> std::result::Result<Self, ModelError> {
        let (config, vlm) = (&SmolVlaConfig::of(checkpoint)?, &VlmConfig::of(checkpoint)?);
        let (store, path) = (&checkpoint.store, checkpoint.config_path());
        let bins = MaskedConfig::of(checkpoint)?.bins(checkpoint)?;
        let parts = Parts { whole_text: true, film: false };
        let observer = Observer::load(checkpoint, config, vlm, parts)?;
        let shape = (config.chunk_size, checkpoint.features.action_dim(&path)?);
        let length = shape.0 * shape.1;
        if length > LENGTH_LIMIT {
            let reason = format!("makes {length} action tokens, expected at most {LENGTH_LIMIT}");
            return Err(ModelError::config(&path, "chunk_size", reason));
        }
        let (width, classes) = (observer.width(), bins.classes());
        Ok(Self {
            state_proj: Linear::load(store, "state_proj", config.max_state_dim, width, true)?,
            state_width: config.max_state_dim,
            table: store.matrix("action_tokens.embed.weight", &[classes + 1, width])?,
            places: store.matrix("action_tokens.place.weight", &[length, width])?,
            out: Linear::load(store, "action_tokens.out", width, classes, true)?,
            observer,
            bins,
            shape,
        })
    }

    /// Actions of a chunk and their dimension, `(H, D)`.
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// The bins of the head.
    pub fn bins(&self) -> Bins {
        self.bins
    }

    /// Id of the mask among the action tokens.
    pub fn mask(&self) -> usize {
        self.bins.classes()
    }

    /// One image (in [−1, 1]) through vision tower and connector.
    ///
    /// # Errors
    /// When the size cannot be cut into patches.
    pub fn encode_image(&self, pixels: &Planes) -> Result<VisionFeatures> {
        self.observer.encode_image(pixels, None)
    }

    /// Keys and values of the observation: images, `dummies` masked cameras, instruction, state.
    ///
    /// # Errors
    /// When a token is not in the table.
    pub fn prefill(
        &self,
        images: &[Arc<Matrix>],
        dummies: usize,
        tokens: &[u32],
        state: &[f32],
    ) -> Result<Prefix> {
        let mut padded = state.to_vec();
        padded.resize(self.state_width, 0.0);
        let state = self.state_proj.forward(&Matrix::of_row(&padded))?;
        self.observer.prefill(self.observer.embed(images, dummies, tokens, &state)?)
    }

    /// Logits `[L, N]` of the action `tokens`, [`Self::mask`] where one is not decided.
    ///
    /// # Errors
    /// When there are not `L` tokens, or one is not in the table.
    pub fn logits(&self, prefix: &Prefix, tokens: &[usize]) -> Result<Matrix> {
        if let Some(other) = tokens.iter().find(|token| **token >= self.table.rows()) {
            candle_core::bail!("token {other} is not among {}", self.table.rows());
        }
        let rows = tokens.iter().map(|token| self.table.row(*token));
        let embeddings = add(Matrix::of_rows(rows, self.table.width()), &self.places)?;
        self.out.forward(&self.observer.follow(embeddings, prefix)?)
    }
}
