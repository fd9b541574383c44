//! `config.json` of an ACT policy.
//!
//! Unknown keys are tolerated; missing ones take the defaults of LeRobot 0.6
//! (`src/lerobot/policies/act/configuration_act.py`).

use std::path::Path;

use serde::Deserialize;

use crate::ModelError;
use crate::checkpoint::{Checkpoint, check_size};

/// What stands between the two matrices of a feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FeedForward {
    /// Rectifier.
    Relu,
    /// GELU, exact form.
    Gelu,
}

/// An ACT policy's configuration.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct ActConfig {
    /// Observations that the network sees; 1.
    pub n_obs_steps: usize,
    /// Action horizon `H`.
    pub chunk_size: usize,
    /// Norms before the blocks instead of after them.
    pub pre_norm: bool,
    /// Hidden size `D`.
    pub dim_model: usize,
    /// Attention heads.
    pub n_heads: usize,
    /// Width of the feed-forward blocks.
    pub dim_feedforward: usize,
    /// Their activation.
    pub feedforward_activation: FeedForward,
    /// Layers of the encoder.
    pub n_encoder_layers: usize,
    /// Layers of the decoder.
    pub n_decoder_layers: usize,
    /// Weight decay of temporal ensembling; `None` where the policy was not meant for it.
    pub temporal_ensemble_coeff: Option<f64>,
}

impl Default for ActConfig {
    fn default() -> Self {
        Self {
            n_obs_steps: 1,
            chunk_size: 100,
            pre_norm: false,
            dim_model: 512,
            n_heads: 8,
            dim_feedforward: 3200,
            feedforward_activation: FeedForward::Relu,
            n_encoder_layers: 4,
            n_decoder_layers: 1,
            temporal_ensemble_coeff: None,
        }
    }
}

/// No transformer here is deeper.
const LAYER_LIMIT: usize = 256;

impl ActConfig {
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
        let config: Self = serde_json::from_str(text)
            .map_err(|e| ModelError::config(path, "the file", format!("cannot be read: {e}")))?;
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ModelError> {
        for (key, value) in [
            ("chunk_size", self.chunk_size),
            ("dim_model", self.dim_model),
            ("n_heads", self.n_heads),
            ("dim_feedforward", self.dim_feedforward),
        ] {
            check_size(path, key, value)?;
        }
        let fail = |key: &str, reason: String| Err(ModelError::config(path, key, reason));
        for (key, layers) in [
            ("n_encoder_layers", self.n_encoder_layers),
            ("n_decoder_layers", self.n_decoder_layers),
        ] {
            if layers == 0 || layers > LAYER_LIMIT {
                return fail(key, format!("is {layers}, expected 1 to {LAYER_LIMIT}"));
            }
        }
        if self.n_obs_steps != 1 {
            return fail(
                "n_obs_steps",
                format!("is {}; ACT sees one observation", self.n_obs_steps),
            );
        }
        if !self.dim_model.is_multiple_of(self.n_heads) {
            let (width, heads) = (self.dim_model, self.n_heads);
            return fail("dim_model", format!("is {width}, which {heads} heads do not divide"));
        }
        if !self.dim_model.is_multiple_of(4) {
            let width = self.dim_model;
            return fail("dim_model", format!("is {width}; the image positions need four parts"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(extra: &str) -> Result<ActConfig, ModelError> {
        ActConfig::parse(Path::new("config.json"), &format!(r#"{{{extra} "type": "act"}}"#))
    }

    #[test]
    fn defaults_are_lerobots() {
        let config = parse("").expect("this is a whole configuration");
        assert_eq!((config.chunk_size, config.dim_feedforward), (100, 3200));
        assert_eq!(config.feedforward_activation, FeedForward::Relu);
    }

    #[test]
    fn unusable_values_are_named() {
        for (extra, word) in [
            (r#""n_heads": 7,"#, "dim_model"),
            (r#""chunk_size": 0,"#, "chunk_size"),
            (r#""n_obs_steps": 2,"#, "n_obs_steps"),
            (r#""n_decoder_layers": 99999,"#, "n_decoder_layers"),
            (r#""feedforward_activation": "glu","#, "glu"),
        ] {
            let e = parse(extra).expect_err(word);
            assert!(e.to_string().contains(word), "{e}");
        }
    }
}
