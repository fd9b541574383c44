//! The network, stage by stage, and the preparation of its inputs.

use candle_core::{Device, Result, Tensor};
use sinew_runtime::{Observation, PolicyError};

use super::expert::Expert;
use super::flow::time_embedding;
use super::text::Text;
use super::vision::Vision;
use super::{ExpertCache, Prefix, VisionFeatures};
use crate::ModelError;
use crate::checkpoint::Checkpoint;
use crate::kernels::{Linear, silu};
use crate::processors::{Normalizer, Prompter, resize};

/// A SmolVLA network.
pub struct SmolVla {
    vision: Vision,
    text: Text,
    expert: Expert,
    state_proj: Linear,
    action_in: Linear,
    time_in: Linear,
    time_out: Linear,
    action_out: Linear,
    /// Embeddings before and after each image, not scaled; `None` without special tokens.
    image_marks: Option<(Tensor, Tensor)>,
    periods: (f64, f64),
    state_width: usize,
    sample_shape: (usize, usize),
}

impl SmolVla {
    /// Builds the network from `checkpoint`.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor or key that does not fit.
    pub fn load(checkpoint: &Checkpoint) -> std::result::Result<Self, ModelError> {
        let (config, vlm, store) = (&checkpoint.config, &checkpoint.vlm, &checkpoint.store);
        let path = checkpoint.config_path();
        let all = vlm.text_config.num_hidden_layers;
        let text_layers = match usize::try_from(config.num_vlm_layers) {
            Ok(n) if n > all => {
                let reason = format!("is {n}, the vision-language model has {all} layers");
                return Err(ModelError::config(&path, "num_vlm_layers", reason));
            }
            Ok(n) if n > 0 => n,
            _ => all,
        };
        let text = Text::load(store, &vlm.text_config, text_layers)?;
        let vision = Vision::load(store, vlm)?;
        if let Some((width, height)) = config.resize_imgs_with_padding {
            let unit = vision.granularity();
            let whole = |n: usize| n > 0 && n <= 1 << 14 && n.is_multiple_of(unit);
            if !whole(width) || !whole(height) {
                let reason = format!("is [{width}, {height}], expected multiples of {unit}");
                return Err(ModelError::config(&path, "resize_imgs_with_padding", reason));
            }
        }
        let expert = Expert::load(store, config, vlm, text_layers, &path)?;
        let (width, depth) = (expert.width(), text.width());
        let linear = |name: &str, inputs, outputs| Linear::load(store, name, inputs, outputs, true);
        Ok(Self {
            state_proj: linear("state_proj", config.max_state_dim, depth)?,
            action_in: linear("action_in_proj", config.max_action_dim, width)?,
            time_in: linear("action_time_mlp_in", 2 * width, width)?,
            time_out: linear("action_time_mlp_out", width, width)?,
            action_out: linear("action_out_proj", width, config.max_action_dim)?,
            image_marks: image_marks(checkpoint, &text)?,
            periods: (config.min_period, config.max_period),
            state_width: config.max_state_dim,
            sample_shape: (config.chunk_size, config.max_action_dim),
            vision,
            text,
            expert,
        })
    }

    /// Shape of the sample that is denoised, `(H, M)`.
    pub fn sample_shape(&self) -> (usize, usize) {
        self.sample_shape
    }

    /// One image (`[3, height, width]`, in [−1, 1]) through vision tower and connector.
    ///
    /// # Errors
    /// When the size cannot be cut into patches.
    pub fn encode_image(&self, pixels: &Tensor) -> Result<VisionFeatures> {
        self.vision.forward(pixels)
    }

    /// `state` padded to the width that the network takes.
    pub fn pad_state(&self, state: &[f32]) -> Vec<f32> {
        let mut padded = state.to_vec();
        padded.resize(self.state_width, 0.0);
        padded
    }

    /// The prefix as it enters the first text layer, `[P, D]`: images, `dummies` masked cameras,
    /// instruction, state. A masked camera leaves only its special tokens behind.
    ///
    /// # Errors
    /// When a token is not in the table.
    pub fn embed_prefix(
        &self,
        images: &[Tensor],
        dummies: usize,
        tokens: &[u32],
        state: &[f32],
    ) -> Result<Tensor> {
        let scale = (self.text.width() as f64).sqrt();
        let mut parts = Vec::with_capacity(3 * (images.len() + dummies) + 2);
        for image in images.iter().map(Some).chain(std::iter::repeat_n(None, dummies)) {
            if let Some((before, _)) = &self.image_marks {
                parts.push(before.clone());
            }
            if let Some(image) = image {
                parts.push((image * scale)?);
            }
            if let Some((_, after)) = &self.image_marks {
                parts.push(after.clone());
            }
        }
        if !tokens.is_empty() {
            parts.push((self.text.embed(tokens)? * scale)?);
        }
        let state = Tensor::from_vec(self.pad_state(state), (1, self.state_width), &Device::Cpu)?;
        parts.push(self.state_proj.forward(&state)?);
        Tensor::cat(&parts, 0)
    }

    /// Keys and values of the prefix in every text layer.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn prefill(&self, embeddings: &Tensor) -> Result<Prefix> {
        self.text.prefill(embeddings)
    }

    /// What the expert reads of the prefix, computed once for all denoise steps.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn prepare(&self, prefix: &Prefix) -> Result<ExpertCache> {
        self.expert.prepare(prefix)
    }

    /// The suffix as it enters the expert, `[H, w]`.
    ///
    /// # Errors
    /// When `x` is not `[H, M]`.
    pub fn embed_suffix(&self, x: &Tensor, time: f64) -> Result<Tensor> {
        let (rows, width) = (x.dim(0)?, self.expert.width());
        let (min, max) = self.periods;
        let time =
            Tensor::from_vec(time_embedding(time, width, min, max), (1, width), &Device::Cpu)?;
        let actions = self.action_in.forward(x)?;
        let both = Tensor::cat(&[&actions, &time.broadcast_as((rows, width))?.contiguous()?], 1)?;
        self.time_out.forward(&silu(self.time_in.forward(&both)?)?)
    }

    /// Velocity of the sample `x` (`[H, M]`) at `time`.
    ///
    /// # Errors
    /// When `x` is not `[H, M]`.
    pub fn velocity(&self, cache: &ExpertCache, x: &Tensor, time: f64) -> Result<Tensor> {
        let out = self.expert.forward(&self.embed_suffix(x, time)?, cache)?;
        self.action_out.forward(&out)
    }
}

fn image_marks(
    checkpoint: &Checkpoint,
    text: &Text,
) -> std::result::Result<Option<(Tensor, Tensor)>, ModelError> {
    if !checkpoint.config.add_image_special_tokens {
        return Ok(None);
    }
    let prompter =
        Prompter::new(&checkpoint.tokenizer_path, checkpoint.tokenizer.as_bytes(), 1, false)?;
    let fake = prompter.special("<fake_token_around_image>")?;
    let global = prompter.special("<global-img>")?;
    Ok(Some((text.embed(&[fake, global])?, text.embed(&[fake])?)))
}

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
    pub fn new(
        checkpoint: &Checkpoint,
        allowed_missing: usize,
    ) -> std::result::Result<Self, ModelError> {
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
            .collect::<std::result::Result<_, ModelError>>()?;
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

    /// The inputs of `observation`.
    ///
    /// # Errors
    /// [`PolicyError`] when a camera is missing, or the state does not fit or is not finite.
    pub fn prepare(
        &mut self,
        observation: &Observation,
    ) -> std::result::Result<Inputs, PolicyError> {
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

    fn image(&self, camera: &CameraInput, image: &sinew_runtime::Image) -> Result<Tensor> {
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
    pub fn actions(&self, sample: &Tensor) -> std::result::Result<Vec<f64>, PolicyError> {
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
