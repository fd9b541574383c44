//! `config.json` of a Diffusion Policy.
//!
//! Unknown keys are tolerated; missing ones take the defaults of LeRobot 0.6
//! (`src/lerobot/policies/diffusion/configuration_diffusion.py`), those of the transformer the ones of
//! real-stanford/diffusion_policy (`train_diffusion_transformer_hybrid_workspace.yaml`).

use std::path::Path;

use serde::Deserialize;

use crate::ModelError;
use crate::checkpoint::{Checkpoint, check_size};
use crate::heads::ddpm::{BetaSchedule, Kind, Prediction, Schedule};

/// Which network denoises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Denoiser {
    /// A U-Net over time: the only one of LeRobot, whose files do not name it.
    Unet,
    /// A transformer, as in the original code; `denoiser` in `config.json` is ours.
    Transformer,
}

/// A Diffusion Policy's configuration.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct DiffusionConfig {
    /// Observations that the network sees, the current one last.
    pub n_obs_steps: usize,
    /// Steps that are denoised; the first `n_obs_steps - 1` lie in the past.
    pub horizon: usize,
    /// Actions that are executed, from the current one on.
    pub n_action_steps: usize,
    /// Height and width that images are resized to first.
    pub resize_shape: Option<(usize, usize)>,
    /// Part of `resize_shape` that is kept; below 1 it gives `crop_shape`.
    pub crop_ratio: f64,
    /// Height and width of the middle of the image that is kept.
    pub crop_shape: Option<(usize, usize)>,
    /// Group norms instead of batch norms in the ResNet.
    pub use_group_norm: bool,
    /// Keypoints that an image becomes.
    pub spatial_softmax_num_keypoints: usize,
    /// Each camera has an encoder of its own.
    pub use_separate_rgb_encoder_per_camera: bool,
    /// Which network denoises.
    pub denoiser: Denoiser,
    /// Layers of the transformer.
    pub n_layer: usize,
    /// Layers of its encoder of the condition; 0 for two matrices instead.
    pub n_cond_layers: usize,
    /// Its attention heads.
    pub n_head: usize,
    /// Its width.
    pub n_emb: usize,
    /// Its actions see only those before them, and only observations up to theirs.
    pub causal_attn: bool,
    /// Channels of the U-Net's levels.
    pub down_dims: Vec<usize>,
    /// Width of its convolutions.
    pub kernel_size: usize,
    /// Groups of its norms.
    pub n_groups: usize,
    /// Width of the step's embedding.
    pub diffusion_step_embed_dim: usize,
    /// The U-Net was trained with a timestep for each action: their embeddings, side by side, enter the step's encoder (as in
    /// Streaming Diffusion Policy, `conditional_unet1d_tedi.py`). The key is ours.
    pub per_element_timesteps: bool,
    /// The condition scales the features, besides shifting them.
    pub use_film_scale_modulation: bool,
    /// Sampler.
    pub noise_scheduler_type: Kind,
    /// Training steps.
    pub num_train_timesteps: usize,
    /// How the training noise grew.
    pub beta_schedule: BetaSchedule,
    /// First `β` of a linear schedule.
    pub beta_start: f64,
    /// Last `β` of a linear schedule.
    pub beta_end: f64,
    /// What the network predicts.
    pub prediction_type: Prediction,
    /// The estimated clean sample is cut.
    pub clip_sample: bool,
    /// Where it is cut.
    pub clip_sample_range: f64,
    /// Denoise steps; `None` for as many as training steps.
    pub num_inference_steps: Option<usize>,
}

impl Default for DiffusionConfig {
    fn default() -> Self {
        Self {
            n_obs_steps: 2,
            horizon: 64,
            n_action_steps: 32,
            resize_shape: None,
            crop_ratio: 1.0,
            crop_shape: None,
            use_group_norm: false,
            spatial_softmax_num_keypoints: 32,
            use_separate_rgb_encoder_per_camera: true,
            denoiser: Denoiser::Unet,
            n_layer: 8,
            n_cond_layers: 0,
            n_head: 4,
            n_emb: 256,
            causal_attn: true,
            down_dims: vec![512, 1024, 2048],
            kernel_size: 5,
            n_groups: 8,
            diffusion_step_embed_dim: 128,
            per_element_timesteps: false,
            use_film_scale_modulation: true,
            noise_scheduler_type: Kind::Ddpm,
            num_train_timesteps: 100,
            beta_schedule: BetaSchedule::SquaredcosCapV2,
            beta_start: 1e-4,
            beta_end: 0.02,
            prediction_type: Prediction::Epsilon,
            clip_sample: true,
            clip_sample_range: 1.0,
            num_inference_steps: None,
        }
    }
}

/// No image side, count of steps or of observations is larger.
const LIMIT: usize = 1 << 12;

impl DiffusionConfig {
    /// The configuration of `checkpoint`.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        Self::parse(&checkpoint.config_path(), &checkpoint.config_text)
    }

    /// The configuration in `text`, checked; `path` is for messages.
    ///
    /// # Errors
    /// [`ModelError::Config`] with the key.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ModelError> {
        let mut config: Self = serde_json::from_str(text)
            .map_err(|e| ModelError::config(path, "the file", format!("cannot be read: {e}")))?;
        config.check(path)?;
        if let Some((height, width)) = config.resize_shape {
            // As LeRobot: with a resize the ratio decides, and a ratio of 1 means no crop.
            let cut = |side: usize| (side as f64 * config.crop_ratio) as usize;
            config.crop_shape =
                (config.crop_ratio < 1.0).then(|| (cut(height).max(1), cut(width).max(1)));
        }
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ModelError> {
        let fail = |key: &str, reason: String| Err(ModelError::config(path, key, reason));
        for (key, value) in [
            ("spatial_softmax_num_keypoints", self.spatial_softmax_num_keypoints),
            ("diffusion_step_embed_dim", self.diffusion_step_embed_dim),
            ("n_groups", self.n_groups),
            ("n_action_steps", self.n_action_steps),
        ] {
            check_size(path, key, value)?;
        }
        let sides = [("resize_shape", self.resize_shape), ("crop_shape", self.crop_shape)];
        let sides = sides.iter().filter_map(|(key, shape)| shape.map(|s| (*key, s)));
        for (key, value) in sides.flat_map(|(key, (h, w))| [(key, h), (key, w)]).chain([
            ("n_obs_steps", self.n_obs_steps),
            ("horizon", self.horizon),
            ("num_train_timesteps", self.num_train_timesteps),
            ("num_inference_steps", self.num_inference_steps.unwrap_or(1)),
        ]) {
            if value == 0 || value > LIMIT {
                return fail(key, format!("is {value}, expected 1 to {LIMIT}"));
            }
        }
        if self.n_obs_steps - 1 + self.n_action_steps > self.horizon {
            let (past, taken, all) = (self.n_obs_steps - 1, self.n_action_steps, self.horizon);
            let reason =
                format!("is {taken}; with {past} past steps that is more than horizon {all}");
            return fail("n_action_steps", reason);
        }
        let steps = self.num_inference_steps.unwrap_or(1);
        if steps > self.num_train_timesteps {
            let all = self.num_train_timesteps;
            return fail("num_inference_steps", format!("is {steps}, of {all} training steps"));
        }
        if !(self.crop_ratio > 0.0 && self.crop_ratio <= 1.0) {
            return fail("crop_ratio", format!("is {}, expected 0 to 1", self.crop_ratio));
        }
        if self.clip_sample && !(self.clip_sample_range > 0.0 && self.clip_sample_range.is_finite())
        {
            return fail("clip_sample_range", format!("is {}, above 0", self.clip_sample_range));
        }
        for (key, beta) in [("beta_start", self.beta_start), ("beta_end", self.beta_end)] {
            if !(beta > 0.0 && beta < 1.0) {
                return fail(key, format!("is {beta}, expected between 0 and 1"));
            }
        }
        if self.diffusion_step_embed_dim < 4 || !self.diffusion_step_embed_dim.is_multiple_of(2) {
            let width = self.diffusion_step_embed_dim;
            return fail(
                "diffusion_step_embed_dim",
                format!("is {width}, expected an even number"),
            );
        }
        if self.per_element_timesteps && self.denoiser == Denoiser::Transformer {
            return fail(
                "per_element_timesteps",
                "is true, which only a U-Net can have".to_owned(),
            );
        }
        match self.denoiser {
            Denoiser::Unet => self.check_unet(path),
            Denoiser::Transformer => self.check_transformer(path),
        }
    }

    fn check_transformer(&self, path: &Path) -> Result<(), ModelError> {
        let fail = |key: &str, reason: String| Err(ModelError::config(path, key, reason));
        for (key, value) in [("n_emb", self.n_emb), ("n_head", self.n_head)] {
            check_size(path, key, value)?;
        }
        for (key, value, least) in
            [("n_layer", self.n_layer, 1), ("n_cond_layers", self.n_cond_layers, 0)]
        {
            if value < least || value > 256 {
                return fail(key, format!("is {value}, expected {least} to 256"));
            }
        }
        let (width, heads) = (self.n_emb, self.n_head);
        if width < 4 || !width.is_multiple_of(2) || !width.is_multiple_of(heads) {
            return fail(
                "n_emb",
                format!("is {width}, expected an even multiple of {heads} heads"),
            );
        }
        Ok(())
    }

    fn check_unet(&self, path: &Path) -> Result<(), ModelError> {
        let fail = |key: &str, reason: String| Err(ModelError::config(path, key, reason));
        if self.down_dims.is_empty() || self.down_dims.len() > 16 {
            return fail(
                "down_dims",
                format!("has {} levels, expected 1 to 16", self.down_dims.len()),
            );
        }
        for width in &self.down_dims {
            check_size(path, "down_dims", *width)?;
        }
        if self.kernel_size.is_multiple_of(2) || self.kernel_size > 63 {
            return fail("kernel_size", format!("is {}, expected an odd number", self.kernel_size));
        }
        let factor = 1usize << (self.down_dims.len() - 1);
        if !self.horizon.is_multiple_of(factor) {
            let reason =
                format!("is {}, which the U-Net cannot halve to {factor} parts", self.horizon);
            return fail("horizon", reason);
        }
        Ok(())
    }

    /// Denoise steps.
    pub fn denoise_steps(&self) -> usize {
        self.num_inference_steps.unwrap_or(self.num_train_timesteps)
    }

    /// The noise schedule.
    pub fn schedule(&self) -> Schedule {
        let range = (self.beta_start, self.beta_end);
        let (kind, shape) = (self.noise_scheduler_type, self.beta_schedule);
        let schedule =
            Schedule::new(kind, shape, self.num_train_timesteps, range, self.prediction_type);
        if self.clip_sample { schedule.clipped(self.clip_sample_range) } else { schedule }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(extra: &str) -> Result<DiffusionConfig, ModelError> {
        let text = format!(r#"{{{extra} "type": "diffusion"}}"#);
        DiffusionConfig::parse(Path::new("config.json"), &text)
    }

    #[test]
    fn defaults_are_lerobots() {
        let config = parse("").expect("this is a whole configuration");
        assert_eq!((config.horizon, config.denoise_steps()), (64, 100));
        assert_eq!(config.down_dims, [512, 1024, 2048]);
    }

    #[test]
    fn a_resize_and_a_ratio_give_the_crop() {
        let config = parse(r#""resize_shape": [240, 320], "crop_ratio": 0.95,"#);
        assert_eq!(config.expect("it is whole").crop_shape, Some((228, 304)));
        let config = parse(r#""resize_shape": [240, 320], "crop_shape": [10, 10],"#);
        assert_eq!(config.expect("it is whole").crop_shape, None, "a ratio of 1 means no crop");
    }

    #[test]
    fn unusable_values_are_named() {
        for (extra, word) in [
            (r#""down_dims": [],"#, "down_dims"),
            (r#""horizon": 18,"#, "n_action_steps"),
            (r#""horizon": 66,"#, "horizon"),
            (r#""kernel_size": 4,"#, "kernel_size"),
            (r#""num_inference_steps": 101,"#, "num_inference_steps"),
            (r#""beta_end": 1.5,"#, "beta_end"),
            (r#""clip_sample_range": 0,"#, "clip_sample_range"),
            (r#""noise_scheduler_type": "PNDM","#, "PNDM"),
            (r#""crop_shape": [0, 9],"#, "crop_shape"),
            (r#""denoiser": "transformer", "n_head": 3,"#, "n_emb"),
            (r#""denoiser": "transformer", "n_layer": 0,"#, "n_layer"),
        ] {
            let e = parse(extra).expect_err(word);
            assert!(e.to_string().contains(word), "{e}");
        }
    }
}
