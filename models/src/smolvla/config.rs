//! `config.json` of a SmolVLA policy and of the vision-language model inside it.
//!
//! Unknown keys are tolerated: LeRobot adds and drops some with every release. Missing ones take
//! the defaults of LeRobot 0.6 (`src/lerobot/policies/smolvla/configuration_smolvla.py`).

use std::path::Path;

use serde::Deserialize;

use crate::ModelError;
use crate::backbones::siglip::SiglipConfig;
use crate::checkpoint::{Checkpoint, Features, check_size};

/// The hub name whose sizes are built in.
pub const SMOLVLM2_500M: &str = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct";

/// The longest action horizon: attention among the actions takes the square of it, and no tensor's shape
/// tells a wrong one.
const HORIZON_LIMIT: usize = 1 << 12;

/// How the expert's layers attend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AttentionMode {
    /// Self-attention in every n-th layer, cross-attention to the prefix in the others.
    CrossAttn,
    /// Self-attention over prefix and suffix in every layer.
    SelfAttn,
}

/// A SmolVLA policy's configuration.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct SmolVlaConfig {
    /// Action horizon `H`.
    pub chunk_size: usize,
    /// Width that states are padded to.
    pub max_state_dim: usize,
    /// Width that the model denoises at.
    pub max_action_dim: usize,
    /// Width and height that images are resized and padded to; `null` leaves them alone.
    pub resize_imgs_with_padding: Option<(usize, usize)>,
    /// Missing cameras that are replaced by masked dummies.
    pub empty_cameras: usize,
    /// State and actions converted to the conventions of ALOHA.
    pub adapt_to_pi_aloha: bool,
    /// Longest instruction (tokens).
    pub tokenizer_max_length: usize,
    /// Denoise steps.
    pub num_steps: usize,
    /// The vision-language model: a folder, or a hub name.
    pub vlm_model_name: String,
    /// Special tokens around each image.
    pub add_image_special_tokens: bool,
    /// How the expert attends.
    pub attention_mode: AttentionMode,
    /// Expert layers; zero and below mean as many as text layers.
    pub num_expert_layers: i64,
    /// Text layers used; zero and below mean all.
    pub num_vlm_layers: i64,
    /// With cross-attention, every n-th layer attends to the suffix too; zero and below: none.
    pub self_attn_every_n_layers: i64,
    /// Width of the expert as a fraction of the text model's.
    pub expert_width_multiplier: f64,
    /// Shortest period of the time embedding.
    pub min_period: f64,
    /// Longest period of the time embedding.
    pub max_period: f64,
    /// Layers before the exits that it was trained to end at, the last being its depth; `None`: LeRobot's checkpoints, which
    /// have no such key, were trained to end after the last layer only.
    pub early_exit_layers: Option<Vec<usize>>,
}

impl Default for SmolVlaConfig {
    fn default() -> Self {
        Self {
            chunk_size: 50,
            max_state_dim: 32,
            max_action_dim: 32,
            resize_imgs_with_padding: Some((512, 512)),
            empty_cameras: 0,
            adapt_to_pi_aloha: false,
            tokenizer_max_length: 48,
            num_steps: 10,
            vlm_model_name: SMOLVLM2_500M.to_owned(),
            add_image_special_tokens: false,
            attention_mode: AttentionMode::CrossAttn,
            num_expert_layers: -1,
            num_vlm_layers: 16,
            self_attn_every_n_layers: 2,
            expert_width_multiplier: 0.75,
            min_period: 4e-3,
            max_period: 4.0,
            early_exit_layers: None,
        }
    }
}

impl SmolVlaConfig {
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
        let config: Self = serde_json::from_str(text)
            .map_err(|e| ModelError::config(path, "the file", format!("cannot be read: {e}")))?;
        config.check(path, features)?;
        Ok(config)
    }

    fn check(&self, path: &Path, features: &Features) -> Result<(), ModelError> {
        for (key, value) in [
            ("chunk_size", self.chunk_size),
            ("max_state_dim", self.max_state_dim),
            ("max_action_dim", self.max_action_dim),
            ("tokenizer_max_length", self.tokenizer_max_length),
            ("num_steps", self.num_steps),
        ] {
            check_size(path, key, value)?;
        }
        let fail = |key: &str, reason: String| Err(ModelError::config(path, key, reason));
        if self.chunk_size > HORIZON_LIMIT {
            let found = self.chunk_size;
            return fail("chunk_size", format!("is {found}, expected at most {HORIZON_LIMIT}"));
        }
        let state = features.state_dim(path)?;
        if state > self.max_state_dim {
            let max = self.max_state_dim;
            return fail(
                "observation.state",
                format!("has {state} values, max_state_dim is {max}"),
            );
        }
        let action = features.action_dim(path)?;
        if action > self.max_action_dim {
            let max = self.max_action_dim;
            return fail("action", format!("has {action} values, max_action_dim is {max}"));
        }
        if features.cameras().next().is_none() {
            return fail("input_features", "names no camera; SmolVLA needs at least one".into());
        }
        if self.adapt_to_pi_aloha {
            let reason = "is true, which is not supported; convert state and actions outside";
            return fail("adapt_to_pi_aloha", reason.into());
        }
        let m = self.expert_width_multiplier;
        if !(m > 0.0 && m <= 16.0) {
            return fail("expert_width_multiplier", format!("is {m}, expected 0 to 16"));
        }
        let (min, max) = (self.min_period, self.max_period);
        if !(min > 0.0 && max >= min && max.is_finite()) {
            return fail(
                "min_period",
                format!("is {min} and max_period {max}; expected 0 < min ≤ max"),
            );
        }
        Ok(())
    }
}

/// Sizes of the text model (SmolLM2 kind).
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct TextConfig {
    /// Hidden size `D`.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Layers in the full model.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Size of one head; `None` divides the hidden size.
    pub head_dim: Option<usize>,
    /// Added to the mean square in each norm.
    #[serde(default = "text_eps")]
    pub rms_norm_eps: f64,
    /// Rows of the token table.
    pub vocab_size: usize,
}

fn text_eps() -> f64 {
    1e-5
}

impl TextConfig {
    /// Size of one head.
    pub fn head(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }
}

/// Sizes of the vision-language model.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct VlmConfig {
    /// The text model.
    pub text_config: TextConfig,
    /// The vision tower.
    pub vision_config: SiglipConfig,
    /// Side of the squares of patches that become one token.
    pub scale_factor: usize,
}

/// `config.json` of SmolVLM2-500M-Video-Instruct, as far as it is used here.
pub const SMOLVLM2_500M_CONFIG: &str = r#"{
  "model_type": "smolvlm",
  "scale_factor": 4,
  "text_config": {
    "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
    "num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64,
    "rms_norm_eps": 1e-05, "vocab_size": 49280
  },
  "vision_config": {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 512, "patch_size": 16, "layer_norm_eps": 1e-06
  }
}
"#;

impl VlmConfig {
    /// The sizes of `checkpoint`, checked.
    ///
    /// # Errors
    /// [`ModelError::Config`] with the key.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        let file = checkpoint.extra(super::VLM_CONFIG)?;
        Self::parse(&file.path, &file.text)
    }

    /// The sizes in `text`, checked; `path` is for messages.
    ///
    /// # Errors
    /// [`ModelError::Config`] with the key.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ModelError> {
        let config: Self = serde_json::from_str(text)
            .map_err(|e| ModelError::config(path, "the file", format!("cannot be read: {e}")))?;
        let (t, v) = (&config.text_config, &config.vision_config);
        for (key, value) in [
            ("scale_factor", config.scale_factor),
            ("text_config.hidden_size", t.hidden_size),
            ("text_config.intermediate_size", t.intermediate_size),
            ("text_config.num_hidden_layers", t.num_hidden_layers),
            ("text_config.num_attention_heads", t.num_attention_heads),
            ("text_config.num_key_value_heads", t.num_key_value_heads),
            ("text_config.head_dim", t.head()),
            ("text_config.vocab_size", t.vocab_size),
            ("vision_config.hidden_size", v.hidden_size),
            ("vision_config.intermediate_size", v.intermediate_size),
            ("vision_config.num_hidden_layers", v.num_hidden_layers),
            ("vision_config.num_attention_heads", v.num_attention_heads),
            ("vision_config.image_size", v.image_size),
            ("vision_config.patch_size", v.patch_size),
        ] {
            check_size(path, key, value)?;
        }
        for (key, value, divisor) in [
            ("text_config.num_attention_heads", t.num_attention_heads, t.num_key_value_heads),
            ("text_config.head_dim", t.head(), 2),
            ("vision_config.hidden_size", v.hidden_size, v.num_attention_heads),
            ("vision_config.image_size", v.image_size, v.patch_size),
        ] {
            if !value.is_multiple_of(divisor) {
                let reason = format!("is {value}, which {divisor} does not divide");
                return Err(ModelError::config(path, key, reason));
            }
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<SmolVlaConfig, ModelError> {
        let path = Path::new("config.json");
        SmolVlaConfig::parse(path, text, &Features::parse(path, text)?)
    }

    #[test]
    fn unusable_values_are_named() {
        let text = |e: Result<_, ModelError>| {
            e.map(|_: SmolVlaConfig| ()).expect_err("it is unusable").to_string()
        };
        assert!(text(parse(r#"{"type": "smolvla", "chunk_size": 0}"#)).contains("chunk_size"));
        assert!(text(parse(r#"{"type": "smolvla"}"#)).contains("observation.state"));
    }

    #[test]
    fn the_built_in_sizes_are_read() {
        let path = Path::new("built-in");
        let config = VlmConfig::parse(path, SMOLVLM2_500M_CONFIG).expect("it is a constant");
        assert_eq!(config.text_config.head(), 64);
    }
}
