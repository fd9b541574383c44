//! SmolVLA: a vision-language model whose keys and values an action expert attends to while it denoises
//! a chunk of actions.
//!
//! Shapes: `L` tokens, `D` text hidden size, `H` action horizon, `M` = `max_action_dim`. There is no batch
//! dimension. Padding tokens and masked cameras are left out of every sequence instead of being
//! masked: no valid token ever reads them, so the numbers are the same.
//!
//! Source: LeRobot 0.6.1 `src/lerobot/policies/smolvla/modeling_smolvla.py` and `smolvlm_with_expert.py`;
//! transformers `models/smolvlm/modeling_smolvlm.py`.

mod expert;
mod flow;
mod model;
mod planned;
mod policy;
mod preparer;
mod text;
mod vision;

pub use expert::ExpertCache;
pub use flow::{EulerSampler, gaussian_noise, time_embedding};
pub use model::SmolVla;
pub use policy::SmolVlaPolicy;
pub use preparer::{Inputs, Preparer};
pub use text::Prefix;
pub use vision::VisionFeatures;

/// Base of the rotary positions, fixed in the reference's code whatever the VLM's configuration says.
const ROPE_BASE: f32 = 10_000.0;

use candle_core::{Result, Tensor};

/// `x` (`[L, heads·hd]`) as heads: `[heads, L, hd]`.
fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    x.reshape((rows, heads, width / heads))?.transpose(0, 1)?.contiguous()
}

/// `x` (`[heads, L, hd]`) side by side: `[L, heads·hd]`.
fn join_heads(x: &Tensor) -> Result<Tensor> {
    let (heads, rows, size) = x.dims3()?;
    x.transpose(0, 1)?.contiguous()?.reshape((rows, heads * size))
}
