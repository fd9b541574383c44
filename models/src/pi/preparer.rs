//! From observations to the network's inputs, and from its sample to actions.

use sinew_runtime::{Image, Observation, PolicyError};

use super::PiConfig;
use crate::ModelError;
use crate::anytime::compute;
use crate::checkpoint::Checkpoint;
use crate::kernels::{Matrix, Planes};
use crate::processors::resize::{Padding, resize_padded};
use crate::processors::{Boundary, Origin, Prompter, StatePrompt};

/// What the network is called with.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Images in the model's order, in [−1, 1]. Missing cameras have none.
    pub pixels: Vec<Planes>,
    /// Token ids of the prompt.
    pub tokens: Vec<u32>,
    /// Normalised state, not padded.
    pub state: Vec<f32>,
    /// The raw state, which relative actions start from.
    pub origin: Origin,
}

/// Observations to [`Inputs`], and normalised actions to physical ones.
pub struct Preparer {
    boundary: Boundary,
    /// Width and height.
    image: (usize, usize),
    state_prompt: Option<StatePrompt>,
    prompter: Prompter,
}

impl Preparer {
    /// Reads the pipelines of `checkpoint`; `allowed_missing` more cameras than it allows may be missing.
    ///
    /// # Errors
    /// [`ModelError`] naming the statistics or key that cannot be used.
    pub fn new(checkpoint: &Checkpoint, allowed_missing: usize) -> Result<Self, ModelError> {
        let config = PiConfig::of(checkpoint)?;
        let pipeline = &checkpoint.preprocessor.pipeline;
        let tokenizer = checkpoint.extra(super::TOKENIZER)?;
        let default = if pipeline.state_prompt.is_some() { 200 } else { 48 };
        let length = pipeline.max_length.or(config.tokenizer_max_length).unwrap_or(default);
        Ok(Self {
            boundary: Boundary::new(checkpoint, config.empty_cameras + allowed_missing)?,
            image: (config.image_resolution.1, config.image_resolution.0),
            state_prompt: pipeline.state_prompt,
            prompter: Prompter::new(
                &tokenizer.path,
                tokenizer.text.as_bytes(),
                length,
                pipeline.append_newline,
            )?,
        })
    }

    /// Where the network's values begin.
    pub fn boundary(&self) -> &Boundary {
        &self.boundary
    }

    /// The prompt's tokenizer.
    pub fn prompter(&self) -> &Prompter {
        &self.prompter
    }

    /// The inputs of `observation`.
    ///
    /// # Errors
    /// [`PolicyError`] when a camera is missing, or the state does not fit or is not finite.
    pub fn prepare(&mut self, observation: &Observation) -> Result<Inputs, PolicyError> {
        let state = self.boundary.state(observation)?;
        let seen = self.boundary.images(observation)?;
        let images = seen.iter().enumerate().filter_map(|(i, image)| Some((i, (*image)?)));
        let pixels = images.map(|(i, image)| self.image(i, image)).collect::<Result<_, _>>()?;
        let prompt = match self.state_prompt {
            Some(kind) => kind.text(&observation.instruction, &state),
            None => observation.instruction.clone(),
        };
        let tokens = self.prompter.encode(&prompt).map_err(compute)?;
        let tokens = tokens.to_vec();
        Ok(Inputs { pixels, tokens, state, origin: self.boundary.origin(observation) })
    }

    fn image(&self, index: usize, image: &Image) -> Result<Planes, PolicyError> {
        let planes = self.boundary.planes(index, image)?;
        let mut planes = resize_padded(planes, self.image, Padding::Centered);
        planes.values.values_mut().iter_mut().for_each(|v| *v = *v * 2.0 - 1.0);
        Ok(planes)
    }

    /// A finished sample (`[H, M]`, made from inputs with `origin`) as actions `[H, D]`, row by row, in
    /// physical units.
    ///
    /// # Errors
    /// [`PolicyError::NotFinite`] when a value is no number.
    pub fn actions(&self, sample: &Matrix, origin: &Origin) -> Result<Vec<f64>, PolicyError> {
        self.boundary.actions_from(origin, sample.iter())
    }
}
