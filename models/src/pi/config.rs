//! `config.json` of π0, π0.5 and π0-FAST, and the sizes of the networks it names.
//!
//! Source: LeRobot `src/lerobot/policies/{pi0,pi05,pi0_fast}/configuration_*.py`. Unknown keys are
//! tolerated; missing ones take the defaults there.

use std::path::Path;

use serde::Deserialize;

use crate::ModelError;
use crate::backbones::gemma::GemmaConfig;
use crate::backbones::siglip::SiglipConfig;
use crate::checkpoint::{Checkpoint, check_size};

/// The longest action horizon, and the most tokens that one chunk may be decoded from: attention among them takes
/// the square of it, and no tensor's shape tells a wrong one.
const LENGTH_LIMIT: usize = 1 << 12;

/// A policy's configuration.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct PiConfig {
    /// Sizes of the text model, by openpi's name.
    pub paligemma_variant: String,
    /// Sizes of the action expert, by openpi's name.
    pub action_expert_variant: String,
    /// Type that the network was trained in: `float32` or `bfloat16`.
    pub dtype: String,
    /// Action horizon `H`.
    pub chunk_size: usize,
    /// Actions of one decoded chunk (π0-FAST).
    pub n_action_steps: usize,
    /// Width that states are padded to.
    pub max_state_dim: usize,
    /// Width that the model denoises at.
    pub max_action_dim: usize,
    /// Denoise steps.
    pub num_inference_steps: usize,
    /// Shortest period of the time embedding.
    pub min_period: f64,
    /// Longest period of the time embedding.
    pub max_period: f64,
    /// Height and width that images are resized and padded to.
    pub image_resolution: (usize, usize),
    /// Cameras that the configuration invents; they are always masked.
    pub empty_cameras: usize,
    /// Longest prompt (tokens); `None` takes the pipeline's.
    pub tokenizer_max_length: Option<usize>,
    /// Most tokens of one chunk (π0-FAST).
    pub max_decoding_steps: usize,
    /// Tokens at the end of the vocabulary that mean no action (π0-FAST).
    pub fast_skip_tokens: usize,
    /// Softness of the decoding; 0 takes the likeliest token (π0-FAST).
    pub temperature: f64,
}

impl Default for PiConfig {
    fn default() -> Self {
        Self {
            paligemma_variant: "gemma_2b".to_owned(),
            action_expert_variant: "gemma_300m".to_owned(),
            dtype: "float32".to_owned(),
            chunk_size: 50,
            n_action_steps: 50,
            max_state_dim: 32,
            max_action_dim: 32,
            num_inference_steps: 10,
            min_period: 4e-3,
            max_period: 4.0,
            image_resolution: (224, 224),
            empty_cameras: 0,
            tokenizer_max_length: None,
            max_decoding_steps: 256,
            fast_skip_tokens: 128,
            temperature: 0.0,
        }
    }
}

impl PiConfig {
    /// The configuration of `checkpoint`, checked.
    ///
    /// # Errors
    /// [`ModelError::Config`] with the key.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        let path = checkpoint.config_path();
        let config: Self = serde_json::from_str(&checkpoint.config_text)
            .map_err(|e| ModelError::config(&path, "the file", format!("cannot be read: {e}")))?;
        config.check(&path)?;
        let (state, action) =
            (checkpoint.features.state_dim(&path)?, checkpoint.features.action_dim(&path)?);
        for (key, width, limit, most) in [
            ("observation.state", state, "max_state_dim", config.max_state_dim),
            ("action", action, "max_action_dim", config.max_action_dim),
        ] {
            if width > most {
                let reason = format!("has {width} values, {limit} is {most}");
                return Err(ModelError::config(&path, key, reason));
            }
        }
        if checkpoint.features.cameras().next().is_none() {
            let reason = "names no camera; a π policy needs at least one";
            return Err(ModelError::config(&path, "input_features", reason));
        }
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ModelError> {
        let (height, width) = self.image_resolution;
        for (key, value) in [
            ("chunk_size", self.chunk_size),
            ("n_action_steps", self.n_action_steps),
            ("max_state_dim", self.max_state_dim),
            ("max_action_dim", self.max_action_dim),
            ("num_inference_steps", self.num_inference_steps),
            ("image_resolution", height),
            ("tokenizer_max_length", self.tokenizer_max_length.unwrap_or(1)),
            ("max_decoding_steps", self.max_decoding_steps),
        ] {
            check_size(path, key, value)?;
        }
        let fail = |key: &str, reason: String| Err(ModelError::config(path, key, reason));
        if height != width || height > 1 << 14 {
            return fail("image_resolution", format!("is {height} x {width}, expected a square"));
        }
        for (key, length) in [
            ("chunk_size", self.chunk_size),
            ("n_action_steps", self.n_action_steps),
            ("max_decoding_steps", self.max_decoding_steps),
        ] {
            if length > LENGTH_LIMIT {
                return fail(key, format!("is {length}, expected at most {LENGTH_LIMIT}"));
            }
        }
        if self.temperature != 0.0 {
            let t = self.temperature;
            return fail("temperature", format!("is {t}; only greedy decoding (0) is supported"));
        }
        let (min, max) = (self.min_period, self.max_period);
        if !(min > 0.0 && max >= min && max.is_finite()) {
            let reason = format!("is {min} and max_period {max}; expected 0 < min ≤ max");
            return fail("min_period", reason);
        }
        Ok(())
    }
}

/// Sizes of the networks.
#[derive(Debug, Clone, PartialEq)]
pub struct PiSizes {
    /// The vision tower.
    pub vision: SiglipConfig,
    /// The text model.
    pub text: GemmaConfig,
    /// The action expert; none in π0-FAST.
    pub expert: Option<GemmaConfig>,
}

/// `dims.json`: sizes of a network that has no published name.
#[derive(Debug, Deserialize)]
struct Dims {
    paligemma: GemmaConfig,
    expert: Option<GemmaConfig>,
    vision: SiglipConfig,
}

impl PiSizes {
    /// The sizes of `checkpoint`; `expert` says whether its family has one.
    ///
    /// # Errors
    /// [`ModelError::Config`] with the key.
    pub fn of(checkpoint: &Checkpoint, expert: bool) -> Result<Self, ModelError> {
        let (config, path) = (PiConfig::of(checkpoint)?, checkpoint.config_path());
        let named = |key: &str, name: &str| {
            GemmaConfig::named(name).ok_or_else(|| {
                let reason = format!("is `{name}`, expected gemma_2b or gemma_300m");
                ModelError::config(&path, key, reason)
            })
        };
        let mut sizes = match checkpoint.extras.get(super::DIMS) {
            Some(file) => {
                let dims: Dims = serde_json::from_str(&file.text).map_err(|e| {
                    ModelError::config(&file.path, "the file", format!("cannot be read: {e}"))
                })?;
                Self { vision: dims.vision, text: dims.paligemma, expert: dims.expert }
            }
            None => Self {
                // SigLIP so400m, patch 14.
                vision: SiglipConfig {
                    hidden_size: 1152,
                    intermediate_size: 4304,
                    num_hidden_layers: 27,
                    num_attention_heads: 16,
                    image_size: config.image_resolution.0,
                    patch_size: 14,
                    layer_norm_eps: 1e-6,
                },
                text: named("paligemma_variant", &config.paligemma_variant)?,
                expert: Some(named("action_expert_variant", &config.action_expert_variant)?),
            },
        };
        sizes.vision.image_size = config.image_resolution.0;
        match (expert, &sizes.expert) {
            (true, None) => return Err(ModelError::config(&path, "expert", "has no sizes")),
            (false, _) => sizes.expert = None,
            _ => {}
        }
        sizes.check(&path)?;
        Ok(sizes)
    }

    fn check(&self, path: &Path) -> Result<(), ModelError> {
        let vision = &self.vision;
        for (key, value) in [
            ("vision.hidden_size", vision.hidden_size),
            ("vision.intermediate_size", vision.intermediate_size),
            ("vision.num_hidden_layers", vision.num_hidden_layers),
            ("vision.num_attention_heads", vision.num_attention_heads),
            ("vision.patch_size", vision.patch_size),
        ] {
            check_size(path, key, value)?;
        }
        let divides = |key: &str, value: usize, divisor: usize| {
            let reason = format!("is {value}, which {divisor} does not divide");
            if value.is_multiple_of(divisor) {
                Ok(())
            } else {
                Err(ModelError::config(path, key, reason))
            }
        };
        divides("vision.hidden_size", vision.hidden_size, vision.num_attention_heads)?;
        divides("image_resolution", vision.image_size, vision.patch_size)?;
        for (name, part) in std::iter::once(("text", &self.text))
            .chain(self.expert.as_ref().map(|expert| ("expert", expert)))
        {
            for (key, value) in [
                ("width", part.width),
                ("depth", part.depth),
                ("mlp_dim", part.mlp_dim),
                ("num_heads", part.num_heads),
                ("num_kv_heads", part.num_kv_heads),
                ("head_dim", part.head_dim),
            ] {
                check_size(path, &format!("{name}.{key}"), value)?;
            }
            divides(&format!("{name}.num_heads"), part.num_heads, part.num_kv_heads)?;
            divides(&format!("{name}.head_dim"), part.head_dim, 2)?;
        }
        if let Some(expert) = &self.expert {
            let attends = |c: &GemmaConfig| (c.depth, c.num_kv_heads, c.head_dim);
            if attends(&self.text) != attends(expert) {
                let reason = "has other layers or heads than the text model that it attends to";
                return Err(ModelError::config(path, "action_expert_variant", reason));
            }
            if expert.width < 4 || !expert.width.is_multiple_of(2) {
                let reason = format!("has width {}, expected an even one from 4", expert.width);
                return Err(ModelError::config(path, "action_expert_variant", reason));
            }
        }
        Ok(())
    }
}
