//! Where physical units end and the network's begin: cameras, state and actions.

use std::collections::BTreeMap;

use sinew_runtime::{Image, Observation, PolicyError, PolicySpec};

use super::{Normalizer, resize};
use crate::checkpoint::Checkpoint;
use crate::kernels::Planes;
use crate::{LoadOptions, ModelError};

const IMAGES: &str = "observation.images.";

/// One camera input of a policy.
struct CameraInput {
    /// Name without `observation.images.`.
    name: String,
    normalizer: Normalizer,
    /// Invented by the configuration to stand for no camera.
    placeholder: bool,
}

/// Observations in physical units to the network's values, and back: which image is which input, what may be
/// missing, normalisation of state and action, degrees and radians.
pub struct Boundary {
    cameras: Vec<CameraInput>,
    rename: BTreeMap<String, String>,
    /// How many inputs may have no image.
    allowed_missing: usize,
    state: Normalizer,
    action: Normalizer,
    state_dim: usize,
    action_dim: usize,
    /// Per action dimension, whether the policy's unit is degrees.
    degrees: Vec<bool>,
    /// Per action dimension, whether the network's value is relative to the state; empty: none is.
    relative: Vec<bool>,
}

/// The state that relative actions start from, in the policy's units: the one of the observation that they were
/// computed from. Empty for policies without relative actions.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Origin(Vec<f64>);

impl Boundary {
    /// Reads features and pipelines of `checkpoint`; `allowed_missing` camera inputs may have no image.
    ///
    /// # Errors
    /// [`ModelError`] naming the statistics or key that cannot be used.
    pub fn new(checkpoint: &Checkpoint, allowed_missing: usize) -> Result<Self, ModelError> {
        let (features, path) = (&checkpoint.features, checkpoint.config_path());
        let (pre, post) = (&checkpoint.preprocessor, &checkpoint.postprocessor);
        let (state_dim, action_dim) = (features.state_dim(&path)?, features.action_dim(&path)?);
        let input = |kind: &str, key: &str, width: usize| {
            pre.pipeline.normalizer(kind, key, width, &pre.statistics, &pre.statistics_path)
        };
        let cameras = features
            .cameras()
            .map(|(key, _)| {
                let name = key.strip_prefix(IMAGES).or(key.strip_prefix("observation."));
                let name = name.unwrap_or(key).to_owned();
                let placeholder = name.starts_with("empty_camera_");
                Ok(CameraInput { name, normalizer: input("VISUAL", key, 3)?, placeholder })
            })
            .collect::<Result<_, ModelError>>()?;
        let units = &checkpoint.actions.action_units;
        let degrees: Vec<bool> = units.iter().map(|u| u == "deg").collect();
        if degrees.contains(&true) && state_dim != action_dim {
            let reason = format!(
                "holds deg, but the state has {state_dim} values and the action {action_dim}, so \
                 the state's units are not known; convert them outside"
            );
            return Err(ModelError::config(&path, "action_units", reason));
        }
        let relative = relative(checkpoint, state_dim, action_dim)?;
        let (rename, statistics) = (pre.pipeline.rename.clone(), &post.statistics);
        let (kind, key, at) = ("ACTION", "action", &post.statistics_path);
        Ok(Self {
            cameras,
            rename,
            allowed_missing,
            state: input("STATE", "observation.state", state_dim)?,
            action: post.pipeline.normalizer(kind, key, action_dim, statistics, at)?,
            state_dim,
            action_dim,
            degrees,
            relative,
        })
    }

    /// Names of the cameras that a robot is to have, in the model's order.
    pub fn cameras(&self) -> Vec<String> {
        self.cameras.iter().filter(|c| !c.placeholder).map(|c| c.name.clone()).collect()
    }

    /// How many of [`Self::cameras`] may be missing.
    pub fn optional_cameras(&self) -> usize {
        self.allowed_missing.saturating_sub(self.cameras.iter().filter(|c| c.placeholder).count())
    }

    /// What a policy of `checkpoint` with these inputs takes and gives.
    ///
    /// # Errors
    /// [`ModelError::RateUnknown`] when neither checkpoint nor `options` give the action rate.
    pub fn spec(
        &self,
        checkpoint: &Checkpoint,
        options: &LoadOptions,
        action_horizon: usize,
        denoise_steps: usize,
    ) -> Result<PolicySpec, ModelError> {
        Ok(PolicySpec {
            cameras: self.cameras(),
            optional_cameras: self.optional_cameras(),
            state_dim: self.state_dim,
            action_dim: self.action_dim,
            action_names: checkpoint.actions.action_names.clone(),
            action_horizon,
            action_rate_hz: Some(options.rate(checkpoint)?),
            denoise_steps,
            prefix: (checkpoint.family.planned)(&checkpoint.actions),
        })
    }

    /// Normalisation of the state and of the action.
    pub fn normalizers(&self) -> (&Normalizer, &Normalizer) {
        (&self.state, &self.action)
    }

    /// Width of the action.
    pub fn action_dim(&self) -> usize {
        self.action_dim
    }

    /// Width of the state.
    pub fn state_dim(&self) -> usize {
        self.state_dim
    }

    /// The images of `observation` in the model's order, none where a camera is missing and may be.
    ///
    /// # Errors
    /// [`PolicyError::MissingCamera`] when too many are missing, or all.
    pub fn images<'a>(
        &self,
        observation: &'a Observation,
    ) -> Result<Vec<Option<&'a Image>>, PolicyError> {
        let seen: Vec<Option<&Image>> = self
            .cameras
            .iter()
            .map(|camera| {
                let mut images = observation.images.iter();
                let seen = images.find(|i| self.policy_name(&i.camera) == camera.name);
                seen.map(|i| &i.frame.image)
            })
            .collect();
        let missing: Vec<_> =
            self.cameras.iter().zip(&seen).filter(|(_, i)| i.is_none()).map(|(c, _)| c).collect();
        if missing.len() > self.allowed_missing || missing.len() == seen.len() {
            let first = missing.iter().find(|c| !c.placeholder).or(missing.first());
            let camera = first.map_or_else(String::new, |c| c.name.clone());
            return Err(PolicyError::MissingCamera { camera });
        }
        Ok(seen)
    }

    /// The policy's name of the robot's camera `name`.
    fn policy_name<'a>(&'a self, name: &'a str) -> &'a str {
        let renamed = self.rename.get(&format!("{IMAGES}{name}"));
        renamed.and_then(|key| key.strip_prefix(IMAGES)).unwrap_or(name)
    }

    /// The image of camera input `index` as planes (`[3, height, width]`), normalised as its pipeline says;
    /// without statistics in [0, 1].
    ///
    /// # Errors
    /// [`PolicyError::Compute`] for an image without pixels.
    pub fn planes(&self, index: usize, image: &Image) -> Result<Planes, PolicyError> {
        let camera = &self.cameras[index];
        let size = (image.width(), image.height());
        if size.0 * size.1 == 0 {
            let reason = format!("camera `{}` gave an image without pixels", camera.name);
            return Err(PolicyError::Compute(reason));
        }
        let mut planes = resize::to_planes(image.data(), size);
        if camera.normalizer != Normalizer::identity() {
            for channel in 0..planes.channels() {
                let plane = planes.values.row_mut(channel);
                plane.iter_mut().for_each(|v| *v = camera.normalizer.normalize(channel, *v));
            }
        }
        Ok(planes)
    }

    /// The normalised state of `observation`.
    ///
    /// # Errors
    /// [`PolicyError`] when it does not fit or is not finite.
    pub fn state(&self, observation: &Observation) -> Result<Vec<f32>, PolicyError> {
        let found = observation.proprioception.len();
        if found != self.state_dim {
            return Err(PolicyError::StateWidth { expected: self.state_dim, found });
        }
        if observation.proprioception.iter().any(|v| !v.is_finite()) {
            return Err(PolicyError::NotFinite { what: "state" });
        }
        let values = observation.proprioception.iter().enumerate();
        let values = values.map(|(dim, v)| self.state.normalize(dim, self.to_unit(dim, *v) as f32));
        Ok(values.collect())
    }

    /// What the relative actions of `observation` start from.
    pub fn origin(&self, observation: &Observation) -> Origin {
        let values = observation.proprioception.iter().enumerate();
        let relative = values.filter(|(dim, _)| *dim < self.relative.len());
        Origin(relative.map(|(dim, v)| self.to_unit(dim, *v)).collect())
    }

    /// What dimension `dim` is relative to.
    fn start(&self, origin: &Origin, dim: usize) -> Result<f64, PolicyError> {
        if !self.relative.get(dim).copied().unwrap_or(false) {
            return Ok(0.0);
        }
        origin.0.get(dim).copied().ok_or(PolicyError::Unsupported("relative actions"))
    }

    /// [`Self::model_actions_from`] of a policy without relative actions.
    ///
    /// # Errors
    /// As there; [`PolicyError::Unsupported`] when the actions are relative.
    pub fn model_actions(&self, actions: &[f64], width: usize) -> Result<Vec<f32>, PolicyError> {
        self.model_actions_from(&Origin::default(), actions, width)
    }

    /// Actions (rows of the action's width, physical units) as the network has them in an inference that starts
    /// from `origin`: rows of `width`, the padding zero.
    ///
    /// # Errors
    /// [`PolicyError::NotFinite`] for a value that is none.
    pub fn model_actions_from(
        &self,
        origin: &Origin,
        actions: &[f64],
        width: usize,
    ) -> Result<Vec<f32>, PolicyError> {
        let mut out = Vec::with_capacity(actions.len() / self.action_dim * width);
        for row in actions.chunks_exact(self.action_dim) {
            for (dim, value) in row.iter().enumerate() {
                if !value.is_finite() {
                    return Err(PolicyError::NotFinite { what: "planned prefix" });
                }
                let value = self.to_unit(dim, *value) - self.start(origin, dim)?;
                out.push(self.action.normalize(dim, value as f32));
            }
            out.extend(std::iter::repeat_n(0.0, width - self.action_dim));
        }
        Ok(out)
    }

    /// [`Self::actions_from`] of a policy without relative actions.
    ///
    /// # Errors
    /// As there; [`PolicyError::Unsupported`] when the actions are relative.
    pub fn actions<'a>(
        &self,
        rows: impl IntoIterator<Item = &'a [f32]>,
    ) -> Result<Vec<f64>, PolicyError> {
        self.actions_from(&Origin::default(), rows)
    }

    /// The network's `rows`, made from inputs with `origin`, as actions `[H, D]`, row by row, in physical units; what a
    /// row has beyond `D` is padding.
    ///
    /// # Errors
    /// [`PolicyError::NotFinite`] when a value is no number.
    pub fn actions_from<'a>(
        &self,
        origin: &Origin,
        rows: impl IntoIterator<Item = &'a [f32]>,
    ) -> Result<Vec<f64>, PolicyError> {
        let mut out = Vec::new();
        for row in rows {
            for (dim, value) in row.iter().take(self.action_dim).enumerate() {
                let value = self.action.unnormalize(dim, f64::from(*value));
                let value = value + self.start(origin, dim)?;
                if !value.is_finite() {
                    return Err(PolicyError::NotFinite { what: "action chunk" });
                }
                out.push(if self.is_degrees(dim) { value.to_radians() } else { value });
            }
        }
        Ok(out)
    }

    /// A value of the robot in the policy's unit.
    fn to_unit(&self, dim: usize, value: f64) -> f64 {
        if self.is_degrees(dim) { value.to_degrees() } else { value }
    }

    fn is_degrees(&self, dim: usize) -> bool {
        self.degrees.get(dim).copied().unwrap_or(false)
    }
}

/// Per action dimension, whether it is relative to the state; empty when none is.
fn relative(
    checkpoint: &Checkpoint,
    state_dim: usize,
    action_dim: usize,
) -> Result<Vec<bool>, ModelError> {
    let (before, after) = (&checkpoint.preprocessor.pipeline, &checkpoint.postprocessor.pipeline);
    let fail = |reason: String| {
        let key = "relative_actions_processor";
        Err(ModelError::config(&checkpoint.config_path(), key, reason))
    };
    match (&before.relative, after.absolute) {
        (None, false) => Ok(Vec::new()),
        (Some(relative), true) => {
            let relative = relative.dimensions(action_dim);
            match relative.iter().rposition(|r| *r) {
                Some(last) if last >= state_dim => fail(format!(
                    "makes action {last} relative to the state, which has {state_dim} values"
                )),
                _ => Ok(relative),
            }
        }
        _ => fail(
            "and absolute_actions_processor are not both enabled; save both pipelines again".into(),
        ),
    }
}
