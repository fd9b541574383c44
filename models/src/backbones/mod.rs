//! Networks that turn images and text into features, shared by the families.
//!
//! Shapes: `L` tokens, `D` hidden size, `H` query heads, `K` key heads, `hd` size of one head. There is no
//! batch dimension, and padding is left out of every sequence instead of being masked.

pub mod florence2;
pub mod gemma;
pub mod siglip;
mod tokens;

use candle_core::{Result, Tensor};
pub use tokens::TokenTable;

/// Base of the rotary positions of every text model here; fixed in the references' code.
pub(crate) const ROPE_BASE: f32 = 10_000.0;

/// `x` (`[L, heads·hd]`) as heads: `[heads, L, hd]`.
pub(crate) fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    x.reshape((rows, heads, width / heads))?.transpose(0, 1)?.contiguous()
}

/// `x` (`[heads, L, hd]`) side by side: `[L, heads·hd]`.
pub(crate) fn join_heads(x: &Tensor) -> Result<Tensor> {
    let (heads, rows, size) = x.dims3()?;
    x.transpose(0, 1)?.contiguous()?.reshape((rows, heads * size))
}
