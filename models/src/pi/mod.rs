//! The π policies: PaliGemma (SigLIP and Gemma) with an action expert (π0, π0.5), or alone, saying its
//! actions as tokens (π0-FAST).
//!
//! Shapes: `L` tokens, `P` prefix tokens, `D` text hidden size, `w` expert width, `H` action horizon, `M` =
//! `max_action_dim`. There is no batch dimension. Padding tokens and masked cameras are left out of every
//! sequence instead of being masked: no valid token ever reads them, so the numbers are the same.

mod config;
mod fast;
mod fast_policy;
mod network;
mod paligemma;
mod policy;
mod preparer;

use std::path::PathBuf;

use serde_json::{Value, json};

pub use config::{PiConfig, PiSizes};
pub use fast::PiFast;
pub use fast_policy::PiFastPolicy;
pub use network::Pi;
pub use paligemma::{ImageFeatures, PaliGemma};
pub use policy::PiPolicy;
pub use preparer::{Inputs, Preparer};

use sinew_runtime::PrefixSupport;

use crate::ModelError;
use crate::caches::Reusable;
use crate::checkpoint::{Checkpoint, StoredType};
use crate::families::{Extra, Family, Keep};

/// Role of `tokenizer.json`.
const TOKENIZER: &str = "tokenizer";
/// Role of the sizes of a network that has no published name.
const DIMS: &str = "dims";
/// Role of the action tokenizer's `tokenizer.json` (π0-FAST).
const ACTION_TOKENIZER: &str = "action_tokenizer";
/// Role of the action tokenizer's settings (π0-FAST).
const ACTION_TOKENIZER_CONFIG: &str = "action_tokenizer_config";

const VISION_LAYERS: (&str, &str) = (
    "model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers.",
    "vision.layers.",
);
const VISION: (&str, &str) =
    ("model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.", "vision.");
const CONNECTOR: (&str, &str) =
    ("model.paligemma_with_expert.paligemma.model.multi_modal_projector.linear.", "connector.");
const TEXT: (&str, &str) = ("model.paligemma_with_expert.paligemma.model.language_model.", "text.");
const LM_HEAD: (&str, &str) = ("model.paligemma_with_expert.paligemma.lm_head.", "lm_head.");
const EXPERT: (&str, &str) = ("model.paligemma_with_expert.gemma_expert.model.", "expert.");
const EXPERT_HEAD: (&str, &str) =
    ("model.paligemma_with_expert.gemma_expert.lm_head.", "expert_lm_head.");

const TOKENIZER_FILE: Extra = Extra {
    role: TOKENIZER,
    candidates: |_| vec!["tokenizer.json".into(), "tokenizer/tokenizer.json".into()],
    built_in: |_| None,
    remedy: Some("copy tokenizer.json of google/paligemma-3b-pt-224 there"),
};
const DIMS_FILE: Extra = Extra {
    role: DIMS,
    candidates: |_| vec!["dims.json".into()],
    built_in: |_| None,
    remedy: None,
};

fn unused(name: &str) -> bool {
    matches!(name, "lm_head.weight" | "expert_lm_head.weight")
}

/// π0 in the registry. Files older than LeRobot 0.4 call its time MLP as π0.5's.
pub(crate) static PI0: Family = Family {
    name: "pi0",
    backbone: "PaliGemma (SigLIP, Gemma)",
    head: "flow matching",
    proof: "LeRobot 0.6.1",
    planned: |actions| PrefixSupport {
        guided: true,
        trained: actions.trained_prefix,
        warm_start: true,
    },
    names: &[
        VISION_LAYERS,
        VISION,
        CONNECTOR,
        TEXT,
        LM_HEAD,
        EXPERT,
        EXPERT_HEAD,
        ("model.time_mlp_in.", "action_time_mlp_in."),
        ("model.time_mlp_out.", "action_time_mlp_out."),
        ("model.action_time_mlp_in.", "action_time_mlp_in."),
        ("model.action_time_mlp_out.", "action_time_mlp_out."),
    ],
    unused,
    extras: &[TOKENIZER_FILE, DIMS_FILE],
    keep,
    follows_velocity: true,
    streams: false,
    caches: Reusable { blocks: true, patches: false, exits: false },
    sizes: |checkpoint| sizes(checkpoint, true),
    load: |checkpoint, options| Ok(Box::new(PiPolicy::load(checkpoint, options)?)),
};

/// π0.5 in the registry. Files older than LeRobot 0.4 call its time MLP as π0's.
pub(crate) static PI05: Family = Family {
    name: "pi05",
    names: &[
        VISION_LAYERS,
        VISION,
        CONNECTOR,
        TEXT,
        LM_HEAD,
        EXPERT,
        EXPERT_HEAD,
        ("model.action_time_mlp_in.", "time_mlp_in."),
        ("model.action_time_mlp_out.", "time_mlp_out."),
        ("model.time_mlp_in.", "time_mlp_in."),
        ("model.time_mlp_out.", "time_mlp_out."),
    ],
    backbone: "PaliGemma (SigLIP, Gemma)",
    head: "flow matching, adaptive norms",
    proof: "LeRobot 0.6.1",
    planned: |actions| PrefixSupport {
        guided: true,
        trained: actions.trained_prefix,
        warm_start: true,
    },
    unused,
    extras: &[TOKENIZER_FILE, DIMS_FILE],
    keep,
    follows_velocity: true,
    streams: false,
    caches: Reusable { blocks: true, patches: false, exits: false },
    sizes: |checkpoint| sizes(checkpoint, true),
    load: |checkpoint, options| Ok(Box::new(PiPolicy::load(checkpoint, options)?)),
};

/// π0-FAST in the registry.
pub(crate) static PI0_FAST: Family = Family {
    name: "pi0_fast",
    backbone: "PaliGemma (SigLIP, Gemma)",
    head: "autoregressive FAST tokens",
    proof: "LeRobot 0.6.1",
    planned: |_| PrefixSupport::default(),
    names: &[VISION_LAYERS, VISION, CONNECTOR, TEXT, LM_HEAD],
    unused: |_| false,
    extras: &[
        TOKENIZER_FILE,
        DIMS_FILE,
        // The network can be looked at without them; the policy names them when they are missing.
        Extra {
            role: ACTION_TOKENIZER,
            candidates: |config| action_tokenizer(config, "tokenizer.json"),
            built_in: |_| None,
            remedy: None,
        },
        Extra {
            role: ACTION_TOKENIZER_CONFIG,
            candidates: |config| action_tokenizer(config, "processor_config.json"),
            built_in: |_| None,
            remedy: None,
        },
    ],
    keep,
    follows_velocity: false,
    streams: false,
    caches: Reusable { blocks: false, patches: false, exits: false },
    sizes: |checkpoint| sizes(checkpoint, false),
    load: |checkpoint, options| Ok(Box::new(PiFastPolicy::load(checkpoint, options)?)),
};

/// Where `file` of the action tokenizer may lie.
fn action_tokenizer(config: &Value, file: &str) -> Vec<PathBuf> {
    let named = config.get("action_tokenizer_name").and_then(Value::as_str);
    let named = named.map(|name| PathBuf::from(name).join(file));
    named.into_iter().chain([PathBuf::from("action_tokenizer").join(file)]).collect()
}

fn keep(name: &str) -> Keep {
    if name.contains("position_embedding") {
        return Some((StoredType::F32, "position table: added to every patch, not multiplied"));
    }
    if name.contains("norm.dense") {
        let reason = "from the flow time to every norm: small, and errors enter each denoise step";
        return Some((StoredType::F16, reason));
    }
    if !["vision.", "connector.", "text.", "expert.", "lm_head."]
        .iter()
        .any(|part| name.starts_with(part))
    {
        let reason = "projections of state, action and flow time: small, and errors enter each \
                      denoise step";
        return Some((StoredType::F32, reason));
    }
    let reason = "token table: a few rows are looked up, none is multiplied";
    name.contains("embed_tokens").then_some((StoredType::F16, reason))
}

fn sizes(checkpoint: &Checkpoint, expert: bool) -> Result<Value, ModelError> {
    let (config, sizes) = (PiConfig::of(checkpoint)?, PiSizes::of(checkpoint, expert)?);
    let (vision, text) = (&sizes.vision, &sizes.text);
    let mut all = json!({
        "image": config.image_resolution,
        "patch": vision.patch_size,
        "vision_layers": vision.num_hidden_layers,
        "vision_width": vision.hidden_size,
        "text_layers": text.depth,
        "text_width": text.width,
        "heads": [text.num_heads, text.num_kv_heads],
        "action_horizon": config.chunk_size,
    });
    if let Some(expert) = sizes.expert {
        all["expert_width"] = json!(expert.width);
        all["denoise_steps"] = json!(config.num_inference_steps);
    } else {
        all["action_tokens"] = json!(config.max_decoding_steps);
    }
    Ok(all)
}
