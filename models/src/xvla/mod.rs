//! X-VLA: a vision-language encoder, and a transformer that reads actions, features and learned prompts as one
//! sequence and predicts the clean actions.
//!
//! Shapes: `L` tokens, `D` width of the features, `W` width of the transformer, `H` action horizon, `M` width
//! that the model denoises at. There is no batch dimension.
//!
//! One checkpoint serves several robots ("domains"): the layers next to the actions and the prompts exist once
//! for each of them, and loading picks those of the checkpoint's domain.
//!
//! Sources: X-VLA (arXiv 2510.10274); LeRobot 0.6.1 `src/lerobot/policies/xvla`.

mod config;
mod head;
mod model;
mod policy;
mod preparer;
mod sampler;
mod space;

use std::path::{Path, PathBuf};

pub use config::XvlaConfig;
pub use head::{Head, HeadCache};
pub use model::{Features, Xvla};
pub use policy::XvlaPolicy;
pub use preparer::{Inputs, Preparer};
pub use sampler::CleanSampler;
use serde_json::{Value, json};
pub use space::ActionSpace;

use sinew_runtime::PrefixSupport;

use crate::ModelError;
use crate::backbones::florence2;
use crate::caches::Reusable;
use crate::checkpoint::{Checkpoint, StoredType};
use crate::families::{Extra, Family, Keep};

/// Role of `tokenizer.json`.
pub(crate) const TOKENIZER: &str = "tokenizer";

/// The transformer's prefix, after those of its backbone.
const NAMES: [(&str, &str); 11] = {
    let mut names = [("model.transformer.", "head."); 11];
    let mut i = 0;
    while i < florence2::NAMES.len() {
        names[i] = florence2::NAMES[i];
        i += 1;
    }
    names
};

/// X-VLA in the registry.
pub(crate) static FAMILY: Family = Family {
    name: "xvla",
    backbone: "Florence-2 (DaViT, BART encoder)",
    head: "flow matching by clean actions, soft prompts",
    proof: "LeRobot 0.6.1",
    planned: |_| PrefixSupport { warm_start: true, ..PrefixSupport::default() },
    names: &NAMES,
    unused: |name| name.starts_with("vlm.language_model."),
    extras: &[Extra {
        role: TOKENIZER,
        candidates: tokenizer_files,
        built_in: |_| None,
        remedy: Some("copy tokenizer.json of the tokenizer that config.json names there"),
    }],
    keep,
    follows_velocity: false,
    streams: false,
    caches: Reusable { blocks: true, patches: false, exits: false },
    sizes,
    load: |checkpoint, options| Ok(Box::new(XvlaPolicy::load(checkpoint, options)?)),
};

/// Where the tokenizer may lie: beside the configuration, or in a folder.
fn tokenizer_files(config: &Value) -> Vec<PathBuf> {
    let named = config.get("tokenizer_name").and_then(Value::as_str).unwrap_or("tokenizer");
    ["tokenizer", named, ""].map(|folder| Path::new(folder).join("tokenizer.json")).to_vec()
}

fn keep(name: &str) -> Keep {
    if name.contains("_embeddings.") || name.contains("pos_idx_to_embed") {
        return Some((StoredType::F32, "position table: added to every place, not multiplied"));
    }
    if name.contains("embed_positions") || name.contains("pos_emb") {
        return Some((StoredType::F32, "position table: added to every token, not multiplied"));
    }
    if name.contains("embed_tokens") || name.contains("soft_prompt") {
        let reason = "token table: a few rows are looked up, none is multiplied";
        return Some((StoredType::F16, reason));
    }
    if name == florence2::OLD_PROJECTION {
        return Some((StoredType::F16, "stored the other way round than it is multiplied"));
    }
    let of_domains = name.ends_with(".fc.weight") || name.ends_with(".bias.weight");
    if name.starts_with("head.action_") || of_domains {
        let reason = "projections of state, action and flow time, once per robot: small, and \
                      errors enter each denoise step";
        return Some((StoredType::F32, reason));
    }
    None
}

fn sizes(checkpoint: &Checkpoint) -> Result<Value, ModelError> {
    let config = XvlaConfig::of(checkpoint)?;
    let florence = &config.florence_config;
    let (text, vision) = (&florence.text_config, &florence.vision_config);
    Ok(json!({
        "image": config.resize_imgs_with_padding.map(|(height, width)| (width, height)),
        "views": config.views(checkpoint.features.cameras().count()),
        "vision_blocks": vision.depths,
        "vision_widths": vision.embed_dim,
        "text_layers": text.encoder_layers,
        "text_width": text.d_model,
        "vocabulary": text.vocab_size,
        "head_blocks": config.depth,
        "head_width": config.hidden_size,
        "heads": config.num_heads,
        "soft_prompts": config.len_soft_prompts,
        "domains": config.num_domains,
        "domain": checkpoint.preprocessor.pipeline.domain.unwrap_or(0),
        "action_space": config.action_mode,
        "action_horizon": config.chunk_size,
        "denoise_steps": config.num_denoising_steps,
        "instruction_tokens": config.tokenizer_max_length,
    }))
}
