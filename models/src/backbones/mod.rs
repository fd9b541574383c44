//! Networks that turn images and text into features, shared by the families.
//!
//! Shapes: `L` tokens, `D` hidden size, `H` query heads, `K` key heads, `hd` size of one head. There is no
//! batch dimension, and padding is left out of every sequence instead of being masked.

pub mod conv;
pub mod florence2;
pub mod gemma;
mod keys_values;
pub mod multihead;
pub mod resnet;
pub mod siglip;
mod tokens;

pub use keys_values::KeysValues;
pub use tokens::TokenTable;

/// Base of the rotary positions of every text model here; fixed in the references' code.
pub(crate) const ROPE_BASE: f32 = 10_000.0;
