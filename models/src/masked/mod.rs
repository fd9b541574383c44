//! Masked diffusion of action tokens: the language layers themselves decide the bins of an action chunk, the
//! surest first.
//!
//! The observation is SmolVLA's prefix. The `L` = `H·D` action tokens follow it in the same layers, in the order
//! (action, dimension); they see the prefix and each other both ways, the prefix does not see them. Its keys and
//! values are computed once per chunk, each round costs only the action tokens.
//!
//! Source: Discrete Diffusion VLA (arXiv 2508.20072), with the block mask of UD-VLA (arXiv 2511.01718). The
//! layout of the checkpoint is our own; `tests/reference/masked.py` is the reference.

mod config;
mod model;
mod policy;

pub use config::{ActionLimits, MaskedConfig};
pub use model::MaskedVla;
pub use policy::MaskedPolicy;
use serde_json::{Value, json};

use sinew_runtime::PrefixSupport;

use crate::ModelError;
use crate::caches::Reusable;
use crate::checkpoint::Checkpoint;
use crate::families::Family;
use crate::smolvla;

/// Masked diffusion in the registry.
pub(crate) static FAMILY: Family = Family {
    name: "masked_diffusion",
    backbone: "SmolVLM2 (SigLIP, SmolLM2)",
    head: "masked diffusion of action tokens",
    proof: "tests/reference/masked.py",
    planned: |actions| PrefixSupport {
        trained: actions.trained_prefix,
        ..PrefixSupport::default()
    },
    names: smolvla::NAMES,
    unused: |name| name.ends_with("lm_head.weight"),
    extras: smolvla::EXTRAS,
    keep: smolvla::keep,
    follows_velocity: false,
    streams: false,
    caches: Reusable { blocks: false, patches: false, exits: false },
    sizes,
    load: |checkpoint, options| Ok(Box::new(MaskedPolicy::load(checkpoint, options)?)),
};

fn sizes(checkpoint: &Checkpoint) -> Result<Value, ModelError> {
    let (mut sizes, config) = (smolvla::vlm_sizes(checkpoint)?, MaskedConfig::of(checkpoint)?);
    if let Some(sizes) = sizes.as_object_mut() {
        sizes.insert("bins".into(), json!(config.num_bins));
    }
    Ok(sizes)
}
