//! The loops where the time goes: products, attention, norms, activations.
//!
//! Networks are written with [`Linear`], [`attend`] and their kin on a [`Matrix`], whose memory is used again. Below lie, from the top: [`gemm`] cuts a product into cache-sized pieces for the threads of [`pool`];
//! [`strips`] puts activations, and `packing` the weights of [`packed`], in the order in which they are read; `quantise` rounds
//! activations to 8 bits; and [`simd`] has the innermost loops of every instruction set that [`isa`] knows.

mod attention;
mod convolution;
mod epilogue;
mod functions;
pub mod gemm;
mod inplace;
pub mod isa;
mod linear;
mod map;
mod matrix;
mod norm;
pub mod packed;
mod packing;
pub mod peak;
pub mod pool;
mod quantise;
mod rope;
pub mod simd;
pub mod strips;
pub mod tally;
#[cfg(test)]
mod tests;
mod window;
mod winograd;

pub use attention::{Visible, attend, attend_into};
pub use convolution::{Convolution, Doubling};
pub use epilogue::Epilogue;
pub use functions::Activation;
pub use inplace::{activate_all, add, add_all, add_scaled, multiply_all, sum};
pub use isa::Isa;
pub use linear::{After, Linear};
pub use map::{Map, Planes, max_pool};
pub use matrix::{Columns, Matrix, buffers_taken};
pub use norm::{GroupNorm, LayerNorm, RmsNorm};
pub use packed::{Compute, Packed};
pub use rope::Rope;
pub use window::Window;
