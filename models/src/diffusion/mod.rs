//! Diffusion Policy: a chunk of actions is denoised, conditioned on the last few observations.
//!
//! Shapes: `H` horizon (steps that are denoised, of which the first lie in the past), `A` action dimension, `G` global
//! condition, `C` channels. There is no batch dimension.
//!
//! Source: Chi et al. 2023 (arXiv 2303.04137), LeRobot 0.6.1
//! `src/lerobot/policies/diffusion/modeling_diffusion.py`; the transformer of real-stanford/diffusion_policy
//! `diffusion_policy/model/diffusion/transformer_for_diffusion.py`.

mod config;
mod encoder;
mod history;
mod model;
mod planned;
mod policy;
mod streaming;
mod transformer;
mod unet;

pub use config::{Denoiser, DiffusionConfig};
pub use encoder::{RgbEncoder, RgbFeatures};
pub use history::History;
pub use model::{Condition, DiffusionModel};
pub use policy::DiffusionPolicy;
pub use transformer::Transformer;
pub use unet::Unet;

use serde_json::{Value, json};

use sinew_runtime::PrefixSupport;

use crate::ModelError;
use crate::caches::Reusable;
use crate::checkpoint::{Checkpoint, StoredType};
use crate::families::{Family, Keep};

/// Key of the environment's state, which the networks know and robots do not give.
const ENVIRONMENT: &str = "observation.environment_state";

/// Diffusion Policy in the registry.
pub(crate) static FAMILY: Family = Family {
    name: "diffusion",
    backbone: "ResNet-18, spatial softmax",
    head: "denoising diffusion (DDPM, DDIM)",
    proof: "LeRobot 0.6.1",
    planned: |_| PrefixSupport { guided: true, trained: None, warm_start: true },
    names: &[("model.diffusion.", "")],
    // Batch norms count their batches in training; the softmax's grid is computed.
    unused: |name| name.ends_with(".num_batches_tracked") || name.ends_with(".pos_grid"),
    extras: &[],
    keep,
    follows_velocity: false,
    streams: true,
    caches: Reusable { blocks: true, patches: false, exits: false },
    sizes,
    load: |checkpoint, options| Ok(Box::new(DiffusionPolicy::load(checkpoint, options)?)),
};

fn keep(name: &str) -> Keep {
    if name.contains("pos_emb") {
        return Some((StoredType::F32, "position table: added to every token, not multiplied"));
    }
    if name.starts_with("unet.final_conv.") || name.starts_with("unet.diffusion_step_encoder.") {
        let reason = "few weights at the ends of the denoiser: their error enters every step whole";
        return Some((StoredType::F32, reason));
    }
    let layers = ["unet.diffusion_step_encoder.", "transformer.encoder.", "transformer.decoder."];
    let matrix = name.contains(".cond_encoder.") || layers.iter().any(|l| name.starts_with(l));
    let reason =
        "convolutions and what stands at both ends of the network: widened once, when loaded";
    (!matrix).then_some((StoredType::F16, reason))
}

fn sizes(checkpoint: &Checkpoint) -> Result<Value, ModelError> {
    let config = DiffusionConfig::of(checkpoint)?;
    let network = match config.denoiser {
        Denoiser::Unet => json!({"levels": config.down_dims}),
        Denoiser::Transformer => json!({
            "layers": config.n_layer,
            "width": config.n_emb,
            "heads": config.n_head,
        }),
    };
    Ok(json!({
        "observations": config.n_obs_steps,
        "horizon": config.horizon,
        "action_horizon": config.n_action_steps,
        "denoiser": network,
        "keypoints": config.spatial_softmax_num_keypoints,
        "denoise_steps": config.denoise_steps(),
        "training_steps": config.num_train_timesteps,
    }))
}
