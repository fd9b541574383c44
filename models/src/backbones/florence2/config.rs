//! `florence_config`: the sizes of vision tower and encoder.
//!
//! Two spellings are met: transformers' own, and that of the remote code which the first checkpoints were saved
//! with (`dim_embed`, `image_pos_embed`, `visual_temporal_embedding`).

use std::path::Path;

use serde::Deserialize;

use crate::ModelError;

/// The largest size that any one key may have; far above every model, far below an overflow.
const SIZE_LIMIT: usize = 1 << 20;

/// No tower has more stages, no stage or encoder more layers.
const DEPTH_LIMIT: usize = 1 << 10;

/// Sizes of the model.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct FlorenceConfig {
    /// The vision tower and the projector.
    pub vision_config: VisionConfig,
    /// The language model.
    pub text_config: TextConfig,
}

/// Sizes of the vision tower, one entry per stage in the lists.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct VisionConfig {
    /// Channels of the image.
    pub in_channels: usize,
    /// Blocks.
    pub depths: Vec<usize>,
    /// Side of the convolution that begins the stage (pixels).
    pub patch_size: Vec<usize>,
    /// Its stride.
    pub patch_stride: Vec<usize>,
    /// Its zero padding.
    pub patch_padding: Vec<usize>,
    /// Whether its norm comes before it.
    pub patch_prenorm: Vec<bool>,
    /// Channels.
    #[serde(alias = "dim_embed")]
    pub embed_dim: Vec<usize>,
    /// Heads of the attention inside windows.
    pub num_heads: Vec<usize>,
    /// Groups of the attention between channels.
    pub num_groups: Vec<usize>,
    /// Side of a window.
    pub window_size: usize,
    /// Width of the MLPs as a multiple of the channels.
    pub mlp_ratio: f64,
    /// Whether the packed projections have a bias.
    pub qkv_bias: bool,
    /// Activation of the MLPs; `gelu`.
    pub activation_function: String,
    /// Width of the tokens.
    pub projection_dim: usize,
    /// Rows of the temporal position table.
    pub max_temporal_embeddings: usize,
    /// Rows of the row and of the column position table.
    pub max_position_embeddings: usize,
    image_pos_embed: Option<OldPositions>,
    visual_temporal_embedding: Option<OldPositions>,
    image_feature_source: Option<Vec<String>>,
}

/// A position table in the older spelling.
#[derive(Debug, Clone, PartialEq, Deserialize)]
struct OldPositions {
    #[serde(rename = "type")]
    kind: String,
    #[serde(alias = "max_pos_embeddings", alias = "max_temporal_embeddings")]
    rows: usize,
}

impl Default for VisionConfig {
    fn default() -> Self {
        // transformers' Florence2VisionConfig.
        Self {
            in_channels: 3,
            depths: vec![1, 1, 9, 1],
            patch_size: vec![7, 3, 3, 3],
            patch_stride: vec![4, 2, 2, 2],
            patch_padding: vec![3, 1, 1, 1],
            patch_prenorm: vec![false, true, true, true],
            embed_dim: vec![128, 256, 512, 1024],
            num_heads: vec![4, 8, 16, 32],
            num_groups: vec![4, 8, 16, 32],
            window_size: 12,
            mlp_ratio: 4.0,
            qkv_bias: true,
            activation_function: "gelu".to_owned(),
            projection_dim: 1024,
            max_temporal_embeddings: 100,
            max_position_embeddings: 50,
            image_pos_embed: None,
            visual_temporal_embedding: None,
            image_feature_source: None,
        }
    }
}

/// Sizes of the language model, as far as its encoder needs them.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct TextConfig {
    /// Hidden size `D`.
    pub d_model: usize,
    /// Layers.
    pub encoder_layers: usize,
    /// Heads.
    pub encoder_attention_heads: usize,
    /// Width of the MLPs.
    pub encoder_ffn_dim: usize,
    /// Rows of the token table.
    pub vocab_size: usize,
    /// Tokens that the position table is made for.
    pub max_position_embeddings: usize,
    /// Whether embeddings are multiplied by √D.
    pub scale_embedding: bool,
    /// Activation of the MLPs; `gelu`.
    pub activation_function: String,
    /// Token that instructions are padded with.
    pub pad_token_id: u32,
}

impl Default for TextConfig {
    fn default() -> Self {
        // transformers' BartConfig.
        Self {
            d_model: 1024,
            encoder_layers: 12,
            encoder_attention_heads: 16,
            encoder_ffn_dim: 4096,
            vocab_size: 50_265,
            max_position_embeddings: 1024,
            scale_embedding: false,
            activation_function: "gelu".to_owned(),
            pad_token_id: 1,
        }
    }
}

impl FlorenceConfig {
    /// Translates the older spelling and checks every size; `path` is for messages.
    ///
    /// # Errors
    /// [`ModelError::Config`] with the key.
    pub fn check(&mut self, path: &Path) -> Result<(), ModelError> {
        self.vision_config.translate(path)?;
        self.vision_config.check(path)?;
        self.text_config.check(path)
    }
}

fn fail<T>(path: &Path, key: &str, reason: String) -> Result<T, ModelError> {
    Err(ModelError::config(path, &format!("florence_config.{key}"), reason))
}

fn sizes(path: &Path, limit: usize, values: &[(&str, usize)]) -> Result<(), ModelError> {
    match values.iter().find(|(_, value)| *value == 0 || *value > limit) {
        Some((key, value)) => fail(path, key, format!("is {value}, expected 1 to {limit}")),
        None => Ok(()),
    }
}

fn gelu(path: &Path, key: &str, found: &str) -> Result<(), ModelError> {
    if found == "gelu" {
        return Ok(());
    }
    fail(path, key, format!("is `{found}`; only `gelu` is supported"))
}

impl VisionConfig {
    fn translate(&mut self, path: &Path) -> Result<(), ModelError> {
        let rows = |key: &str, table: Option<OldPositions>, kind: &str, default: usize| match table
        {
            Some(table) if table.kind != kind => {
                let found = table.kind;
                fail(path, key, format!("has type `{found}`; only `{kind}` is supported"))
            }
            Some(table) => Ok(table.rows),
            None => Ok(default),
        };
        self.max_position_embeddings = rows(
            "vision_config.image_pos_embed",
            self.image_pos_embed.take(),
            "learned_abs_2d",
            self.max_position_embeddings,
        )?;
        self.max_temporal_embeddings = rows(
            "vision_config.visual_temporal_embedding",
            self.visual_temporal_embedding.take(),
            "COSINE",
            self.max_temporal_embeddings,
        )?;
        match self.image_feature_source.take() {
            Some(found) if found != ["spatial_avg_pool", "temporal_avg_pool"] => fail(
                path,
                "vision_config.image_feature_source",
                format!("is {found:?}; only the spatial and the temporal mean are supported"),
            ),
            _ => Ok(()),
        }
    }

    /// Number of stages.
    pub fn stages(&self) -> usize {
        self.embed_dim.len()
    }

    /// Width of the MLPs of stage `stage`.
    pub fn mlp_width(&self, stage: usize) -> usize {
        (self.embed_dim[stage] as f64 * self.mlp_ratio) as usize
    }

    fn check(&self, path: &Path) -> Result<(), ModelError> {
        let stages = self.stages();
        sizes(path, DEPTH_LIMIT, &[("vision_config.embed_dim", stages)])?;
        for (key, list) in [
            ("vision_config.embed_dim", &self.embed_dim),
            ("vision_config.depths", &self.depths),
            ("vision_config.patch_size", &self.patch_size),
            ("vision_config.patch_stride", &self.patch_stride),
            ("vision_config.num_heads", &self.num_heads),
            ("vision_config.num_groups", &self.num_groups),
        ] {
            if list.len() != stages {
                let found = list.len();
                return fail(path, key, format!("has {found} entries, embed_dim has {stages}"));
            }
            let limit = if key.ends_with("embed_dim") { SIZE_LIMIT } else { DEPTH_LIMIT };
            list.iter().try_for_each(|value| sizes(path, limit, &[(key, *value)]))?;
        }
        if self.patch_prenorm.len() != stages || self.patch_padding.len() != stages {
            let key = "vision_config.patch_padding";
            return fail(path, key, format!("or patch_prenorm has not {stages} entries"));
        }
        for stage in 0..stages {
            let (width, padding) = (self.embed_dim[stage], self.patch_padding[stage]);
            for (key, divisor) in [
                ("vision_config.num_heads", self.num_heads[stage]),
                ("vision_config.num_groups", self.num_groups[stage]),
            ] {
                if !width.is_multiple_of(divisor) {
                    let reason = format!("holds {divisor}, which does not divide {width} channels");
                    return fail(path, key, reason);
                }
            }
            if padding >= self.patch_size[stage] {
                let (size, key) = (self.patch_size[stage], "vision_config.patch_padding");
                return fail(path, key, format!("holds {padding}, the patch size is {size}"));
            }
        }
        sizes(
            path,
            SIZE_LIMIT,
            &[
                ("vision_config.in_channels", self.in_channels),
                ("vision_config.projection_dim", self.projection_dim),
                ("vision_config.max_temporal_embeddings", self.max_temporal_embeddings),
                ("vision_config.max_position_embeddings", self.max_position_embeddings),
            ],
        )?;
        sizes(path, DEPTH_LIMIT, &[("vision_config.window_size", self.window_size)])?;
        if self.in_channels != 3 {
            let found = self.in_channels;
            let key = "vision_config.in_channels";
            return fail(path, key, format!("is {found}; images have 3 channels"));
        }
        if !(self.mlp_ratio > 0.0 && self.mlp_ratio <= 64.0) {
            let found = self.mlp_ratio;
            return fail(path, "vision_config.mlp_ratio", format!("is {found}, expected 0 to 64"));
        }
        for stage in 0..stages {
            sizes(path, SIZE_LIMIT, &[("vision_config.mlp_ratio", self.mlp_width(stage))])?;
        }
        gelu(path, "vision_config.activation_function", &self.activation_function)
    }
}

impl TextConfig {
    fn check(&self, path: &Path) -> Result<(), ModelError> {
        sizes(
            path,
            SIZE_LIMIT,
            &[
                ("text_config.d_model", self.d_model),
                ("text_config.encoder_attention_heads", self.encoder_attention_heads),
                ("text_config.encoder_ffn_dim", self.encoder_ffn_dim),
                ("text_config.vocab_size", self.vocab_size),
                ("text_config.max_position_embeddings", self.max_position_embeddings),
            ],
        )?;
        sizes(path, DEPTH_LIMIT, &[("text_config.encoder_layers", self.encoder_layers)])?;
        let (width, heads) = (self.d_model, self.encoder_attention_heads);
        if !width.is_multiple_of(heads) {
            let key = "text_config.encoder_attention_heads";
            return fail(path, key, format!("is {heads}, which does not divide d_model {width}"));
        }
        if self.pad_token_id as usize >= self.vocab_size {
            let (found, rows) = (self.pad_token_id, self.vocab_size);
            let key = "text_config.pad_token_id";
            return fail(path, key, format!("is {found}, the table has {rows} tokens"));
        }
        gelu(path, "text_config.activation_function", &self.activation_function)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(vision: &str) -> Result<FlorenceConfig, ModelError> {
        let text = format!(r#"{{"vision_config": {vision}, "text_config": {{}}}}"#);
        let mut config: FlorenceConfig = serde_json::from_str(&text).expect("this is JSON");
        config.check(Path::new("config.json"))?;
        Ok(config)
    }

    #[test]
    fn both_spellings_give_the_same_sizes() {
        let old = parse(
            r#"{"model_type": "davit", "dim_embed": [64, 128, 256, 512], "enable_checkpoint": false,
                "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": 40},
                "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": 7},
                "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"]}"#,
        );
        let new = parse(
            r#"{"embed_dim": [64, 128, 256, 512], "max_position_embeddings": 40,
                "max_temporal_embeddings": 7}"#,
        );
        assert_eq!(old.expect("the older spelling"), new.expect("the newer spelling"));
    }

    #[test]
    fn unusable_sizes_are_named() {
        for (vision, key) in [
            (r#"{"num_heads": [3, 8, 16, 32]}"#, "num_heads"),
            (r#"{"depths": [1]}"#, "depths"),
            (r#"{"patch_stride": [4, 0, 2, 2]}"#, "patch_stride"),
            (r#"{"window_size": 0}"#, "window_size"),
            (r#"{"mlp_ratio": -1.0}"#, "mlp_ratio"),
            (r#"{"embed_dim": []}"#, "embed_dim"),
            (r#"{"image_feature_source": ["last_frame"]}"#, "image_feature_source"),
            (r#"{"activation_function": "relu"}"#, "activation_function"),
        ] {
            let error = parse(vision).expect_err(key).to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}
