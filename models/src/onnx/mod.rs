//! Any ONNX policy: a file exported by whatever trained it, and a manifest that says what its inputs mean.
//!
//! A folder holds `manifest.toml` ([`Manifest`]), the ONNX file that it names and, for a policy that takes an
//! instruction, the `tokenizer.json`. [`graph`] says what runs the file. Everything that manifest and file do
//! not agree on is an error before the first inference.

mod actions;
mod binding;
mod flow;
pub mod graph;
mod image;
mod inputs;
pub mod library;
pub mod manifest;
mod ort_graph;
mod policy;
mod residual;
mod rten_graph;
mod template;

pub use graph::{Engine, OnnxOptions};
pub use manifest::{MANIFEST, Manifest};
pub use policy::{OnnxInspection, OnnxPolicy, inspect, manifest_of};
pub use residual::{RESIDUAL, ResidualNet};
pub use template::template;
