//! ACT: a transformer that gives a whole chunk of actions in one pass.
//!
//! Shapes: `L` tokens, `D` hidden size, `H` action horizon. There is no batch dimension. The decoder of a
//! conditional variational autoencoder: at inference its latent is zero, and its encoder is not used.
//!
//! Source: Zhao et al. 2023 (arXiv 2304.13705), LeRobot 0.6.1 `src/lerobot/policies/act/modeling_act.py`.

mod config;
mod model;
mod policy;
mod transformer;

pub use config::{ActConfig, FeedForward};
pub use model::{Act, Encoded, sine_positions};
pub use policy::ActPolicy;

use serde_json::{Value, json};

use sinew_runtime::PrefixSupport;

use crate::ModelError;
use crate::caches::Reusable;
use crate::checkpoint::{Checkpoint, StoredType};
use crate::families::{Family, Keep};

/// ACT in the registry.
pub(crate) static FAMILY: Family = Family {
    name: "act",
    backbone: "ResNet-18",
    head: "transformer, all actions at once",
    proof: "LeRobot 0.6.1",
    planned: |_| PrefixSupport::default(),
    names: &[],
    // The encoder of whole chunks makes the latent in training; at inference that is zero.
    unused: |name| name.starts_with("vae_encoder") || name == "encoder_latent_input_proj.weight",
    extras: &[],
    keep,
    follows_velocity: false,
    streams: false,
    caches: Reusable { blocks: false, patches: false, exits: false },
    sizes,
    load: |checkpoint, options| Ok(Box::new(ActPolicy::load(checkpoint, options)?)),
};

fn keep(name: &str) -> Keep {
    if name.contains("pos_embed") {
        return Some((StoredType::F32, "position table: added to every token, not multiplied"));
    }
    if name.starts_with("backbone.") {
        let reason = "convolutions: batch norms are folded into them, and they are widened once";
        return Some((StoredType::F16, reason));
    }
    let reason =
        "projections of state, image features and action: small, at both ends of the network";
    let layer = name.starts_with("encoder.layers.") || name.starts_with("decoder.layers.");
    (!layer).then_some((StoredType::F32, reason))
}

fn sizes(checkpoint: &Checkpoint) -> Result<Value, ModelError> {
    let config = ActConfig::of(checkpoint)?;
    Ok(json!({
        "width": config.dim_model,
        "heads": config.n_heads,
        "feed_forward": config.dim_feedforward,
        "encoder_layers": config.n_encoder_layers,
        "decoder_layers": config.n_decoder_layers,
        "action_horizon": config.chunk_size,
        "denoise_steps": 1,
    }))
}
