//! SmolVLA: a vision-language model whose keys and values an action expert attends to while it denoises
//! a chunk of actions.
//!
//! Shapes: `L` tokens, `D` text hidden size, `H` action horizon, `M` = `max_action_dim`. There is no batch
//! dimension. Padding tokens and masked cameras are left out of every sequence instead of being
//! masked: no valid token ever reads them, so the numbers are the same.
//!
//! Source: LeRobot 0.6.1 `src/lerobot/policies/smolvla/modeling_smolvla.py` and `smolvlm_with_expert.py`;
//! transformers `models/smolvlm/modeling_smolvlm.py`.

mod config;
mod expert;
mod model;
mod observer;
mod policy;
mod preparer;
mod text;
mod vision;

pub use crate::heads::flow::{EulerSampler, gaussian_noise, time_embedding};
pub use config::{AttentionMode, SMOLVLM2_500M, SMOLVLM2_500M_CONFIG, SmolVlaConfig, VlmConfig};
pub use expert::ExpertCache;
pub use model::{SmolVla, Stack};
pub(crate) use observer::{Observer, Parts};
pub use policy::SmolVlaPolicy;
pub use preparer::{Inputs, Preparer};
pub use text::Prefix;
pub use vision::VisionFeatures;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sinew_runtime::PrefixSupport;

use crate::ModelError;
use crate::caches::Reusable;
use crate::checkpoint::{Checkpoint, StoredType};
use crate::families::{Extra, Family, Keep};

/// Role of the vision-language model's `config.json`.
pub(crate) const VLM_CONFIG: &str = "vlm_config";
/// Role of `tokenizer.json`.
pub(crate) const TOKENIZER: &str = "tokenizer";

/// Names of the vision-language model's tensors, in LeRobot's checkpoints and here.
pub(crate) const NAMES: &[(&str, &str)] = &[
    ("model.vlm_with_expert.vlm.model.vision_model.encoder.layers.", "vision.layers."),
    ("model.vlm_with_expert.vlm.model.vision_model.", "vision."),
    ("model.vlm_with_expert.vlm.model.connector.modality_projection.proj.", "connector."),
    ("model.vlm_with_expert.vlm.model.text_model.", "text."),
    ("model.vlm_with_expert.lm_expert.", "expert."),
];

/// Its configuration and its tokenizer.
pub(crate) const EXTRAS: &[Extra] = &[
    Extra {
        role: VLM_CONFIG,
        candidates: |config| vlm_files(config, "config.json"),
        built_in: |config| (vlm_name(config) == SMOLVLM2_500M).then_some(SMOLVLM2_500M_CONFIG),
        remedy: Some("copy config.json of the vision-language model there"),
    },
    Extra {
        role: TOKENIZER,
        candidates: |config| vlm_files(config, "tokenizer.json"),
        built_in: |_| None,
        remedy: Some("copy tokenizer.json of the vision-language model there"),
    },
];

/// SmolVLA in the registry.
pub(crate) static FAMILY: Family = Family {
    name: "smolvla",
    backbone: "SmolVLM2 (SigLIP, SmolLM2)",
    head: "flow matching",
    proof: "LeRobot 0.6.1",
    planned: |actions| PrefixSupport {
        guided: true,
        trained: actions.trained_prefix,
        warm_start: true,
    },
    names: NAMES,
    unused: |name| name.ends_with("lm_head.weight"),
    extras: EXTRAS,
    keep,
    follows_velocity: true,
    streams: false,
    caches: Reusable { blocks: true, patches: true, exits: true },
    sizes,
    load: |checkpoint, options| Ok(Box::new(SmolVlaPolicy::load(checkpoint, options)?)),
};

fn vlm_name(config: &Value) -> &str {
    config.get("vlm_model_name").and_then(Value::as_str).unwrap_or(SMOLVLM2_500M)
}

/// Where `file` of the vision-language model may lie; its tokenizer also beside the policy's configuration.
fn vlm_files(config: &Value, file: &str) -> Vec<PathBuf> {
    let own = (file != "config.json").then(|| PathBuf::from(file));
    let named = Path::new(vlm_name(config)).join(file);
    let folders = ["tokenizer", "vlm"].map(|folder| Path::new(folder).join(file));
    own.into_iter().chain([named]).chain(folders).collect()
}

/// How a bundle keeps the tensor `name`; heads on this backbone are named apart from it.
pub(crate) fn keep(name: &str) -> Keep {
    if name.contains("position_embedding") {
        return Some((StoredType::F32, "position table: added to every patch, not multiplied"));
    }
    if !["vision.", "connector.", "text.", "expert."].iter().any(|p| name.starts_with(p)) {
        let reason = "projections of state, action and flow time: small, and errors enter each \
                      denoise step";
        return Some((StoredType::F32, reason));
    }
    let reason = "token table: a few rows are looked up, none is multiplied";
    name.contains("embed_tokens").then_some((StoredType::F16, reason))
}

fn sizes(checkpoint: &Checkpoint) -> Result<Value, ModelError> {
    let (config, mut sizes) = (SmolVlaConfig::of(checkpoint)?, vlm_sizes(checkpoint)?);
    if let Some(sizes) = sizes.as_object_mut() {
        let width = (VlmConfig::of(checkpoint)?.text_config.hidden_size as f64
            * config.expert_width_multiplier) as usize;
        sizes.insert("expert_width".into(), json!(width));
        sizes.insert("attention".into(), json!(config.attention_mode));
    }
    Ok(sizes)
}

/// Sizes that every head on this backbone has.
pub(crate) fn vlm_sizes(checkpoint: &Checkpoint) -> Result<Value, ModelError> {
    let (config, vlm) = (SmolVlaConfig::of(checkpoint)?, VlmConfig::of(checkpoint)?);
    let (text, vision) = (&vlm.text_config, &vlm.vision_config);
    let layers = usize::try_from(config.num_vlm_layers).ok().filter(|n| *n > 0);
    Ok(json!({
        "image": config.resize_imgs_with_padding,
        "patch": vision.patch_size,
        "vision_layers": vision.num_hidden_layers,
        "vision_width": vision.hidden_size,
        "text_layers": layers.unwrap_or(text.num_hidden_layers),
        "text_width": text.hidden_size,
        "heads": [text.num_attention_heads, text.num_key_value_heads],
        "vocabulary": text.vocab_size,
        "action_horizon": config.chunk_size,
        "denoise_steps": config.num_steps,
        "instruction_tokens": config.tokenizer_max_length,
    }))
}
