//! From the network's actions to physical ones.

use std::path::Path;

use sinew_runtime::PolicyError;

use super::binding::fit;
use super::graph::{Array, Port};
use super::manifest::{ActionOutput, normalizer};
use crate::ModelError;
use crate::processors::Normalizer;

/// Actions of the network (`[H, W]`, or `[W]` for one) as physical ones (`[H, D]`).
pub(super) struct ActionDecoder {
    degrees: Vec<bool>,
    normalizer: Normalizer,
    /// Shape in the graph.
    pub shape: Vec<usize>,
}

impl ActionDecoder {
    /// Binds the actions to `port`, the manifest's `key`.
    ///
    /// # Errors
    /// [`ModelError::Config`] for what the graph contradicts.
    pub fn new(
        path: &Path,
        key: &str,
        action: &ActionOutput,
        port: &Port,
    ) -> Result<Self, ModelError> {
        let dim = action.names.len();
        let width = action.width.unwrap_or(dim);
        if dim == 0 || width < dim {
            let reason = format!("is {width}, and there are {dim} names; name at most as many");
            return Err(ModelError::config(path, "action.width", reason));
        }
        let single = port.shape.as_ref().is_some_and(|shape| shape.len() == 1);
        let wanted = [action.horizon, Some(width)];
        let wanted =
            if single && action.horizon.is_none_or(|h| h == 1) { &wanted[1..] } else { &wanted };
        Ok(Self {
            degrees: action.units.degrees(path, "action", dim)?,
            normalizer: normalizer(path, "action", dim, action.normalization.as_ref())?,
            shape: fit(path, key, port, wanted)?,
        })
    }

    /// Action dimension `D`.
    pub fn dim(&self) -> usize {
        self.degrees.len()
    }

    /// Values that the network gives for one action, `W`.
    pub fn width(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Action horizon `H`.
    pub fn horizon(&self) -> usize {
        self.shape.iter().product::<usize>() / self.width().max(1)
    }

    /// The actions in `array`, row by row, in physical units.
    ///
    /// # Errors
    /// [`PolicyError::Compute`] for another shape than the manifest's; [`PolicyError::NotFinite`] for a
    /// value that is no number.
    pub fn decode(&self, array: &Array) -> Result<Vec<f64>, PolicyError> {
        let values = array.as_floats().filter(|_| array.shape == self.shape).ok_or_else(|| {
            PolicyError::Compute(format!(
                "the model gave actions of shape {:?}, the manifest says {:?} of floats",
                array.shape, self.shape
            ))
        })?;
        let mut out = Vec::with_capacity(self.horizon() * self.dim());
        for row in values.chunks_exact(self.width()) {
            for (dim, (value, degrees)) in row.iter().zip(&self.degrees).enumerate() {
                let value = self.normalizer.unnormalize(dim, f64::from(*value));
                if !value.is_finite() {
                    return Err(PolicyError::NotFinite { what: "action chunk" });
                }
                out.push(if *degrees { value.to_radians() } else { value });
            }
        }
        Ok(out)
    }

    /// Physical actions (`[R, D]`) as the network has them (`[R, W]`), the padding zero.
    ///
    /// # Errors
    /// [`PolicyError::NotFinite`] for a value that is none.
    pub fn encode(&self, actions: &[f64]) -> Result<Vec<f32>, PolicyError> {
        let (dim, width) = (self.dim(), self.width());
        let mut out = Vec::with_capacity(actions.len() / dim * width);
        for row in actions.chunks_exact(dim) {
            if row.iter().any(|v| !v.is_finite()) {
                return Err(PolicyError::NotFinite { what: "planned action" });
            }
            for (dim, (value, degrees)) in row.iter().zip(&self.degrees).enumerate() {
                let value = if *degrees { value.to_degrees() } else { *value };
                out.push(self.normalizer.normalize(dim, value as f32));
            }
            out.extend(std::iter::repeat_n(0.0, width - dim));
        }
        Ok(out)
    }
}
