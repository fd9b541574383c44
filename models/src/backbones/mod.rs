//! Networks that turn images and text into features, shared by the families.
//!
//! Shapes: `L` tokens, `D` hidden size, `H` query heads, `K` key heads, `hd` size of one head. There is no
//! batch dimension, and padding is left out of every sequence instead of being masked.

pub mod conv;
pub mod florence2;
pub mod gemma;
pub mod multihead;
pub mod resnet;
pub mod siglip;
mod tokens;

use candle_core::{Result, Tensor};
pub use tokens::TokenTable;

pub(crate) use crate::kernels::split_heads;

/// Base of the rotary positions of every text model here; fixed in the references' code.
pub(crate) const ROPE_BASE: f32 = 10_000.0;

/// `x` (`[heads, L, hd]`) side by side: `[L, heads·hd]`.
pub(crate) fn join_heads(x: &Tensor) -> Result<Tensor> {
    let (heads, rows, size) = x.dims3()?;
    x.transpose(0, 1)?.contiguous()?.reshape((rows, heads * size))
}
