//! `config.json` of an X-VLA policy.
//!
//! Missing keys take the defaults of LeRobot 0.6.1 (`src/lerobot/policies/xvla/configuration_xvla.py`).

use std::path::Path;

use serde::Deserialize;

use crate::ModelError;
use crate::backbones::florence2::FlorenceConfig;
use crate::checkpoint::{Checkpoint, Features, check_size};

/// No transformer has more blocks, no robot more views.
const COUNT_LIMIT: usize = 1 << 10;

/// An X-VLA policy's configuration.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct XvlaConfig {
    /// Sizes of the vision-language model; the file must have them.
    #[serde(skip)]
    pub florence_config: FlorenceConfig,
    /// Action horizon `H`.
    pub chunk_size: usize,
    /// Width of the transformer `W`.
    pub hidden_size: usize,
    /// Blocks of the transformer.
    pub depth: usize,
    /// Its heads.
    pub num_heads: usize,
    /// Width of its MLPs as a multiple of `hidden_size`.
    pub mlp_ratio: f64,
    /// Robots that the checkpoint knows.
    pub num_domains: usize,
    /// Learned prompts of each.
    pub len_soft_prompts: usize,
    /// Width of the time embedding.
    pub dim_time: usize,
    /// Tokens that the transformer has positions for.
    pub max_len_seq: usize,
    /// Whether the projections of the features exist once per domain too.
    pub use_hetero_proj: bool,
    /// Name of the action space.
    pub action_mode: String,
    /// Denoise steps.
    pub num_denoising_steps: usize,
    /// Whether the network sees the state.
    pub use_proprio: bool,
    /// Width that states are padded or cut to.
    pub max_state_dim: usize,
    /// Width that `auto` works at.
    pub max_action_dim: usize,
    /// Height and width that images are resized and padded to; `null` leaves them alone.
    pub resize_imgs_with_padding: Option<(usize, usize)>,
    /// Views of the sequence; views without an image are zero.
    pub num_image_views: Option<usize>,
    /// Views beyond the configured cameras.
    pub empty_cameras: usize,
    /// Longest instruction (tokens).
    pub tokenizer_max_length: usize,
}

impl Default for XvlaConfig {
    fn default() -> Self {
        Self {
            florence_config: FlorenceConfig::default(),
            chunk_size: 32,
            hidden_size: 1024,
            depth: 24,
            num_heads: 16,
            mlp_ratio: 4.0,
            num_domains: 30,
            len_soft_prompts: 32,
            dim_time: 32,
            max_len_seq: 512,
            use_hetero_proj: false,
            action_mode: "ee6d".to_owned(),
            num_denoising_steps: 10,
            use_proprio: true,
            max_state_dim: 32,
            max_action_dim: 20,
            resize_imgs_with_padding: None,
            num_image_views: None,
            empty_cameras: 0,
            tokenizer_max_length: 64,
        }
    }
}

/// What a configuration cannot do without.
#[derive(Deserialize)]
struct Required {
    florence_config: FlorenceConfig,
}

impl XvlaConfig {
    /// The configuration of `checkpoint`, checked.
    ///
    /// # Errors
    /// [`ModelError::Config`] with the key.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        Self::parse(&checkpoint.config_path(), &checkpoint.config_text, &checkpoint.features)
    }

    /// The configuration in `text`, checked; `path` is for messages.
    ///
    /// # Errors
    /// [`ModelError::Config`] with the key.
    pub fn parse(path: &Path, text: &str, features: &Features) -> Result<Self, ModelError> {
        let fail = |e: serde_json::Error| {
            ModelError::config(path, "the file", format!("cannot be read: {e}"))
        };
        let mut config: Self = serde_json::from_str(text).map_err(fail)?;
        let Required { florence_config } = serde_json::from_str(text).map_err(fail)?;
        config.florence_config = florence_config;
        config.florence_config.check(path)?;
        config.check(path, features)?;
        Ok(config)
    }

    fn check(&self, path: &Path, features: &Features) -> Result<(), ModelError> {
        for (key, value) in [
            ("chunk_size", self.chunk_size),
            ("hidden_size", self.hidden_size),
            ("num_heads", self.num_heads),
            ("num_domains", self.num_domains),
            ("dim_time", self.dim_time),
            ("max_len_seq", self.max_len_seq),
            ("num_denoising_steps", self.num_denoising_steps),
            ("max_state_dim", self.max_state_dim),
            ("max_action_dim", self.max_action_dim),
            ("tokenizer_max_length", self.tokenizer_max_length),
            ("mlp_ratio", self.mlp_width()),
        ] {
            check_size(path, key, value)?;
        }
        let fail = |key: &str, reason: String| Err(ModelError::config(path, key, reason));
        for (key, value) in [
            ("depth", self.depth),
            ("num_image_views", self.num_image_views.unwrap_or(1)),
            ("len_soft_prompts", self.len_soft_prompts.max(1)),
            ("empty_cameras", self.empty_cameras.max(1)),
        ] {
            if value == 0 || value > COUNT_LIMIT {
                return fail(key, format!("is {value}, expected at most {COUNT_LIMIT}"));
            }
        }
        if let Some((height, width)) = self.resize_imgs_with_padding {
            check_size(path, "resize_imgs_with_padding", height)?;
            check_size(path, "resize_imgs_with_padding", width)?;
            if height.max(width) > 1 << 14 {
                let reason = format!("is [{height}, {width}], expected at most 16384");
                return fail("resize_imgs_with_padding", reason);
            }
        }
        let (width, heads) = (self.hidden_size, self.num_heads);
        if !width.is_multiple_of(heads) {
            let reason = format!("is {heads}, which does not divide hidden_size {width}");
            return fail("num_heads", reason);
        }
        if self.chunk_size >= self.max_len_seq {
            let (found, most) = (self.chunk_size, self.max_len_seq);
            return fail(
                "chunk_size",
                format!("is {found}, max_len_seq has room for {most} tokens"),
            );
        }
        let florence = &self.florence_config;
        let (tokens, text) = (florence.vision_config.projection_dim, florence.text_config.d_model);
        if tokens != text {
            let reason = format!("is {tokens}, the text model's d_model is {text}");
            return fail("florence_config.vision_config.projection_dim", reason);
        }
        if features.cameras().next().is_none() {
            return fail("input_features", "names no camera; X-VLA needs at least one".into());
        }
        Ok(())
    }

    /// Views of the sequence, with and without an image, for `cameras` camera inputs.
    pub fn views(&self, cameras: usize) -> usize {
        self.num_image_views.unwrap_or(0).max(cameras + self.empty_cameras)
    }

    /// Width of the state as the network takes it.
    pub fn state_width(&self) -> usize {
        if self.use_proprio { self.max_state_dim } else { 0 }
    }

    /// Width of the transformer's MLPs.
    pub fn mlp_width(&self) -> usize {
        (self.hidden_size as f64 * self.mlp_ratio) as usize
    }
}
