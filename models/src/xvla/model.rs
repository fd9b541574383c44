//! The network, stage by stage.

use std::sync::Arc;

use sinew_runtime::PolicyError;

use super::{ActionSpace, Head, HeadCache, XvlaConfig};
use crate::ModelError;
use crate::backbones::florence2::{Encoder, VisionFeatures, VisionTower, modern_name};
use crate::caches::{Block, Branches};
use crate::checkpoint::Checkpoint;
use crate::kernels::{Matrix, Planes, multiply_all};
use crate::processors::Boundary;

/// What the encoder made of the images and the instruction.
#[derive(Debug, Clone)]
pub struct Features {
    /// First camera and instruction, `[L, D]`.
    pub encoded: Matrix,
    /// Tokens of the further views, those without an image being zero: `[views·tokens, D]`.
    pub views: Option<Matrix>,
}

/// An X-VLA network of one domain.
pub struct Xvla {
    vision: VisionTower,
    encoder: Encoder,
    head: Head,
    space: ActionSpace,
    /// `[1, M]`: 1 for the channels that the model sees.
    seen: Matrix,
    views: usize,
    most_tokens: usize,
    state_width: usize,
    horizon: usize,
}

impl Xvla {
    /// Builds the network of `checkpoint`, for the domain that its pipeline names.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor or key that does not fit.
    pub fn load(checkpoint: &Checkpoint, config: &XvlaConfig) -> Result<Self, ModelError> {
        let (path, features) = (checkpoint.config_path(), &checkpoint.features);
        let action_dim = features.action_dim(&path)?;
        let space =
            ActionSpace::named(&config.action_mode, action_dim, config.max_action_dim, &path)?;
        if space.action_dim() != action_dim {
            let (mode, real) = (&config.action_mode, space.action_dim());
            let reason = format!("has {action_dim} values, action_mode `{mode}` gives {real}");
            return Err(ModelError::config(&path, "action", reason));
        }
        let domain = checkpoint.preprocessor.pipeline.domain.unwrap_or(0);
        if domain as usize >= config.num_domains {
            let reason = format!("is {domain}, num_domains is {}", config.num_domains);
            return Err(ModelError::config(&path, "domain_id", reason));
        }
        // Weights of the older layout get their newer names.
        let store = &checkpoint.store.renamed(modern_name);
        let florence = &config.florence_config;
        let (width, channels) = (florence.text_config.d_model, space.width());
        let vision = VisionTower::load(store, &florence.vision_config)?;
        if let Some(size) = config.resize_imgs_with_padding
            && let Err(e) = vision.grid(size)
        {
            let reason = format!("is {size:?}, which the vision tower cannot take: {e}");
            return Err(ModelError::config(&path, "resize_imgs_with_padding", reason));
        }
        Ok(Self {
            vision,
            most_tokens: config.max_len_seq,
            encoder: Encoder::load(store, &florence.text_config)?,
            head: Head::load(store, config, domain, width, channels)?,
            seen: Matrix::of_row(&space.seen()),
            views: config.views(features.cameras().count()),
            state_width: config.state_width(),
            horizon: config.chunk_size,
            space,
        })
    }

    /// Shape of the sample that is denoised, `(H, M)`.
    pub fn sample_shape(&self) -> (usize, usize) {
        (self.horizon, self.space.width())
    }

    /// What the channels mean.
    pub fn space(&self) -> &ActionSpace {
        &self.space
    }

    /// One image (normalised) through vision tower and projector.
    ///
    /// # Errors
    /// When the image is too small or too large for the tower.
    pub fn encode_image(&self, pixels: &Planes) -> candle_core::Result<VisionFeatures> {
        self.vision.forward(pixels)
    }

    /// `state` as the network takes it: padded or cut, without grippers.
    pub fn pad_state(&self, state: &[f32]) -> Vec<f32> {
        let mut padded = state.to_vec();
        padded.resize(self.state_width, 0.0);
        self.space.hide_in_state(&mut padded);
        padded
    }

    /// The encoder's features of `images` (`[tokens, D]` each, at least one) and of the instruction `ids`.
    ///
    /// The first image and the instruction go through the encoder; the others, and zeros for views without an
    /// image, go past it.
    ///
    /// # Errors
    /// When a token is not in the table, or there are more tokens than learned positions.
    pub fn encode(&self, images: &[Arc<Matrix>], ids: &[u32]) -> candle_core::Result<Features> {
        let Some((first, others)) = images.split_first() else {
            candle_core::bail!("there is no image to encode");
        };
        let (first, width) = (first.as_ref(), first.width());
        let tokens = self.views.max(images.len()) * first.rows();
        if tokens > self.most_tokens {
            let most = self.most_tokens;
            candle_core::bail!("all views have {tokens} tokens, max_len_seq is {most}");
        }
        let text = self.encoder.embed(ids)?;
        let encoded = Matrix::stacked([first, &text].into_iter(), width)?;
        let encoded = self.encoder.forward(&encoded)?;
        let absent = self.views.saturating_sub(images.len());
        let nothing = Matrix::zeros(first.rows(), width);
        let views = others.iter().map(Arc::as_ref).chain(std::iter::repeat_n(&nothing, absent));
        let any = !others.is_empty() || absent > 0;
        let views = any.then(|| Matrix::stacked(views, width)).transpose()?;
        Ok(Features { encoded, views })
    }

    /// What the denoise steps share.
    ///
    /// # Errors
    /// When the sequence is longer than the learned positions.
    pub fn prepare(&self, features: &Features) -> candle_core::Result<HeadCache> {
        self.head.prepare(&features.encoded, features.views.as_ref())
    }

    /// The clean actions of the sample `x` (`[H, M]`) at flow time `t`; `state` comes from [`Self::pad_state`].
    ///
    /// # Errors
    /// When `x` is not `[H, M]`.
    pub fn predict(
        &self,
        cache: &HeadCache,
        x: &Matrix,
        state: &[f32],
        t: f64,
    ) -> candle_core::Result<Matrix> {
        self.predict_with(cache, x, state, t, &mut Branches::off())
    }

    /// As [`Self::predict`], with what `branches` computes of the head's.
    ///
    /// # Errors
    /// As there.
    pub fn predict_with(
        &self,
        cache: &HeadCache,
        x: &Matrix,
        state: &[f32],
        t: f64,
        branches: &mut Branches,
    ) -> candle_core::Result<Matrix> {
        let mut x = x.clone();
        multiply_all(&mut x, &self.seen)?;
        self.head.predict(cache, &x, state, t, branches)
    }

    /// The head's residual branches.
    pub fn blocks(&self) -> Vec<Block> {
        self.head.blocks()
    }

    /// The clean actions `clean` (`[H, M]`) in physical units, row by row.
    ///
    /// # Errors
    /// [`PolicyError::NotFinite`] when a value is no number.
    pub fn actions(&self, clean: &Matrix, boundary: &Boundary) -> Result<Vec<f64>, PolicyError> {
        let width = self.space.action_dim();
        let mut actions = Matrix::zeros(clean.rows(), width);
        for (action, channels) in actions.values_mut().chunks_exact_mut(width).zip(clean.iter()) {
            action.iter_mut().zip(self.space.action(channels)).for_each(|(to, value)| *to = value);
        }
        boundary.actions(actions.iter())
    }
}
