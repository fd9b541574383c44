//! π0-FAST: PaliGemma alone, which says its actions as tokens.
//!
//! Source: LeRobot 0.6.1 `src/lerobot/policies/pi0_fast/modeling_pi0_fast.py`,
//! `sample_actions_fast_kv_cache`.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Result;

use super::{ImageFeatures, PaliGemma, PiConfig, PiSizes};
use crate::ModelError;
use crate::backbones::TokenTable;
use crate::backbones::gemma::{KvCache, Use};
use crate::checkpoint::Checkpoint;
use crate::kernels::{Matrix, Planes, Visible};

/// A π0-FAST network.
pub struct PiFast {
    vlm: PaliGemma,
    head: TokenTable,
}

/// What the network has read so far.
#[derive(Debug, Clone)]
pub struct Reading {
    cache: KvCache,
    /// The newest token after the last norm, `[1, D]`.
    hidden: Matrix,
}

impl PiFast {
    /// Builds the network from `checkpoint`.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor or key that does not fit.
    pub fn load(checkpoint: &Checkpoint) -> std::result::Result<Self, ModelError> {
        let (config, store) = (PiConfig::of(checkpoint)?, &checkpoint.store);
        let sizes = PiSizes::of(checkpoint, false)?;
        let vlm = PaliGemma::load(store, &config, &sizes, Use::Hidden)?;
        let head = TokenTable::load(store, "lm_head.weight", sizes.text.width)?;
        Ok(Self { vlm, head })
    }

    /// Number of tokens that it can say.
    pub fn vocabulary(&self) -> usize {
        self.head.tokens()
    }

    /// One image (in [−1, 1]) through vision tower and projector.
    ///
    /// # Errors
    /// When the size cannot be cut into patches.
    pub fn encode_image(&self, pixels: &Planes) -> Result<ImageFeatures> {
        self.vlm.encode_image(pixels)
    }

    /// The prefix as it enters the first text layer, `[P, D]`: images, prompt, and `start`, the token after
    /// which it speaks.
    ///
    /// # Errors
    /// When a token is not in the table.
    pub fn embed_prefix(
        &self,
        images: &[Arc<Matrix>],
        prompt: &[u32],
        start: u32,
    ) -> Result<Matrix> {
        let ids: Vec<u32> = prompt.iter().copied().chain([start]).collect();
        self.vlm.embed_prefix(images, &ids)
    }

    /// Reads the prefix: every token of it sees every other.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn prefill(&self, embeddings: Matrix) -> Result<Reading> {
        Self::reading(self.vlm.forward(embeddings, None, Visible::All)?)
    }

    /// Reads `ids` after `reading`: each sees what was before it, and itself.
    ///
    /// # Errors
    /// When a token is not in the table.
    pub fn read(&self, reading: &Reading, ids: &[u32]) -> Result<Reading> {
        let embeddings = self.vlm.embed_tokens(ids)?;
        let visible = Visible::Causal { prefix: reading.cache.length };
        Self::reading(self.vlm.forward(embeddings, Some(&reading.cache), visible)?)
    }

    fn reading((cache, hidden): (KvCache, Option<Matrix>)) -> Result<Reading> {
        let Some(hidden) = hidden else {
            candle_core::bail!("the text model's last norm is not loaded")
        };
        let last = hidden.rows().saturating_sub(1);
        Ok(Reading { cache, hidden: hidden.part(last..hidden.rows())? })
    }

    /// How likely each token of `range` comes next (logits), `[1, range]`.
    ///
    /// # Errors
    /// When a token is not in the table.
    pub fn logits(&self, reading: &Reading, range: Range<usize>) -> Result<Matrix> {
        self.head.logits(&reading.hidden, range)
    }
}
