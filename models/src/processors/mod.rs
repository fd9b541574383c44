//! From raw observations to the model's inputs, and from its output to physical units.

mod boundary;
pub mod crop;
pub mod normalize;
pub mod pipeline;
pub mod resize;
pub mod tokenize;

pub use boundary::Boundary;
pub use normalize::{NormMode, Normalizer, Statistics};
pub use pipeline::Pipeline;
pub use tokenize::Prompter;
