//! What sees and reads, whatever head follows: vision tower, connector, text layers.

use std::sync::Arc;

use candle_core::Result;

use super::text::{Growing, Text};
use super::vision::Vision;
use super::{Prefix, SmolVlaConfig, VisionFeatures, VlmConfig};
use crate::ModelError;
use crate::caches::{KeptPrefix, KeptTower};
use crate::checkpoint::Checkpoint;
use crate::kernels::{Matrix, Planes};
use crate::processors::Prompter;

/// What a head needs beyond the prefix's keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Parts {
    /// The last text layer and the norm after it, for tokens that follow the prefix.
    pub whole_text: bool,
    /// Vision layers that the instruction scales and shifts.
    pub film: bool,
}

/// Vision tower, connector and text model.
pub(crate) struct Observer {
    vision: Vision,
    text: Text,
    /// Embeddings before and after each image, not scaled; `None` without special tokens.
    image_marks: Option<(Matrix, Matrix)>,
}

impl Observer {
    /// Builds them from `checkpoint`, with the `parts` that the head needs.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor or key that does not fit.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &SmolVlaConfig,
        vlm: &VlmConfig,
        parts: Parts,
    ) -> std::result::Result<Self, ModelError> {
        let (store, path) = (&checkpoint.store, checkpoint.config_path());
        let all = vlm.text_config.num_hidden_layers;
        let text_layers = match usize::try_from(config.num_vlm_layers) {
            Ok(n) if n > all => {
                let reason = format!("is {n}, the vision-language model has {all} layers");
                return Err(ModelError::config(&path, "num_vlm_layers", reason));
            }
            Ok(n) if n > 0 => n,
            _ => all,
        };
        let text = Text::load(store, &vlm.text_config, text_layers, parts.whole_text)?;
        let vision = Vision::load(store, vlm, parts.film)?;
        if let Some((width, height)) = config.resize_imgs_with_padding {
            let unit = vision.granularity();
            let whole = |n: usize| n > 0 && n <= 1 << 14 && n.is_multiple_of(unit);
            if !whole(width) || !whole(height) {
                let reason = format!("is [{width}, {height}], expected multiples of {unit}");
                return Err(ModelError::config(&path, "resize_imgs_with_padding", reason));
            }
        }
        let image_marks = image_marks(checkpoint, config, &text)?;
        Ok(Self { vision, text, image_marks })
    }

    /// Hidden size `D` of the text model.
    pub fn width(&self) -> usize {
        self.text.width()
    }

    /// Text layers.
    pub fn depth(&self) -> usize {
        self.text.depth()
    }

    /// One image (in [−1, 1]) through vision tower and connector; `words` is the
    /// instruction's mean embedding (`[1, D]`) for layers that it scales and shifts.
    ///
    /// # Errors
    /// When the size cannot be cut into patches.
    pub fn encode_image(&self, pixels: &Planes, words: Option<&Matrix>) -> Result<VisionFeatures> {
        self.vision.forward(pixels, words)
    }

    /// One image through tower and connector, with what `kept` says computed of the tower.
    ///
    /// # Errors
    /// As [`Self::encode_image`].
    pub fn encode_image_kept(
        &self,
        pixels: &Planes,
        kept: &mut KeptTower,
    ) -> Result<VisionFeatures> {
        self.vision.forward_kept(pixels, kept)
    }

    /// Embeddings of `tokens`, not scaled, `[T, D]`.
    ///
    /// # Errors
    /// When a token is not in the table.
    pub fn embed_words(&self, tokens: &[u32]) -> Result<Matrix> {
        self.text.embed(tokens)
    }

    /// The prefix as it enters the first text layer, `[P, D]`: images, `dummies` masked cameras,
    /// instruction, `state` (`[1, D]`). A masked camera leaves only its special tokens behind.
    ///
    /// # Errors
    /// When a token is not in the table.
    pub fn embed(
        &self,
        images: &[Arc<Matrix>],
        dummies: usize,
        tokens: &[u32],
        state: &Matrix,
    ) -> Result<Matrix> {
        let scale = (self.text.width() as f64).sqrt() as f32;
        let words = self.text.embed(tokens)?;
        let cameras = images.iter().map(|image| Some(&**image));
        let marks = self.image_marks.as_ref();
        // What is scaled, and what is not.
        let parts = cameras.chain(std::iter::repeat_n(None, dummies)).flat_map(|image| {
            let (before, after) = (marks.map(|m| (&m.0, false)), marks.map(|m| (&m.1, false)));
            [before, image.map(|image| (image, true)), after].into_iter().flatten()
        });
        let parts = parts.chain([(&words, true), (state, false)]);
        let rows = parts.clone().map(|(part, _)| part.rows()).sum();
        let mut all = Matrix::unwritten(rows, self.text.width());
        let mut rest = all.values_mut();
        for (part, scaled) in parts {
            if part.width() != self.text.width() {
                candle_core::bail!("tokens of {} meet {}", part.width(), self.text.width());
            }
            let (to, after) = rest.split_at_mut(part.values().len());
            let by = if scaled { scale } else { 1.0 };
            to.iter_mut().zip(part.values()).for_each(|(to, x)| *to = x * by);
            rest = after;
        }
        Ok(all)
    }

    /// Keys and values of the prefix in every text layer.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn prefill(&self, embeddings: Matrix) -> Result<Prefix> {
        self.text.prefill(embeddings)
    }

    /// The prefix before the first text layer.
    pub fn start(&self, embeddings: Matrix) -> Growing {
        self.text.start(embeddings)
    }

    /// Keys and values of the first `depth` text layers, as far as `growing` lacks them.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn grow(&self, growing: &mut Growing, depth: usize) -> Result<()> {
        self.text.grow(growing, depth)
    }

    /// As [`Self::prefill`], with the tokens that `kept` knows already left as they were.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn prefill_kept(&self, embeddings: Matrix, kept: &mut KeptPrefix) -> Result<Prefix> {
        self.text.prefill_kept(embeddings, kept)
    }

    /// Tokens (`[L, D]`) that come after `prefix` and see it and each other, after the last norm.
    ///
    /// # Errors
    /// Without [`Parts::whole_text`].
    pub fn follow(&self, embeddings: Matrix, prefix: &Prefix) -> Result<Matrix> {
        self.text.follow(embeddings, prefix)
    }
}

fn image_marks(
    checkpoint: &Checkpoint,
    config: &SmolVlaConfig,
    text: &Text,
) -> std::result::Result<Option<(Matrix, Matrix)>, ModelError> {
    if !config.add_image_special_tokens {
        return Ok(None);
    }
    let tokenizer = checkpoint.extra(super::TOKENIZER)?;
    let prompter = Prompter::new(&tokenizer.path, tokenizer.text.as_bytes(), 1, false)?;
    let fake = prompter.special("<fake_token_around_image>")?;
    let global = prompter.special("<global-img>")?;
    Ok(Some((text.embed(&[fake, global])?, text.embed(&[fake])?)))
}
