//! From raw observations to the model's inputs, and from its output to physical units.

mod boundary;
pub mod crop;
pub mod normalize;
pub mod pipeline;
mod prompt;
pub mod resize;
pub mod tokenize;

pub use boundary::{Boundary, Origin};
pub use normalize::{NormMode, Normalizer, Statistics};
pub use pipeline::{Pipeline, Relative};
pub use prompt::{StatePrompt, state_bin};
pub use tokenize::Prompter;
