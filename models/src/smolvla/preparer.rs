//! From observations to the network's inputs, and from its sample to actions.

use sinew_runtime::{Image, Observation, PolicyError};

use super::SmolVlaConfig;
use crate::ModelError;
use crate::anytime::compute;
use crate::checkpoint::Checkpoint;
use crate::kernels::{Matrix, Planes};
use crate::processors::{Boundary, Prompter, resize};

/// What the network is called with.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Images in the model's order, in [−1, 1].
    pub pixels: Vec<Planes>,
    /// Missing cameras that are stood in for by masked dummies.
    pub dummies: usize,
    /// Token ids of the instruction.
    pub tokens: Vec<u32>,
    /// Normalised state, not padded.
    pub state: Vec<f32>,
}

/// Observations to [`Inputs`], and normalised actions to physical ones.
pub struct Preparer {
    boundary: Boundary,
    empty_cameras: usize,
    resize: Option<(usize, usize)>,
    prompter: Prompter,
}

impl Preparer {
    /// Reads the pipelines of `checkpoint`; `allowed_missing` more cameras than it allows may be missing.
    ///
    /// # Errors
    /// [`ModelError`] naming the statistics or key that cannot be used.
    pub fn new(checkpoint: &Checkpoint, allowed_missing: usize) -> Result<Self, ModelError> {
        let config = SmolVlaConfig::of(checkpoint)?;
        let pipeline = &checkpoint.preprocessor.pipeline;
        let max_length = pipeline.max_length.unwrap_or(config.tokenizer_max_length);
        let tokenizer = checkpoint.extra(super::TOKENIZER)?;
        Ok(Self {
            boundary: Boundary::new(checkpoint, config.empty_cameras + allowed_missing)?,
            empty_cameras: config.empty_cameras,
            resize: config.resize_imgs_with_padding,
            prompter: Prompter::new(
                &tokenizer.path,
                tokenizer.text.as_bytes(),
                max_length,
                pipeline.append_newline,
            )?,
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
        let seen = self.boundary.images(observation)?;
        let missing = seen.iter().filter(|image| image.is_none()).count();
        let mut pixels = Vec::with_capacity(seen.len());
        for (index, image) in seen.iter().enumerate() {
            if let Some(image) = image {
                pixels.push(self.image(index, image)?);
            }
        }
        let tokens = self.prompter.encode(&observation.instruction).map_err(compute)?.to_vec();
        Ok(Inputs { pixels, dummies: missing.min(self.empty_cameras), tokens, state })
    }

    fn image(&self, index: usize, image: &Image) -> Result<Planes, PolicyError> {
        let mut planes = self.boundary.planes(index, image)?;
        if let Some(to) = self.resize {
            planes = resize::resize_with_pad(planes, to);
        }
        planes.values.values_mut().iter_mut().for_each(|v| *v = *v * 2.0 - 1.0);
        Ok(planes)
    }

    /// A finished sample (`[H, M]`) as actions `[H, D]`, row by row, in physical units.
    ///
    /// # Errors
    /// [`PolicyError::NotFinite`] when a value is no number.
    pub fn actions(&self, sample: &Matrix) -> Result<Vec<f64>, PolicyError> {
        self.boundary.actions(sample.iter())
    }
}
