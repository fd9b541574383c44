//! A residual network at control rate: measured joints and planned action in, an offset of the plan out.
//!
//! ResiP (2407.16677) adds `scale · f(state, planned)` to the action in *normalised* space; in physical units that
//! is the same times what 1 means there, the `deviation`. A folder holds `residual.toml` and the ONNX file:
//!
//! ```toml
//! model = "residual.onnx"
//! rate = "100 Hz"                  # how often it runs; at most the control rate is useful
//! names = ["base", "elbow"]        # the arm's joints, in its order
//! units = "rad"                    # rad | deg, of everything below; or one for each joint
//! scale = 0.1                      # alpha of the paper
//!
//! [position]                       # measured positions; each of these three may be left out, but not all
//! input = "position"
//! normalization = { mode = "mean_std", mean = [0.0, 0.0], std = [1.0, 1.0] }    # as in manifest.toml
//!
//! [velocity]                       # measured velocities, in the unit per second
//! input = "velocity"
//!
//! [planned]                        # the base policy's action for this instant
//! input = "planned"
//!
//! [correction]
//! output = "correction"            # [1, D] or [D]
//! deviation = [1.0, 1.0]           # what 1 of the output means, in the unit: the action's std (mean_std) or half
//!                                  # its range (min_max, quantiles); left out: 1
//! ```
//!
//! The offset's bound, its speed and what becomes of one that comes late are the control thread's
//! ([`sinew_runtime::control::ResidualTrack`]).

use std::path::{Path, PathBuf};

use serde::Deserialize;
use sinew_runtime::control::ResidualInput;
use sinew_runtime::{JointVec, MAX_JOINTS, PolicyError, units};

use super::binding::{Inputs, check_type, find, fit};
use super::flow::place;
use super::graph::{Element, Graph, OnnxOptions, open_graph};
use super::inputs::JointPort;
use super::manifest::{Normalization, StateInput, Units, parse_toml, read_manifest};
use crate::ModelError;

/// Name of the manifest in a residual policy's folder.
pub const RESIDUAL: &str = "residual.toml";

/// What the inputs and outputs of a residual network mean.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct ResidualManifest {
    model: PathBuf,
    rate: String,
    names: Vec<String>,
    units: Units,
    scale: f64,
    position: Option<JointInput>,
    velocity: Option<JointInput>,
    planned: Option<JointInput>,
    correction: Offset,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct JointInput {
    input: String,
    normalization: Option<Normalization>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Offset {
    output: String,
    deviation: Option<Vec<f64>>,
}

/// A residual network, checked against its manifest.
pub struct ResidualNet {
    graph: Box<dyn Graph>,
    position: Option<JointPort>,
    velocity: Option<JointPort>,
    planned: Option<JointPort>,
    output: usize,
    /// Radians of one unit of the output, for each joint.
    factors: Vec<f64>,
    names: Vec<String>,
    rate_hz: f64,
}

impl ResidualNet {
    /// Loads the network of `path`: a folder with [`RESIDUAL`], or that file.
    ///
    /// # Errors
    /// [`ModelError`] naming the manifest's key and what the ONNX file has instead.
    pub fn load(path: &Path, options: &OnnxOptions) -> Result<Self, ModelError> {
        let path = &if path.is_dir() { path.join(RESIDUAL) } else { path.to_owned() };
        if !path.is_file() {
            let remedy = "a residual policy's folder holds residual.toml and the ONNX file".into();
            return Err(ModelError::FileMissing { path: path.clone(), remedy });
        }
        let manifest: ResidualManifest = parse_toml(path, &read_manifest(path)?)?;
        let graph = open_graph(&path.with_file_name("").join(&manifest.model), options)?;
        Self::bind(path, manifest, graph)
    }

    fn bind(
        path: &Path,
        manifest: ResidualManifest,
        graph: Box<dyn Graph>,
    ) -> Result<Self, ModelError> {
        let dim = manifest.names.len();
        if dim == 0 || dim > MAX_JOINTS {
            let reason = format!("has {dim} entries, expected 1 to {MAX_JOINTS}");
            return Err(ModelError::config(path, "names", reason));
        }
        let rate_hz = units::parse_frequency(&manifest.rate)
            .map_err(|e| ModelError::config(path, "rate", e.to_string()))?;
        let mut inputs = Inputs::new(path, graph.inputs().iter());
        let mut port = |key: &str, joint: &Option<JointInput>| {
            let bind = |joint: &JointInput| {
                let state = StateInput {
                    input: joint.input.clone(),
                    names: manifest.names.clone(),
                    units: manifest.units.clone(),
                    normalization: joint.normalization.clone(),
                };
                JointPort::new(path, key, &state, &mut inputs)
            };
            joint.as_ref().map(bind).transpose()
        };
        let position = port("position", &manifest.position)?;
        let velocity = port("velocity", &manifest.velocity)?;
        let planned = port("planned", &manifest.planned)?;
        inputs.all_fed()?;
        let (key, name) = ("correction.output", &manifest.correction.output);
        let output = find(path, key, "output", name, graph.outputs().iter())?;
        check_type(path, key, output, &[Element::Float32])?;
        fit(path, key, output, &[Some(dim)])?;
        let deviation = manifest.correction.deviation.unwrap_or_else(|| vec![1.0; dim]);
        let scale = manifest.scale;
        if deviation.len() != dim || !deviation.iter().all(|d| (d * scale).is_finite()) {
            let reason = format!(
                "has {} values, and with scale {scale} they must be {dim} finite numbers",
                deviation.len()
            );
            return Err(ModelError::config(path, "correction.deviation", reason));
        }
        let degrees = manifest.units.degrees(path, "the file", dim)?;
        let factor = |(deviation, degrees): (&f64, &bool)| {
            let unit = if *degrees { 1f64.to_radians() } else { 1.0 };
            scale * deviation * unit
        };
        Ok(Self {
            output: place(graph.outputs(), name),
            position,
            velocity,
            planned,
            factors: deviation.iter().zip(&degrees).map(factor).collect(),
            names: manifest.names,
            rate_hz,
            graph,
        })
    }

    /// The joints, in order.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// How often it runs (Hz).
    pub fn rate_hz(&self) -> f64 {
        self.rate_hz
    }

    /// Name of the engine that runs it.
    pub fn engine(&self) -> &'static str {
        self.graph.engine()
    }

    /// The offset (rad) of the plan that `input` asks for.
    ///
    /// # Errors
    /// [`PolicyError`] when the input is not finite or of another width, or the network gives no finite offset.
    pub fn correct(&mut self, input: &ResidualInput) -> Result<JointVec, PolicyError> {
        let ports = [
            (&self.position, &input.position),
            (&self.velocity, &input.velocity),
            (&self.planned, &input.planned),
        ];
        let mut arrays = Vec::with_capacity(ports.len());
        for (port, values) in ports {
            if let Some(port) = port {
                arrays.push((port.input.as_str(), port.array(values.as_slice())?));
            }
        }
        let inputs: Vec<_> = arrays.iter().map(|(name, array)| (*name, array)).collect();
        let outputs = self.graph.run(&inputs).map_err(PolicyError::Compute)?;
        let values = outputs.get(self.output).and_then(|array| array.as_floats());
        let values =
            values.filter(|values| values.len() == self.factors.len()).ok_or_else(|| {
                PolicyError::Compute(
                    "the residual network gave no offset for each joint".to_owned(),
                )
            })?;
        let mut offset = JointVec::zeros(self.factors.len());
        for (joint, (value, factor)) in values.iter().zip(&self.factors).enumerate() {
            offset[joint] = f64::from(*value) * factor;
        }
        if offset.is_finite() {
            Ok(offset)
        } else {
            Err(PolicyError::NotFinite { what: "residual offset" })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_in_the_documentation_is_read() {
        let text = super::super::manifest::documented(include_str!("residual.rs"));
        let manifest: ResidualManifest =
            parse_toml(Path::new(RESIDUAL), &text).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(manifest.names.len(), manifest.correction.deviation.map_or(0, |d| d.len()));
    }
}
