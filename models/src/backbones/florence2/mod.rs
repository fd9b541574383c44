//! Florence-2 up to the output of its encoder: a vision tower (DaViT), a projector that makes tokens of its last
//! feature map, and the encoder half of its language model (BART). The decoder writes text and is left out.
//!
//! Shapes: feature maps are `[h·w, C]`, row by row, so that norms and linear layers work on them as on tokens.
//! There is no batch dimension.
//!
//! Sources: Florence-2 (arXiv 2311.06242), DaViT (2204.03645), BART (1910.13461); transformers 5.5
//! `models/florence2/modeling_florence2.py` and `models/bart/modeling_bart.py`.

mod arrange;
mod block;
mod config;
mod convolution;
mod encoder;
mod names;
mod vision;

pub use config::{FlorenceConfig, TextConfig, VisionConfig};
pub use encoder::Encoder;
pub use names::{NAMES, OLD_PROJECTION, modern_name};
pub use vision::{VisionFeatures, VisionTower};

/// Added to the variance in every norm.
const EPS: f64 = 1e-5;
