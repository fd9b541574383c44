//! From observations to the network's inputs, and from its sample to actions.

use candle_core::{Device, Tensor};
use sinew_runtime::{Observation, PolicyError};

use crate::ModelError;
use crate::checkpoint::Checkpoint;
use crate::processors::{Normalizer, Prompter, resize};

/// What the network is called with.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Images in the model's order, `[3, height, width]`, in [−1, 1].
    pub pixels: Vec<Tensor>,
    /// Missing cameras that are stood in for by masked dummies.
    pub dummies: usize,
    /// Token ids of the instruction.
    pub tokens: Vec<u32>,
    /// Normalised state, not padded.
    pub state: Vec<f32>,
}

struct CameraInput {
    /// Name without `observation.images.`.
    name: String,
    normalizer: Normalizer,
    /// Invented by the configuration to stand for no camera.
    placeholder: bool,
}

/// Observations to [`Inputs`], and normalised actions to physical ones.
pub struct Preparer {
    cameras: Vec<CameraInput>,
    rename: std::collections::BTreeMap<String, String>,
    allowed_missing: usize,
    empty_cameras: usize,
    resize: Option<(usize, usize)>,
    prompter: Prompter,
    state: Normalizer,
    action: Normalizer,
    state_dim: usize,
    action_dim: usize,
    /// Per action dimension, whether the policy's unit is degrees.
    degrees: Vec<bool>,
}

const IMAGES: &str = "observation.images.";

impl Preparer {
    /// Reads the pipelines of `checkpoint`; `allowed_missing` more cameras than it allows may be missing.
    ///
    /// # Errors
    /// [`ModelError`] naming the statistics or key that cannot be used.
    pub fn new(checkpoint: &Checkpoint, allowed_missing: usize) -> Result<Self, ModelError> {
        let (config, path) = (&checkpoint.config, checkpoint.config_path());
        let (pre, post) = (&checkpoint.preprocessor, &checkpoint.postprocessor);
        let (state_dim, action_dim) = (config.state_dim(&path)?, config.action_dim(&path)?);
        let input = |kind: &str, key: &str, width: usize| {
            pre.pipeline.normalizer(kind, key, width, &pre.statistics, &pre.statistics_path)
        };
        let cameras = config
            .cameras()
            .map(|key| {
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
        let max_length = pre.pipeline.max_length.unwrap_or(config.tokenizer_max_length);
        Ok(Self {
            cameras,
            rename: pre.pipeline.rename.clone(),
            allowed_missing: config.empty_cameras + allowed_missing,
            empty_cameras: config.empty_cameras,
            resize: config.resize_imgs_with_padding,
            prompter: Prompter::new(
                &checkpoint.tokenizer_path,
                checkpoint.tokenizer.as_bytes(),
                max_length,
                pre.pipeline.append_newline,
            )?,
            state: input("STATE", "observation.state", state_dim)?,
            action: post.pipeline.normalizer(
                "ACTION",
                "action",
                action_dim,
                &post.statistics,
                &post.statistics_path,
            )?,
            state_dim,
            action_dim,
            degrees,
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

    /// Normalisation of the state and of the action.
    pub fn normalizers(&self) -> (&Normalizer, &Normalizer) {
        (&self.state, &self.action)
    }

    /// Number of tokens that the tokenizer knows.
    pub fn vocabulary(&self) -> usize {
        self.prompter.vocabulary()
    }

    /// Width of the action.
    pub fn action_dim(&self) -> usize {
        self.action_dim
    }

    /// Width of the state.
    pub fn state_dim(&self) -> usize {
        self.state_dim
    }

    /// Actions (`rows` of the action's width, physical units) as the network has them: `[rows, width]`, the
    /// padding zero.
    ///
    /// # Errors
    /// [`PolicyError::NotFinite`] for a value that is none.
    pub fn model_actions(&self, actions: &[f64], width: usize) -> Result<Vec<f32>, PolicyError> {
        let mut out = Vec::with_capacity(actions.len() / self.action_dim * width);
        for row in actions.chunks_exact(self.action_dim) {
            for (dim, value) in row.iter().enumerate() {
                if !value.is_finite() {
                    return Err(PolicyError::NotFinite { what: "planned prefix" });
                }
                let value = if self.is_degrees(dim) { value.to_degrees() } else { *value };
                out.push(self.action.normalize(dim, value as f32));
            }
            out.extend(std::iter::repeat_n(0.0, width - self.action_dim));
        }
        Ok(out)
    }

    /// The inputs of `observation`.
    ///
    /// # Errors
    /// [`PolicyError`] when a camera is missing, or the state does not fit or is not finite.
    pub fn prepare(&mut self, observation: &Observation) -> Result<Inputs, PolicyError> {
        let found = observation.proprioception.len();
        if found != self.state_dim {
            return Err(PolicyError::StateWidth { expected: self.state_dim, found });
        }
        if observation.proprioception.iter().any(|v| !v.is_finite()) {
            return Err(PolicyError::NotFinite { what: "state" });
        }
        let compute = |e: &dyn std::fmt::Display| PolicyError::Compute(e.to_string());
        let mut pixels = Vec::with_capacity(self.cameras.len());
        let mut missing = Vec::new();
        for camera in &self.cameras {
            let seen =
                observation.images.iter().find(|i| self.policy_name(&i.camera) == camera.name);
            match seen {
                Some(image) => {
                    pixels.push(self.image(camera, &image.frame.image).map_err(|e| compute(&e))?);
                }
                None => missing.push(camera),
            }
        }
        if missing.len() > self.allowed_missing || pixels.is_empty() {
            let first = missing.iter().find(|c| !c.placeholder).or(missing.first());
            let camera = first.map_or_else(String::new, |c| c.name.clone());
            return Err(PolicyError::MissingCamera { camera });
        }
        let dummies = missing.len().min(self.empty_cameras);
        let state = observation.proprioception.iter().enumerate().map(|(i, v)| {
            let value = if self.is_degrees(i) { v.to_degrees() } else { *v };
            self.state.normalize(i, value as f32)
        });
        let state = state.collect();
        let tokens =
            self.prompter.encode(&observation.instruction).map_err(|e| compute(&e))?.to_vec();
        Ok(Inputs { pixels, dummies, tokens, state })
    }

    /// The policy's name of the robot's camera `name`.
    fn policy_name<'a>(&'a self, name: &'a str) -> &'a str {
        let renamed = self.rename.get(&format!("{IMAGES}{name}"));
        renamed.and_then(|key| key.strip_prefix(IMAGES)).unwrap_or(name)
    }

    fn is_degrees(&self, dim: usize) -> bool {
        self.degrees.get(dim).copied().unwrap_or(false)
    }

    fn image(
        &self,
        camera: &CameraInput,
        image: &sinew_runtime::Image,
    ) -> candle_core::Result<Tensor> {
        let from = (image.width(), image.height());
        let area = from.0 * from.1;
        if area == 0 {
            candle_core::bail!("camera `{}` gave an image without pixels", camera.name);
        }
        let mut planes = resize::to_planes(image.data());
        if camera.normalizer != Normalizer::identity() {
            for (channel, plane) in planes.chunks_exact_mut(area).enumerate() {
                plane.iter_mut().for_each(|v| *v = camera.normalizer.normalize(channel, *v));
            }
        }
        let to = self.resize.unwrap_or(from);
        let mut planes = resize::resize_with_pad(&planes, from, to);
        planes.iter_mut().for_each(|v| *v = *v * 2.0 - 1.0);
        Tensor::from_vec(planes, (3, to.1, to.0), &Device::Cpu)
    }

    /// A finished sample (`[H, M]`) as actions `[H, D]`, row by row, in physical units.
    ///
    /// # Errors
    /// [`PolicyError::NotFinite`] when a value is no number.
    pub fn actions(&self, sample: &Tensor) -> Result<Vec<f64>, PolicyError> {
        let rows = sample.to_vec2::<f32>().map_err(|e| PolicyError::Compute(e.to_string()))?;
        let mut out = Vec::with_capacity(rows.len() * self.action_dim);
        for row in rows {
            for (dim, value) in row.iter().take(self.action_dim).enumerate() {
                let value = self.action.unnormalize(dim, f64::from(*value));
                if !value.is_finite() {
                    return Err(PolicyError::NotFinite { what: "action chunk" });
                }
                out.push(if self.is_degrees(dim) { value.to_radians() } else { value });
            }
        }
        Ok(out)
    }
}
