//! From observations to the network's inputs.

use sinew_runtime::{Image, Observation, PolicyError};

use super::XvlaConfig;
use crate::ModelError;
use crate::anytime::compute;
use crate::checkpoint::Checkpoint;
use crate::kernels::Planes;
use crate::processors::{Boundary, NormMode, Prompter, resize};

/// Mean and deviation of the channels of ImageNet's pixels, which the vision tower was trained with.
const IMAGENET: [(f32, f32); 3] = [(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)];

/// What the network is called with.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Images that are there, in the model's order, normalised.
    pub pixels: Vec<Planes>,
    /// Token ids of the instruction, with the padding: the encoder reads it as text.
    pub tokens: Vec<u32>,
    /// Normalised state, not padded.
    pub state: Vec<f32>,
}

/// Observations to [`Inputs`].
pub struct Preparer {
    boundary: Boundary,
    prompter: Prompter,
    imagenet: bool,
    /// Width and height.
    resize: Option<(usize, usize)>,
    pad_token: u32,
    pad_to: usize,
    pad_left: bool,
}

impl Preparer {
    /// Reads the pipelines of `checkpoint`; `allowed_missing` more cameras than it allows may be missing.
    ///
    /// # Errors
    /// [`ModelError`] naming the statistics or key that cannot be used.
    pub fn new(
        checkpoint: &Checkpoint,
        config: &XvlaConfig,
        allowed_missing: usize,
    ) -> Result<Self, ModelError> {
        let pipeline = &checkpoint.preprocessor.pipeline;
        if pipeline.modes.get("VISUAL").is_some_and(|mode| *mode != NormMode::Identity) {
            let reason = "normalises images once more; only IDENTITY is supported for VISUAL";
            return Err(ModelError::config(&checkpoint.config_path(), "norm_map", reason));
        }
        let max_length = pipeline.max_length.unwrap_or(config.tokenizer_max_length);
        let most = config.florence_config.text_config.max_position_embeddings;
        if max_length > most {
            let reason = format!("is {max_length} tokens, the encoder has positions for {most}");
            return Err(ModelError::config(&checkpoint.config_path(), "max_length", reason));
        }
        let tokenizer = checkpoint.extra(super::TOKENIZER)?;
        let (path, text) = (&tokenizer.path, tokenizer.text.as_bytes());
        let prompter = Prompter::new(path, text, max_length, pipeline.append_newline)?;
        Ok(Self {
            boundary: Boundary::new(checkpoint, config.empty_cameras + allowed_missing)?,
            prompter,
            imagenet: pipeline.imagenet,
            resize: config.resize_imgs_with_padding.map(|(height, width)| (width, height)),
            pad_token: config.florence_config.text_config.pad_token_id,
            pad_to: if pipeline.pads { max_length } else { 0 },
            pad_left: pipeline.pads_left,
        })
    }

    /// Where the network's values begin.
    pub fn boundary(&self) -> &Boundary {
        &self.boundary
    }

    /// The inputs of `observation`.
    ///
    /// # Errors
    /// [`PolicyError`] when a camera is missing, or the state does not fit or is not finite.
    pub fn prepare(&mut self, observation: &Observation) -> Result<Inputs, PolicyError> {
        let state = self.boundary.state(observation)?;
        let mut pixels = Vec::new();
        for (index, image) in self.boundary.images(observation)?.into_iter().enumerate() {
            if let Some(image) = image {
                pixels.push(self.image(index, image)?);
            }
        }
        let mut tokens = self.prompter.encode(&observation.instruction).map_err(compute)?.to_vec();
        let padding = self.pad_to.saturating_sub(tokens.len());
        let place = if self.pad_left { 0 } else { tokens.len() };
        tokens.splice(place..place, std::iter::repeat_n(self.pad_token, padding));
        Ok(Inputs { pixels, tokens, state })
    }

    /// The camera's image normalised, then resized: the padding is zero in normalised pixels.
    fn image(&self, index: usize, image: &Image) -> Result<Planes, PolicyError> {
        let mut planes = self.boundary.planes(index, image)?;
        let from = (image.width(), image.height());
        if self.imagenet {
            let pixels = planes.values.values_mut();
            for (plane, (mean, std)) in pixels.chunks_exact_mut(from.0 * from.1).zip(IMAGENET) {
                plane.iter_mut().for_each(|v| *v = (*v - mean) / std);
            }
        }
        Ok(resize::resize_with_pad(planes, self.resize.unwrap_or(from)))
    }
}
