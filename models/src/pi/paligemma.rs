//! PaliGemma: a SigLIP tower whose every patch becomes a token of a Gemma text model.
//!
//! Source: transformers `models/paligemma/modeling_paligemma.py`, as LeRobot 0.6.1 calls it in
//! `src/lerobot/policies/pi0/modeling_pi0.py`: image tokens are not scaled.

use std::sync::Arc;

use candle_core::Result;

use super::{PiConfig, PiSizes};
use crate::ModelError;
use crate::backbones::TokenTable;
use crate::backbones::gemma::{Gemma, KvCache, Use};
use crate::backbones::siglip::Siglip;
use crate::checkpoint::TensorStore;
use crate::kernels::{Linear, Matrix, Planes, Visible};

/// What one image became.
#[derive(Debug, Clone)]
pub struct ImageFeatures {
    /// The tower's output after its last norm, `[patches, Dv]`.
    pub last_hidden: Matrix,
    /// Tokens for the text model, `[patches, D]`.
    pub tokens: Matrix,
}

/// The vision-language model.
pub struct PaliGemma {
    tower: Siglip,
    projector: Linear,
    table: TokenTable,
    /// `√D`, in the precision that the token table was trained in.
    scale: f32,
    text: Gemma,
}

impl PaliGemma {
    /// The model in `store`, with as much of its last layer as `used` asks for.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor that does not fit.
    pub fn load(
        store: &TensorStore,
        config: &PiConfig,
        sizes: &PiSizes,
        used: Use,
    ) -> std::result::Result<Self, ModelError> {
        let (width, root) = (sizes.text.width, (sizes.text.width as f32).sqrt());
        let bf16 = config.dtype == "bfloat16";
        let scale = if bf16 { half::bf16::from_f32(root).to_f32() } else { root };
        Ok(Self {
            tower: Siglip::load(store, &sizes.vision, None)?,
            projector: Linear::load(store, "connector", sizes.vision.hidden_size, width, true)?,
            table: TokenTable::load(store, "text.embed_tokens.weight", width)?,
            scale,
            text: Gemma::load(store, "text", sizes.text, used)?,
        })
    }

    /// Rows of the token table.
    pub fn vocabulary(&self) -> usize {
        self.table.tokens()
    }

    /// One image (in [−1, 1]) through tower and projector.
    ///
    /// # Errors
    /// When a patch's side does not divide the image's sides.
    pub fn encode_image(&self, pixels: &Planes) -> Result<ImageFeatures> {
        let last_hidden = self.tower.forward(pixels, None)?;
        let tokens = self.projector.forward(&last_hidden)?;
        Ok(ImageFeatures { last_hidden, tokens })
    }

    /// Token embeddings as they enter the first layer, `[ids, D]`.
    ///
    /// # Errors
    /// When a token is not in the table.
    pub fn embed_tokens(&self, ids: &[u32]) -> Result<Matrix> {
        Ok(self.table.rows(ids)?.scaled(self.scale))
    }

    /// The prefix as it enters the first layer, `[P, D]`: images, then the prompt. Masked cameras and padding
    /// are left out: no valid token ever sees them.
    ///
    /// # Errors
    /// When a token is not in the table.
    pub fn embed_prefix(&self, images: &[Arc<Matrix>], ids: &[u32]) -> Result<Matrix> {
        let prompt = self.embed_tokens(ids)?;
        let parts = images.iter().map(Arc::as_ref).chain([&prompt]);
        Matrix::stacked(parts, prompt.width())
    }

    /// Runs `embeddings` after `past`; see [`Gemma::forward`].
    ///
    /// # Errors
    /// When memory runs out.
    pub fn forward(
        &self,
        embeddings: Matrix,
        past: Option<&KvCache>,
        visible: Visible,
    ) -> Result<(KvCache, Option<Matrix>)> {
        self.text.forward(embeddings, past, visible, None)
    }
}
