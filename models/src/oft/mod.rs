//! Parallel decoding with L1 regression: one pass over observation and empty action tokens, then a small
//! network from their states to the whole chunk.
//!
//! The sequence is SmolVLA's prefix with the state through a projector of two layers, followed by `H·D` action
//! tokens whose embeddings are zero; every token sees every other. The states of the `D` tokens of one action,
//! side by side, go through an MLP with residual blocks. With FiLM the instruction's mean embedding scales and
//! shifts every vision layer between attention and MLP.
//!
//! Source: OpenVLA-OFT (arXiv 2502.19645), `prismatic/models/action_heads.py`, `projectors.py`,
//! `film_vit_wrapper.py`. The layout of the checkpoint is our own; `tests/reference/oft.py` is the reference.

mod model;
mod policy;

pub use model::{OftConfig, OftVla};
pub use policy::OftPolicy;
use serde_json::{Value, json};

use sinew_runtime::PrefixSupport;

use crate::ModelError;
use crate::caches::Reusable;
use crate::checkpoint::Checkpoint;
use crate::families::Family;
use crate::smolvla;

/// Parallel decoding in the registry.
pub(crate) static FAMILY: Family = Family {
    name: "oft",
    backbone: "SmolVLM2 (SigLIP, SmolLM2)",
    head: "parallel decoding, L1 regression",
    proof: "tests/reference/oft.py",
    planned: |_| PrefixSupport::default(),
    names: smolvla::NAMES,
    unused: |name| name.ends_with("lm_head.weight"),
    extras: smolvla::EXTRAS,
    keep: smolvla::keep,
    follows_velocity: false,
    streams: false,
    caches: Reusable { blocks: false, patches: false, exits: false },
    sizes,
    load: |checkpoint, options| Ok(Box::new(OftPolicy::load(checkpoint, options)?)),
};

fn sizes(checkpoint: &Checkpoint) -> Result<Value, ModelError> {
    let (mut sizes, config) = (smolvla::vlm_sizes(checkpoint)?, OftConfig::of(checkpoint)?);
    if let Some(sizes) = sizes.as_object_mut() {
        sizes.insert("film".into(), json!(config.use_film));
        sizes.insert("head_width".into(), json!(config.head_width));
        sizes.insert("denoise_steps".into(), json!(1));
    }
    Ok(sizes)
}
